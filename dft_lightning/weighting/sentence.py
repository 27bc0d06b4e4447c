"""Weightings that look at whole responses.

Shapes: N tokens, S sequences.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dft_lightning.weighting.base import Scope, Source, TokenStats, TokenWeighting
from dft_lightning.weighting.fields import expect
from dft_lightning.weighting.likelihood import CLIMBS_P


def sequence_means(tokens: TokenStats, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of `values` (N,) of each sequence (S,), and which of them each token belongs to (N,)."""
    ids, which = torch.unique(tokens.sequence, return_inverse=True)
    sums = values.new_zeros(len(ids)).index_add_(0, which, values)
    return sums / torch.bincount(which), which


@dataclass(frozen=True)
class SentenceDFT(TokenWeighting):
    """w = (Πp)^(1/T), or Πp, over the T tokens of the response: DFT by the sentence.

    Wu et al., "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification",
    arXiv 2508.05629, version 3, table 5, where both do much worse than DFT by the token. The product is the importance
    weight that the paper's derivation begins with; it is next to nothing for any response of more than some tokens.

    Args:
        mean: "geometric" for (Πp)^(1/T), "product" for Πp.
    """

    mean: Literal["geometric", "product"] = "geometric"

    scope: ClassVar[Scope] = "sequence"
    monitor = CLIMBS_P
    formula = '(Πp)^(1/T) over the response; Πp for mean="product"'
    source = Source(
        "Wu et al.",
        "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification",
        "2508.05629",
        place="version 3, table 5",
    )

    def __post_init__(self) -> None:
        expect(self.mean in ("geometric", "product"), "SentenceDFT.mean", self.mean, '"geometric" or "product"')

    def weights(self, tokens: TokenStats) -> Tensor:
        over = tokens.sequence_mean if self.mean == "geometric" else tokens.sequence_sum
        return over(tokens.logp).exp()


@dataclass(frozen=True)
class CADFT(TokenWeighting):
    """w = p·exp(−beta·max(0, z)), z the z-score of the response's mean ℓ = −log p among those of the step.

    Zhou et al., "Compatibility-Aware Dynamic Fine-Tuning for Large Language Models", arXiv 2606.11206: DFT, which
    holds back unlikely tokens, and beside it unlikely responses. Known from another's implementation only. There the
    z-score is of the micro-batch; here it is of the whole optimizer step, so that micro-batches change nothing. The
    standard deviation is that of a sample (S − 1); a response alone has z = 0. The rewriting of responses that stay
    unlikely, the paper's other half, is no weighting.

    Args:
        beta: how much unlikely responses are held back, at least 0; 0 is DFT.
    """

    beta: float = 1.0

    scope: ClassVar[Scope] = "step"
    monitor = CLIMBS_P
    formula = "p·exp(−beta·max(0, z)), z: z-score of the response's mean −log p"
    source = Source(
        "Zhou et al.",
        "Compatibility-Aware Dynamic Fine-Tuning for Large Language Models",
        "2606.11206",
        note="z over the whole optimizer step, not the micro-batch; standard deviation of a sample",
        third=True,
    )

    def __post_init__(self) -> None:
        expect(0.0 <= self.beta < math.inf, "CADFT.beta", self.beta, "a number of at least 0")

    def weights(self, tokens: TokenStats) -> Tensor:
        mean, which = sequence_means(tokens, -tokens.logp)
        if len(mean) == 1:
            return tokens.p
        z = (mean - mean.mean()) / mean.std().clamp(min=1e-6)
        return tokens.p * (-self.beta * z.clamp(min=0)).exp()[which]
