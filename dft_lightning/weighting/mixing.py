"""Weightings that are mixed, by shares that may change over training.

w is the mixture's weight, v(…) and v' those of its parts; a target over the vocabulary is mixed as the weights are.
Shapes: N supervised tokens, R rows of a chunk, V vocabulary.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from dft_lightning.weighting.base import TokenStats, TokenWeighting, checked_targets
from dft_lightning.weighting.composition import Modifier, unit_weights
from dft_lightning.weighting.likelihood import Uniform


@dataclass(frozen=True)
class Blend(Modifier):
    """A sum of weightings whose shares may change over training."""

    @abstractmethod
    def blend(self, progress: float) -> list[tuple[float, TokenWeighting]]:
        """The factor of each part at a share of training done."""

    def weights(self, tokens: TokenStats) -> Tensor:
        present = [(factor, part) for factor, part in self.blend(tokens.progress) if factor]
        return sum((factor * unit_weights(part, tokens) for factor, part in present), torch.zeros_like(tokens.logp))

    def targets(self, tokens: TokenStats, logp: Tensor, ref_logp: Tensor | None) -> Tensor | None:
        if not self.vocabulary:
            return None
        present = [(factor, part) for factor, part in self.blend(tokens.progress) if factor and part.vocabulary]
        parts = (factor * checked_targets(part, tokens, logp, ref_logp) for factor, part in present)
        return sum(parts, torch.zeros_like(logp))


@dataclass(frozen=True)
class Mixed(Blend):
    """w = (1 − s)·v + s·v', with a share s that may change over training.

    s goes linearly from `share` to `final_share` over the first `until` of the training.

    Args:
        of: the main weighting, v.
        other: what it is mixed with, v'; null for Uniform, that is cross-entropy.
        share: s at the start.
        final_share: s at the end; null for no change.
        until: share of the training after which s stays as it is.
    """

    other: TokenWeighting | None = None
    share: float = 0.1
    final_share: float | None = None
    until: float = 1.0

    formula: ClassVar[str] = "(1 − s)·v + s·v', s from share to final_share"

    def __post_init__(self) -> None:
        object.__setattr__(self, "other", Uniform() if self.other is None else self.other)
        super().__post_init__()
        _refuse_shares("Mixed", share=self.share, final_share=self.final_share, until=self.until)
        if self.until == 0.0:
            raise ValueError("Mixed.until is 0; expected more than 0, or leave final_share out")

    @property
    def parts(self) -> tuple[TokenWeighting, ...]:
        return self.of, cast(TokenWeighting, self.other)

    def blend(self, progress: float) -> list[tuple[float, TokenWeighting]]:
        final = self.share if self.final_share is None else self.final_share
        share = self.share + (final - self.share) * min(progress / self.until, 1.0)
        return list(zip((1.0 - share, share), self.parts, strict=True))


@dataclass(frozen=True)
class WarmUp(Blend):
    """w = v' while less than `share` of the training is done, then v.

    Args:
        of: the weighting that is warmed up to, v.
        start: the weighting of the warm-up, v'; null for Uniform, that is SFT.
        share: share of the training that the warm-up takes.
        ramp: go over from one to the other linearly during the warm-up, in place of at once at its end.
    """

    start: TokenWeighting | None = None
    share: float = 0.1
    ramp: bool = False

    formula: ClassVar[str] = "v' during the first share of training, then v"

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", Uniform() if self.start is None else self.start)
        super().__post_init__()
        _refuse_shares("WarmUp", share=self.share)

    @property
    def parts(self) -> tuple[TokenWeighting, ...]:
        return self.of, cast(TokenWeighting, self.start)

    def blend(self, progress: float) -> list[tuple[float, TokenWeighting]]:
        over = progress >= self.share
        done = 1.0 if over else progress / self.share if self.ramp else 0.0
        return list(zip((done, 1.0 - done), self.parts, strict=True))


def _refuse_shares(name: str, **values: float | None) -> None:
    """Refuse a value that is not a share, from 0 to 1."""
    for key, value in values.items():
        if value is not None and not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}.{key} is {value}; expected a share from 0 to 1")
