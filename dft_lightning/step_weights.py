"""Weights of `step` scope: every token of an optimizer step, of all micro-batches and ranks, is looked at together.

One pass without gradient over the step's micro-batches gathers the statistics; the weighting is asked once, on the
union in an order that does not depend on how the step is cut up; the gradient pass then takes the weights as known.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dft_lightning.normalizer import token_factor
from dft_lightning.weighting import Uniform
from dft_lightning.weighting.base import TokenStats, TokenWeighting, checked_weights

if TYPE_CHECKING:
    from dft_lightning.data.batch import Batch
    from dft_lightning.router_loss import RouterLoss
    from dft_lightning.scoring import WeightedModule


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


@torch.no_grad()
def unweighted(
    module: "WeightedModule",
    batch: "Batch",
    wanted: frozenset[str] = frozenset(),
    router: "RouterLoss | None" = None,
) -> TokenStats:
    """What a weighting of step scope needs to know of a micro-batch, with rows in place of sequences."""
    _, tokens = module._network(
        batch,
        Uniform(),
        progress=module.progress,
        wanted=wanted | module.weighting.needs,
        ref_logp=module._ref_logp(batch),
        old_logp=module._old_logp(batch),
        router=router,
        **module._head_options,
    )
    return by_row(replace(tokens, weight=None, factor=token_factor(module.normalize, batch)), batch)


def weighed(
    module: "WeightedModule", batch: "Batch", tokens: TokenStats, weight: Tensor, wanted: frozenset[str]
) -> tuple[Tensor, TokenStats]:
    """Loss and tokens of a batch whose weights are known by now; targets over the vocabulary take another pass."""
    if module.weighting.vocabulary:
        loss, scored = module.score(batch, wanted, weight)
        return loss, by_row(scored, batch)
    factor = 1.0 if tokens.factor is None else tokens.factor
    return -(weight * tokens.logp * factor).sum(), replace(tokens, weight=weight)


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
