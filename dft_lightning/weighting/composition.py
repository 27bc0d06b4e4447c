"""What weightings that are made of others have in common: their needs, their scope, and how parts are put together.

Shapes: N supervised tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dft_lightning.weighting.base import Divisor, Scope, TokenStats, TokenWeighting, checked_weights

_WIDENING: tuple[Scope, ...] = ("token", "sequence", "step")


def nested(weighting: TokenWeighting) -> Iterator[TokenWeighting]:
    """The weighting, and all that it is made of."""
    yield weighting
    for part in held(weighting):
        yield from nested(part)


def held(weighting: TokenWeighting) -> list[TokenWeighting]:
    """The weightings in its fields."""
    values: list[Any] = [getattr(weighting, each.name) for each in fields(weighting)] if is_dataclass(weighting) else []
    flat = [part for value in values for part in (value if isinstance(value, tuple | list) else [value])]
    return [part for part in flat if isinstance(part, TokenWeighting)]


def unit_weights(part: TokenWeighting, tokens: TokenStats) -> Tensor:
    """A part's weights (N,) on the footing on which weightings can be put together: to be divided by all tokens.

    A part that is divided by the sum of its weights, or by the tokens it selects, has mean weight 1, over all tokens
    or over those selected: its weights are multiplied by Σn over that divisor, Σn·w or Σn·1[w ≠ 0], of the whole
    optimizer step. Where that is not above 0, they are 0.
    """
    weights = checked_weights(part, tokens)
    if part.divisor == "tokens":
        return weights
    factor = torch.ones_like(weights) if tokens.factor is None else tokens.factor.to(weights)
    units = (factor * (weights if part.divisor == "weights" else (weights != 0))).sum()
    return torch.where(units > 0, weights * factor.sum() / units, 0.0)


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
