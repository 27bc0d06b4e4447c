"""Sums over tokens that add up over micro-batches and ranks, and the means that are logged from them."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric

from dft_lightning.normalizer import at_least_something

if TYPE_CHECKING:
    from dft_lightning.weighting import TokenStats

_NAMES = ("objective", "units", "nll", "tokens", "weight", "weight_squared", "p", "top1")


def token_sums(loss: Tensor, units: int | Tensor, tokens: "TokenStats") -> Tensor:
    """Sums of one micro-batch, (8,) in float64, in the order of `_NAMES`.

    Args:
        loss: the micro-batch's loss, a sum.
        units: what it adds to the divisor.
        tokens: its supervised tokens, with `weight`.
    """
    weight = tokens.need("weight").double()
    right = (tokens.rank == 0).sum() if tokens.rank is not None else torch.zeros_like(loss)
    on_host = [len(tokens), 0 if isinstance(units, Tensor) else units]
    known = torch.tensor(on_host, dtype=torch.float64).to(loss.device, non_blocking=True)
    values = [
        loss.detach(),
        units if isinstance(units, Tensor) else known[1],
        -tokens.logp.sum(dtype=torch.float64),
        known[0],
        weight.sum(),
        weight.square().sum(),
        tokens.p.sum(dtype=torch.float64),
        right,
    ]
    return torch.stack([value.to(torch.float64) for value in values])


def token_means(sums: Tensor) -> dict[str, Tensor]:
    """What is logged, from sums over any number of micro-batches and ranks; zeros where there was no token.

    `effective_sample_size` is (Σw)²/(n·Σw²): an equally weighted sample of that share of the tokens would have the same
    variance. It is 1 for uniform weights.
    """
    sum_of = dict(zip(_NAMES, sums, strict=True))
    count = sum_of["tokens"].clamp(min=1)
    return {
        "objective": sum_of["objective"] / at_least_something(sum_of["units"]),
        "nll": sum_of["nll"] / count,
        "p_mean": sum_of["p"] / count,
        "top1": sum_of["top1"] / count,
        "weight_mean": sum_of["weight"] / count,
        "effective_sample_size": sum_of["weight"] ** 2 / (count * sum_of["weight_squared"]).clamp(min=1e-300),
    }


def mean_names() -> list[str]:
    """Names of the means that are logged."""
    return list(token_means(torch.zeros(len(_NAMES), dtype=torch.float64)))


def units_of(sums: Tensor) -> Tensor:
    """The divisor of the optimizer step."""
    return sums[_NAMES.index("units")]


def nothing_weighs(sums: Tensor) -> bool:
    """Whether there are tokens, and all their weights are 0; sums on the host."""
    sum_of = dict(zip(_NAMES, sums.tolist(), strict=True))
    return bool(sum_of["tokens"] > 0 and sum_of["weight_squared"] == 0.0)


class TokenMeans(Metric):
    """Token-weighted means over all rows of a validation set and all ranks."""

    full_state_update = False
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(len(_NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    def update(self, sums: Tensor) -> None:
        """Add a micro-batch's `token_sums`."""
        self.sums = self.sums + sums

    def compute(self) -> dict[str, Tensor]:
        """`token_means` of all of them."""
        return token_means(self.sums)
