"""The one place where a loss is normalised.

A step's loss is a sum with a factor n_t a token; its gradient is divided once, by one number of the whole optimizer
step (all micro-batches, all ranks), before clipping. So micro-batch size, accumulation and ranks change nothing but
rounding.
"""

from typing import Literal

import torch
from torch import Tensor, nn

Normalize = Literal["tokens", "sequences", "micro_batch"]
"""By what a step's loss is divided.

"tokens": mean over the step's supervised tokens. "sequences": mean over its sequences of each one's mean.
"micro_batch": mean over micro-batches of each one's mean, as in the released code of the DFT paper, except that
micro-batches are averaged, where that code sums them; tokens in small micro-batches then weigh more, so the result
depends on the micro-batch size.
"""


def token_factor(normalize: Normalize, sequence: Tensor) -> Tensor | None:
    """n_t (N,) for tokens of the sequences `sequence` (N,) of one micro-batch, float64; None where it is 1."""
    if normalize == "tokens":
        return None
    if normalize == "micro_batch":
        return torch.full(sequence.shape, 1.0 / max(len(sequence), 1), dtype=torch.float64, device=sequence.device)
    return 1.0 / torch.bincount(sequence).to(torch.float64)[sequence]


def units(normalize: Normalize, sequence: Tensor) -> Tensor:
    """How many units a micro-batch adds to the divisor, (), float64: its tokens, its sequences, or itself."""
    if normalize == "tokens":
        count = torch.tensor(len(sequence), device=sequence.device)
    elif normalize == "sequences":
        count = torch.bincount(sequence).count_nonzero()
    else:
        count = torch.tensor(min(len(sequence), 1), device=sequence.device)
    return count.to(torch.float64)


def scale_gradients(parameters: list[nn.Parameter], factor: Tensor) -> None:
    """Multiply the gradients by a scalar that stays on the device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        wide = torch.promote_types(gradients[0].dtype, torch.float32)  # the factor is not rounded to bfloat16
        torch._foreach_mul_(gradients, factor.to(wide))
