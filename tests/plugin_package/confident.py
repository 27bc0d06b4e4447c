"""A weighting of an installed package: `--model.weighting Confident`."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dft_lightning.weighting import TokenStats, TokenWeighting


@dataclass(frozen=True)
class Confident(TokenWeighting):
    """w = p if p is at least `threshold`, else 0: only what the model believes already.

    Args:
        threshold: smallest p that is learnt.
    """

    threshold: float = 0.5

    formula: ClassVar[str] = "p·1[p ≥ threshold]"

    def weights(self, tokens: TokenStats) -> Tensor:
        return tokens.p * (tokens.p >= self.threshold)
