"""Weightings that are functions of the whole distribution, not of the target's probability alone."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dft_lightning.weighting.base import Scope, Source, TokenStats, TokenWeighting
from dft_lightning.weighting.fields import expect
from dft_lightning.weighting.likelihood import CLIMBS_P


@dataclass(frozen=True)
class EAFT(TokenWeighting):
    """w = (H20/divide_by)^alpha, H20 the entropy of the softmax over the 20 largest logits, in nats.

    Diao et al., "Entropy-Adaptive Fine-Tuning: Resolving Confident Conflicts to Mitigate Forgetting",
    arXiv 2601.02151: where the model is certain of something else than the data, it is left alone. One name, several
    objectives: the authors' code and LLaMA-Factory divide by 3.0 (about log 20), axolotl's first version does not
    divide, a later one divides by log 20; with alpha 1 that is a factor on the whole loss, as on the learning rate.

    Args:
        alpha: the exponent, at least 0; 0 is SFT.
        divide_by: 3.0 as in the authors' code; 1.0 and 2.9957 are axolotl's.
    """

    alpha: float = 1.0
    divide_by: float = 3.0

    needs = frozenset({"topk_entropy"})
    formula = "(H20/divide_by)^alpha, H20: entropy over the 20 largest logits"
    source = Source(
        "Diao et al.",
        "Entropy-Adaptive Fine-Tuning: Resolving Confident Conflicts to Mitigate Forgetting",
        "2601.02151",
        place="src/llamafactory/train/trainer_utils.py of LLaMA-Factory",
        note="divided by 3.0; for axolotl's first version divide_by=1, for its later one divide_by=2.9957 (log 20)",
    )

    def __post_init__(self) -> None:
        expect(0.0 <= self.alpha < math.inf, "EAFT.alpha", self.alpha, "a number of at least 0")
        expect(0.0 < self.divide_by < math.inf, "EAFT.divide_by", self.divide_by, "a number above 0")

    def weights(self, tokens: TokenStats) -> Tensor:
        return (tokens.need("topk_entropy").clamp(min=0) / self.divide_by) ** self.alpha


@dataclass(frozen=True)
class DEFT(TokenWeighting):
    """w = p^a·a/(a + 1e-6), a = Σ_v p_v²: like SFT where the model is uncertain, like DFT where it is certain.

    The gradient of (1 − p^a)/(a + 1e-6) with a detached. Wang et al., "Gradients Must Earn Their Influence: Unifying
    SFT with Generalized Entropic Objectives", arXiv 2602.11424. There is nothing to set.
    """

    needs = frozenset({"collision"})
    monitor = CLIMBS_P
    formula = "p^a·a/(a + 1e-6), a = Σp²"
    source = Source(
        "Wang et al.",
        "Gradients Must Earn Their Influence: Unifying SFT with Generalized Entropic Objectives",
        "2602.11424",
        place="DEFT in main_verl/trainer/fsdp_sft_trainer.py of luludus/DEFT",
        note="other implementations take p^a for the weight, which differs by less than 1e-6/a",
    )

    def weights(self, tokens: TokenStats) -> Tensor:
        a = tokens.need("collision")
        return (a * tokens.logp).exp() * (a / (a + 1e-6))


@dataclass(frozen=True)
class SRFT(TokenWeighting):
    """w = scale·exp(−H̄), H̄ the mean entropy over the response's tokens: less where the model is unsure.

    The supervised part of Fu et al., "SRFT: A Single-Stage Method with Supervised and Reinforcement Fine-Tuning for
    Reasoning", arXiv 2506.19767, from a reimplementation of it; its parts on sampled answers are no part of this.

    Args:
        scale: 0.5 as published, above 0.
    """

    scale: float = 0.5

    needs = frozenset({"entropy"})
    scope: ClassVar[Scope] = "sequence"
    formula = "scale·exp(−H̄), H̄: mean entropy over the response"
    source = Source(
        "Fu et al.",
        "SRFT: A Single-Stage Method with Supervised and Reinforcement Fine-Tuning for Reasoning",
        "2506.19767",
        note="the supervised part alone, read in a reimplementation",
    )

    def __post_init__(self) -> None:
        expect(0.0 < self.scale < math.inf, "SRFT.scale", self.scale, "a number above 0")

    def weights(self, tokens: TokenStats) -> Tensor:
        return self.scale * (-tokens.sequence_mean(tokens.need("entropy"))).exp()
