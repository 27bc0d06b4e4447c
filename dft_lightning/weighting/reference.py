"""Weightings that compare the model with a reference or an earlier policy."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dft_lightning.weighting.base import Scope, TokenStats, TokenWeighting

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

    def __post_init__(self) -> None:
        if self.level not in _PUBLISHED_CLIP:
            raise ValueError(f'ImportanceWeighted.level is {self.level!r}; expected "sequence" or "token"')
        low, high = self.bounds
        if not 0.0 <= low <= high:
            raise ValueError(f"ImportanceWeighted.clip is {self.clip}; expected 0 <= smallest <= largest")

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
