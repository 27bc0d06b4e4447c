"""Objectives whose target is a whole distribution over the vocabulary.

Shapes: R tokens, V vocabulary. What they add to the gradient by the logits is given with each.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dft_lightning.weighting.base import (
    REF_DISTRIBUTION,
    Source,
    TokenStats,
    TokenTarget,
)
from dft_lightning.weighting.composition import Modifier, unit_weights
from dft_lightning.weighting.fields import expect
from dft_lightning.weighting.likelihood import CLIMBS_P, Monitor

#: For cross-entropies with a target that does not move.
DESCENDS_OBJECTIVE: Monitor = ("val/objective", "min")


@dataclass(frozen=True)
class ASFT(TokenTarget):
    """DFT's w = p, held near the initial model by strength · KL over the whole vocabulary.

    Zhu et al., "Anchored Supervised Fine-Tuning", arXiv 2509.23753.
    direction "forward" is KL(ref ‖ π), whose gradient by the logits is π − ref; "reverse" is KL(π ‖ ref), whose
    gradient is π_v·(log π_v − log ref_v − KL). The logged objective has the forward KL's cross-entropy in its place,
    which is the KL plus the reference's entropy, a constant.

    Args:
        strength: λ, 0 or more; 0 is DFT. The authors use 0.05 to 0.1.
        direction: which of the two divergences.
    """

    strength: float = 0.05
    direction: Literal["forward", "reverse"] = "forward"

    needs = frozenset({REF_DISTRIBUTION})
    monitor = CLIMBS_P
    formula = "p, and λ·KL(ref ‖ π) or λ·KL(π ‖ ref) over the vocabulary"
    source = Source(
        "Zhu et al.",
        "Anchored Supervised Fine-Tuning",
        "2509.23753",
        note='The authors\' code takes KL(ref ‖ π), as "forward" here; the paper\'s text reads as the "reverse".',
    )

    def __post_init__(self) -> None:
        expect(0.0 <= self.strength < math.inf, "ASFT.strength", self.strength, "a number of 0 or more")
        expect(self.direction in ("forward", "reverse"), "ASFT.direction", self.direction, '"forward" or "reverse"')

    def weights(self, tokens: TokenStats) -> Tensor:
        return tokens.p

    def targets(self, tokens: TokenStats, logp: Tensor, ref_logp: Tensor | None) -> Tensor:
        assert ref_logp is not None  # named in `needs`
        if self.direction == "forward":
            return self.strength * ref_logp.exp()
        p = logp.exp()
        excess = torch.where(p > 0.0, p * (logp - ref_logp), 0.0)  # sums to KL(π ‖ ref)
        return self.strength * (p * excess.sum(1, keepdim=True) - excess)


@dataclass(frozen=True)
class GEM(TokenTarget):
    """−Σ_v q_v·h_v·(log π(y) − log π(v)) with q = softmax(z / β): the likelihood against what the model prefers to it.

    Li et al., "Preserving Diversity in Supervised Fine-Tuning of Large Language Models", arXiv 2408.16673.
    A q that is sharper (β < 1) than the model's own pushes down the few likeliest words, and leaves the diversity of
    the rest.

    Args:
        beta: β, more than 0.
        h: "linear" weighs every word alike, h = 1; "logsigmoid" by σ(0.01·(z_v − z_y)).
    """

    beta: float = 0.7
    h: Literal["linear", "logsigmoid"] = "linear"

    formula = "Σ_v q_v·h_v, and −q_v·h_v on each word, q = softmax(z/β)"
    source = Source(
        "Li et al.",
        "Preserving Diversity in Supervised Fine-Tuning of Large Language Models",
        "2408.16673",
    )

    def __post_init__(self) -> None:
        expect(0.0 < self.beta < math.inf, "GEM.beta", self.beta, "a number above 0")
        expect(self.h in ("linear", "logsigmoid"), "GEM.h", self.h, '"linear" or "logsigmoid"')

    def targets(self, tokens: TokenStats, logp: Tensor, ref_logp: Tensor | None) -> Tensor:
        q = (logp / self.beta).softmax(1)
        if self.h == "logsigmoid":
            q = q * torch.sigmoid(0.01 * (logp - tokens.logp[:, None]))
        return (-q).scatter_add_(1, tokens.target[:, None], q.sum(1, keepdim=True))


@dataclass(frozen=True)
class GIFT(TokenTarget):
    """The cross-entropy to softmax(log ref + β·onehot(y)): the initial model, tilted to the given word.

    Zhao et al., "GIFT: Reconciling Post-Training Objectives via Finite-Temperature Gibbs Initialization",
    arXiv 2601.09233.

    Args:
        beta: β, in nats, by how much the given word is raised.
    """

    beta: float = 20.0

    needs = frozenset({REF_DISTRIBUTION})
    monitor = DESCENDS_OBJECTIVE
    formula = "q = softmax(log ref + β·onehot(y))"
    source = Source(
        "Zhao et al.",
        "GIFT: Reconciling Post-Training Objectives via Finite-Temperature Gibbs Initialization",
        "2601.09233",
    )

    def __post_init__(self) -> None:
        expect(0.0 <= self.beta < math.inf, "GIFT.beta", self.beta, "a number of 0 or more")

    def targets(self, tokens: TokenStats, logp: Tensor, ref_logp: Tensor | None) -> Tensor:
        assert ref_logp is not None  # named in `needs`
        tilt = torch.full_like(ref_logp[:, :1], self.beta)
        return ref_logp.scatter_add(1, tokens.target[:, None], tilt).softmax(1)


@dataclass(frozen=True)
class LabelSmoothing(TokenTarget):
    """The cross-entropy to (1 − ε)·onehot(y) + ε/V.

    Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", arXiv 1512.00567, section 7.

    Args:
        smoothing: ε, from 0 to less than 1; 0 is SFT.
    """

    smoothing: float = 0.1

    monitor = DESCENDS_OBJECTIVE
    formula = "1 − ε, and ε/V on each word"
    source = Source(
        "Szegedy et al.", "Rethinking the Inception Architecture for Computer Vision", "1512.00567", "section 7"
    )

    def __post_init__(self) -> None:
        expect(
            0.0 <= self.smoothing < 1.0, "LabelSmoothing.smoothing", self.smoothing, "a number from 0 to less than 1"
        )

    def weights(self, tokens: TokenStats) -> Tensor:
        return torch.full_like(tokens.logp, 1.0 - self.smoothing)

    def targets(self, tokens: TokenStats, logp: Tensor, ref_logp: Tensor | None) -> Tensor:
        return torch.full_like(logp, self.smoothing / logp.shape[1])


@dataclass(frozen=True)
class EntropyBonus(Modifier):
    """Any weighting, and −strength·H(π) in the loss, whose gradient by the logits is strength·π_v·(log π_v + H).

    As reinforcement learning has it since Williams and Peng, 1991; Mnih et al., "Asynchronous Methods for Deep
    Reinforcement Learning", arXiv 1602.01783. The logged objective has another value in the place of −strength·H, with
    the same gradient.

    Args:
        of: the weighting that gets the bonus.
        strength: c, 0 or more, for more entropy; a negative one makes the model surer.
    """

    strength: float = 0.01

    vocabulary: ClassVar[bool] = True
    formula = "of, and −c·H over the vocabulary"
    source = Source(
        "Mnih et al.",
        "Asynchronous Methods for Deep Reinforcement Learning",
        "1602.01783",
        note="for reinforcement learning; the idea is of Williams and Peng, 1991",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(math.isfinite(self.strength), "EntropyBonus.strength", self.strength, "a finite number")

    def weights(self, tokens: TokenStats) -> Tensor:
        return unit_weights(self.of, tokens)

    def targets(self, tokens: TokenStats, logp: Tensor, ref_logp: Tensor | None) -> Tensor:
        p = logp.exp()
        surprise = torch.special.entr(p)  # −p·log p, 0 at p = 0
        bonus: Tensor = self.strength * (surprise - p * surprise.sum(1, keepdim=True))
        inner = self.of.targets(tokens, logp, ref_logp)
        return bonus if inner is None else bonus + inner
