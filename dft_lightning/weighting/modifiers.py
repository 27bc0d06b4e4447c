"""Weightings around another one: bounds, powers, exempted tokens, weights from the data, mean weight 1.

In the formulas, w is the weight that the modifier gives and v that of the weighting in it. Where that has targets over
the vocabulary, what is done to its weight is done to them, too, or the modifier refuses it. They nest to any depth.
Shapes: N supervised tokens, R rows of a chunk, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dft_lightning.weighting.base import Divisor, Scope, TokenStats, checked_targets, checked_weights
from dft_lightning.weighting.composition import Modifier, unit_weights


@dataclass(frozen=True)
class Bounded(Modifier):
    """w = clamp(v, low, high): no token is ignored, and none outweighs the others.

    Args:
        of: the weighting that is bounded.
        low: smallest weight a token can have.
        high: largest weight a token can have; null for none.
    """

    low: float = 0.0
    high: float | None = None

    formula: ClassVar[str] = "clamp(v, low, high)"
    linear: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -math.inf < self.low <= (math.inf if self.high is None else self.high):
            raise ValueError(f"Bounded.low is {self.low} and high {self.high}; expected low <= high")

    def weights(self, tokens: TokenStats) -> Tensor:
        return unit_weights(self.of, tokens).clamp(self.low, self.high)


@dataclass(frozen=True)
class Raised(Modifier):
    """w = v^(power / temperature): sharper than v above 1, flatter below, 1 for every token at 0.

    A negative weight has no power. One at the start ends the run; one that turns up later does so on the CPU, while on
    a GPU, which would have to be waited for, its step is not finite, and left out as such steps are.

    Args:
        of: the weighting that is raised to a power.
        power: the power, 0 or more.
        temperature: what the power is divided by, more than 0.
    """

    power: float = 1.0
    temperature: float = 1.0

    formula: ClassVar[str] = "v^(power / temperature)"
    linear: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.power < math.inf:
            raise ValueError(f"Raised.power is {self.power}; expected 0 or more")
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"Raised.temperature is {self.temperature}; expected more than 0")

    def weights(self, tokens: TokenStats) -> Tensor:
        weights = unit_weights(self.of, tokens)
        negative = weights < 0
        if weights.device.type == "cpu" and negative.any():
            worst, of = weights.min().item(), type(self.of).__name__
            raise ValueError(f"Raised got a weight of {worst:g} from {of}; expected 0 or more: use Bounded({of}(…), 0)")
        return weights.pow(self.power / self.temperature).masked_fill(negative, math.nan)


@dataclass(frozen=True)
class Exempt(Modifier):
    """w = `weight` for the tokens that are exempt, v for all others.

    So a stop token to which the base model gives next to no probability is learnt under DFT, too.

    Args:
        of: the weighting of all other tokens.
        stop: exempt the token that ends an assistant turn.
        token_ids: exempt these ids, wherever they stand.
        weight: of the tokens that are exempt.
    """

    stop: bool = True
    token_ids: tuple[int, ...] = ()
    weight: float = 1.0

    formula: ClassVar[str] = "weight if exempt, else v"

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", tuple(self.token_ids))
        super().__post_init__()
        if not (self.stop or self.token_ids):
            raise ValueError("Exempt exempts nothing: set stop to true, or name token_ids")
        if wrong := [
            each for each in self.token_ids if isinstance(each, bool) or not isinstance(each, int) or each < 0
        ]:
            raise ValueError(f"Exempt.token_ids has {wrong}; expected ids of tokens, 0 or more")
        if not 0.0 <= self.weight < math.inf:
            raise ValueError(f"Exempt.weight is {self.weight}; expected 0 or more")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return super().needs | ({"stop"} if self.stop else set())

    def exempted(self, tokens: TokenStats) -> Tensor:
        """(N,) whether each token is exempt."""
        found = tokens.need("stop") if self.stop else torch.zeros_like(tokens.logp, dtype=torch.bool)
        for each in self.token_ids:  # not by `isin`, for which the ids would have to be brought to the device
            found = found | (tokens.target == each)
        return found

    def weights(self, tokens: TokenStats) -> Tensor:
        return unit_weights(self.of, tokens).masked_fill(self.exempted(tokens), self.weight)

    def targets(self, tokens: TokenStats, logp: Tensor, ref_logp: Tensor | None) -> Tensor | None:
        if not self.vocabulary:
            return None
        targets = checked_targets(self.of, tokens, logp, ref_logp)
        return targets.masked_fill(self.exempted(tokens)[:, None], 0.0)


@dataclass(frozen=True)
class DataWeighted(Modifier):
    """w = v·d, d the weight that the data give the token: of its row, its message, or its own.

    Args:
        of: the weighting that is multiplied.
    """

    formula: ClassVar[str] = "v·d, d from the data"
    own_needs: ClassVar[frozenset[str]] = frozenset({"data_weight"})

    def weights(self, tokens: TokenStats) -> Tensor:
        return unit_weights(self.of, tokens) * tokens.need("data_weight")

    def targets(self, tokens: TokenStats, logp: Tensor, ref_logp: Tensor | None) -> Tensor | None:
        if not self.vocabulary:
            return None
        return checked_targets(self.of, tokens, logp, ref_logp) * tokens.need("data_weight")[:, None]


@dataclass(frozen=True)
class Renormalized(Modifier):
    """w = v / mean of v over the optimizer step, all micro-batches and ranks: the mean weight is 1.

    The outermost one costs nothing, since the step's sum is divided by Σv in place of the number of tokens. Inside
    another modifier the weights of the whole step have to be known before the gradient pass, by one forward more.

    Args:
        of: the weighting whose mean becomes 1.
    """

    formula: ClassVar[str] = "v / mean of v over the step"
    linear: ClassVar[bool] = False

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        return self.of.scope

    @property
    def divisor(self) -> Divisor:  # type: ignore[override]
        return "weights"

    def weights(self, tokens: TokenStats) -> Tensor:
        return checked_weights(self.of, tokens)  # by what a part is divided makes no difference to the quotient
