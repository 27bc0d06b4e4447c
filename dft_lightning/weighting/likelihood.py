"""Weightings that are functions of the target's probability p alone."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dft_lightning.weighting.base import TokenStats, TokenWeighting


@dataclass(frozen=True)
class Uniform(TokenWeighting):
    """w = 1: supervised fine-tuning, the plain negative log-likelihood."""

    def weights(self, tokens: TokenStats) -> Tensor:
        return torch.ones_like(tokens.logp)


@dataclass(frozen=True)
class DFT(TokenWeighting):
    """w = max(p, floor): Dynamic Fine-Tuning; with floor 0 its gradient is that of Σ(1 − p).

    Wu et al., "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification",
    arXiv 2508.05629, equation 9. The floor is from the authors' earlier code, who advise 0.1 where tokens get
    ignored, such as a stop token to which the base model gives next to no probability.

    Args:
        floor: smallest weight a token can have, in [0, 1]; 0 is the paper's objective.
    """

    floor: float = 0.0

    monitor: ClassVar[tuple[str, Literal["min", "max"]]] = ("val/p_mean", "max")

    def __post_init__(self) -> None:
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"DFT.floor is {self.floor}; expected a number from 0 to 1")

    def weights(self, tokens: TokenStats) -> Tensor:
        return tokens.p.clamp(min=self.floor)
