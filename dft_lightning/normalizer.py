"""The one place where a loss is normalised.

A step's loss is a sum with a factor n_t a token; its gradient is divided once, by one number of the whole optimizer
step (all micro-batches, all ranks), before clipping. So micro-batch size, accumulation and ranks change nothing but
rounding.
"""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dft_lightning.data.batch import Batch
    from dft_lightning.weighting.base import Divisor

Normalize = Literal["tokens", "sequences", "micro_batch"]
"""By what a step's loss is divided.

"tokens": mean over the step's supervised tokens. "sequences": mean over its sequences of each one's mean.
"micro_batch": mean over micro-batches of each one's mean, as in the released code of the DFT paper, except that
micro-batches are averaged, where that code sums them; tokens in small micro-batches then weigh more, so the result
depends on the micro-batch size.
"""


def token_factor(normalize: Normalize, batch: "Batch") -> Tensor | None:
    """n_t (N,) for the supervised tokens of a micro-batch, float64; None where it is 1."""
    if normalize == "tokens":
        return None
    place = batch.sequence.device
    if normalize == "micro_batch":
        return torch.full(batch.sequence.shape, 1.0 / max(sum(batch.counts), 1), dtype=torch.float64, device=place)
    each = torch.tensor(batch.counts, dtype=torch.float64).clamp(min=1).to(place, non_blocking=True)
    return 1.0 / each[batch.sequence]


def units(normalize: Normalize, batch: "Batch", divisor: "Divisor", weight: Tensor) -> int | Tensor:
    """How many units a micro-batch adds to the divisor: its tokens, its sequences that have any, or itself.

    Where the weighting has a divisor of its own, tokens count by their weight, or only if it is not zero: Σ n_t·w_t or
    Σ n_t·1[w_t ≠ 0], (), in place of Σ n_t.

    Args:
        weight: (N,) of the micro-batch's tokens.
    """
    if divisor != "tokens":
        factor, counted = token_factor(normalize, batch), (weight if divisor == "weights" else weight != 0.0).double()
        return counted.sum() if factor is None else (counted * factor).sum()
    with_tokens = sum(count > 0 for count in batch.counts)
    return {"tokens": sum(batch.counts), "sequences": with_tokens, "micro_batch": min(with_tokens, 1)}[normalize]


def at_least_something(units: Tensor) -> Tensor:
    """The divisor, or infinity where it is not above 0: nothing was counted, and the gradient becomes zero."""
    return torch.where(units > 0.0, units, torch.inf)


def scale_gradients(gradients: list[Tensor], factor: Tensor) -> None:
    """Multiply the gradients by a scalar that stays on the device."""
    if gradients:
        wide = torch.promote_types(gradients[0].dtype, torch.float32)  # the factor is not rounded to bfloat16
        torch._foreach_mul_(gradients, factor.to(wide))
