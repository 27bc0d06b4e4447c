"""What weightings that are made of others have in common: their needs, their scope, and how parts are put together.

Shapes: N supervised tokens.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dft_lightning.weighting.base import Divisor, Scope, TokenStats, TokenWeighting, checked_weights

_WIDENING: tuple[Scope, ...] = ("token", "sequence", "step")


def unit_weights(part: TokenWeighting, tokens: TokenStats) -> Tensor:
    """A part's weights (N,) on the footing on which weightings can be put together: to be divided by all tokens.

    A part that is divided by the sum of its weights, or by the tokens it selects, has mean weight 1, over all tokens
    or over those selected: its weights are multiplied by N over that divisor, of the whole optimizer step. Where that
    is not above 0, they are 0.
    """
    weights = checked_weights(part, tokens)
    if part.divisor == "tokens":
        return weights
    units = weights.sum() if part.divisor == "weights" else (weights != 0).sum()
    return torch.where(units > 0, weights * len(tokens) / units, 0.0)


@dataclass(frozen=True)
class Modifier(TokenWeighting):
    """A weighting around another one, `of`; what it needs, and how far it looks, follows from its parts.

    Every part is first brought to the footing of `unit_weights`, so that a modifier, whatever is inside, is divided by
    the number of tokens.
    """

    of: TokenWeighting

    linear: ClassVar[bool] = True
    """Whether it makes sense of a target over the vocabulary: what is done to w can be done to q."""

    own_needs: ClassVar[frozenset[str]] = frozenset()
    """What it needs beside its parts."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        for part in self.parts:
            if not isinstance(part, TokenWeighting):
                raise ValueError(f"{name} is made of {part!r}; expected a weighting, as in {name}(DFT())")
            inner = type(part).__name__
            if part.vocabulary and not self.linear:
                raise ValueError(
                    f"{name} is a function of one weight a token, but {inner} has a weight for every word of the "
                    f"vocabulary: put {name} around a part without one, as in Mixed({inner}(…), {name}(DFT()))"
                )
            if part.vocabulary and part.divisor != "tokens":
                raise ValueError(
                    f"{inner} is divided by its {part.divisor} over the whole step, which its targets over the "
                    f"vocabulary cannot know inside {name}: make it the outermost, or leave that out"
                )

    @property
    def parts(self) -> tuple[TokenWeighting, ...]:
        """The weightings that it is made of; the first is the main one."""
        return (self.of,)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # as in ImportanceWeighted.scope
        return self.own_needs.union(*(part.needs for part in self.parts))

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        scopes: list[Scope] = ["step" if part.divisor != "tokens" else part.scope for part in self.parts]
        return max(scopes, key=_WIDENING.index)

    @property
    def divisor(self) -> Divisor:  # type: ignore[override]
        return "tokens"

    @property
    def vocabulary(self) -> bool:  # type: ignore[override]
        return any(part.vocabulary for part in self.parts)

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:  # type: ignore[override]
        return self.of.monitor
