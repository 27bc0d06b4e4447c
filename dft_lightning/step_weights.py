"""Weights of `step` scope: every token of an optimizer step, of all micro-batches and ranks, is looked at together.

One pass without gradient over the step's micro-batches gathers the statistics; the weighting is asked once, on the
union in an order that does not depend on how the step is cut up; the gradient pass then takes the weights as known.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dft_lightning.weighting.base import TokenStats, TokenWeighting, checked_weights

if TYPE_CHECKING:
    from dft_lightning.data.batch import Batch


def by_row(tokens: TokenStats, batch: "Batch") -> TokenStats:
    """The same tokens, with `sequence` the index of the row in its data set: unique over micro-batches and ranks."""
    return replace(tokens, sequence=batch.row[batch.sequence])


def weigh_together(weighting: TokenWeighting, parts: Sequence[TokenStats], ranks: int = 1) -> list[Tensor]:
    """The weights of each part, (N_i,), from one call on all parts of all ranks.

    Args:
        parts: this rank's tokens, with `sequence` as in `by_row` and `position`.
        ranks: how many processes take part; all of them have to call this.
    """
    mine = TokenStats.concatenate(parts)
    whole, start = (mine, 0) if ranks == 1 else _gathered(mine)
    order = _order(whole)
    weights = torch.empty_like(whole.logp)
    weights[order] = checked_weights(weighting, whole[order])
    return list(torch.split(weights[start : start + len(mine)], [len(part) for part in parts]))


def _order(tokens: TokenStats) -> Tensor:
    """Indices that sort tokens by sequence and position."""
    by_position = torch.argsort(tokens.need("position"), stable=True)
    return by_position[torch.argsort(tokens.sequence[by_position], stable=True)]


def _gathered(tokens: TokenStats) -> tuple[TokenStats, int]:
    """The tokens of all ranks, which may have unequally many, in order of rank; and where this rank's begin."""
    from torchmetrics.utilities.distributed import gather_all_tensors

    each = {name: gather_all_tensors(value) for name, value in tokens.tensors().items()}
    joined: dict[str, Any] = {name: torch.cat(values) for name, values in each.items()}
    return replace(tokens, **joined), sum(map(len, each["logp"][: torch.distributed.get_rank()]))
