"""Weightings that compare the model with a reference or an earlier policy."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dft_lightning.weighting.base import Divisor, Scope, Source, TokenStats, TokenWeighting
from dft_lightning.weighting.fields import expect

#: Nats within which log-probabilities are equal: those of the reference come from other batches, and from a cache, and
#: differ by rounding, 1e-5 in float32, while the model is its reference.
_TIE = 1e-4
_PUBLISHED_CLIP = {"sequence": (0.0, 16.0), "token": (0.2, 1.8)}


@dataclass(frozen=True)
class ImportanceWeighted(TokenWeighting):
    """iw-SFT: w = clamp(exp(temperature · r), *clip), 1 for every token while the model is still its reference.

    r is log p − log p_ref, averaged over the tokens of the response for `level="sequence"` (what the authors' code
    runs), or the token's own for `level="token"`. Qin and Springenberg, "Supervised Fine Tuning on Curated Data is
    Reinforcement Learning (and can be improved)", arXiv 2507.12856. The reference is the frozen initial model.
    Unlike the authors' code, log p comes from a log-softmax in float32, where log(softmax) in bfloat16 underflows.

    Args:
        level: whether all tokens of a response share one weight ("sequence") or have their own ("token").
        temperature: T, the factor on r.
        clip: smallest and largest weight; null for the published [0, 16] of "sequence" and [0.2, 1.8] of "token".
    """

    level: Literal["sequence", "token"] = "sequence"
    temperature: float = 1.0
    clip: tuple[float, float] | None = None

    needs = frozenset({"ref_logp"})
    formula = "clamp(exp(temperature·mean(log p − log p_ref)), 0, 16); (p/p_ref)^temperature in [0.2, 1.8] by token"
    source = Source(
        "Qin and Springenberg",
        "Supervised Fine Tuning on Curated Data is Reinforcement Learning (and can be improved)",
        "2507.12856",
        note='level="sequence" is what the authors\' code runs; log p in float32, where theirs underflows in bfloat16',
    )

    def __post_init__(self) -> None:
        expect(self.level in _PUBLISHED_CLIP, "ImportanceWeighted.level", self.level, '"sequence" or "token"')
        low, high = self.bounds
        expect(0.0 <= low <= high, "ImportanceWeighted.clip", self.clip, "0 <= smallest <= largest")

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest weight in force."""
        low, high = self.clip if self.clip is not None else _PUBLISHED_CLIP[self.level]
        return low, high

    @property
    def scope(self) -> Scope:  # type: ignore[override]  # a ClassVar where it is fixed, a property where a field decides
        return self.level

    def weights(self, tokens: TokenStats) -> Tensor:
        ratio = tokens.logp - tokens.need("ref_logp")
        if self.level == "sequence":
            ratio = tokens.sequence_mean(ratio)
        low, high = self.bounds
        return (self.temperature * ratio).exp().clamp(low, high)


@dataclass(frozen=True)
class PSFT(TokenWeighting):
    """w = r where r ≤ 1 + clip, else 0, r = p/p_old: SFT within a trust region, PPO's at advantage 1.

    Zhu et al., "Proximal Supervised Fine-Tuning", arXiv 2508.17784: the gradient of −min(r, clamp(r, 0.8, 1 + clip)).
    A token that has become likelier by more than the clip since its window began gets nothing further. The lower clip
    (0.2 in their settings) never acts at a positive advantage, so it is no field here. Without dropout r is 1 on a
    window's first step, and this is SFT.

    Args:
        clip: by how much the ratio may exceed 1, above 0.
        window: optimizer steps that share an old policy, the model as it was before the first of them.
    """

    clip: float = 0.28
    window: int = 8

    needs = frozenset({"old_logp"})
    formula = "r·1[r ≤ 1 + clip], r = p/p_old"
    source = Source(
        "Zhu et al.",
        "Proximal Supervised Fine-Tuning",
        "2508.17784",
        note="clip-higher 0.28 and 8 updates an old policy as in the authors' runs; their lower clip, 0.2, never acts",
    )

    def __post_init__(self) -> None:
        expect(0.0 < self.clip < math.inf, "PSFT.clip", self.clip, "a number above 0")
        expect(self.window >= 1, "PSFT.window", self.window, "a number of steps, at least 1")

    def weights(self, tokens: TokenStats) -> Tensor:
        ratio = (tokens.logp - tokens.need("old_logp")).exp()
        return torch.where(ratio <= 1.0 + self.clip, ratio, 0.0)


@dataclass(frozen=True)
class Rho1(TokenWeighting):
    """w = 1 for the tokens in the top `percent` of ℓ − ℓ_ref, else 0: those that a reference finds easier.

    Lin et al., "Rho-1: Not All Tokens Are What You Need", arXiv 2404.07965. Known from others' implementations only.
    The percentage is of the whole optimizer step, where those take it of the micro-batch, and the divisor is the number
    of tokens that are kept. Tokens within 1e-4 nats of the border are all kept: neither order nor rounding matters.
    In the paper the reference is another model, trained on clean data; here it is the frozen initial model. At the
    start all tokens tie with it, and all are kept; later those are kept that have become less likely than they were,
    or have gained least.

    Args:
        percent: how many of the tokens are kept, above 0 and up to 100.
    """

    percent: float = 60.0

    needs = frozenset({"ref_logp"})
    scope: ClassVar[Scope] = "step"
    divisor: ClassVar[Divisor] = "selected"
    formula = "1[log p_ref − log p in the step's top percent]"
    source = Source(
        "Lin et al.",
        "Rho-1: Not All Tokens Are What You Need",
        "2404.07965",
        note="the percentage is of the whole optimizer step; the reference is the frozen initial model, where the "
        "paper's is trained on clean data",
        third=True,
    )

    def __post_init__(self) -> None:
        expect(0.0 < self.percent <= 100.0, "Rho1.percent", self.percent, "a number above 0 and up to 100")

    def weights(self, tokens: TokenStats) -> Tensor:
        excess = tokens.need("ref_logp") - tokens.logp
        kept = max(1, math.ceil(self.percent * len(tokens) / 100 - 1e-9))  # no token more by rounding of the percentage
        border = excess.sort(descending=True).values[kept - 1] - _TIE
        return (excess >= border).to(excess.dtype)
