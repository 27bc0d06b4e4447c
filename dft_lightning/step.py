"""One optimizer step as it is put together from micro-batches: normalised once, clipped, skipped if it is no use."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from dft_lightning.metrics import nothing_weighs, token_means, token_sums, units_of
from dft_lightning.nonfinite import SkippedSteps
from dft_lightning.normalizer import Normalize, at_least_something, scale_gradients, units
from dft_lightning.sharding.tensors import common_norm, parts_of_gradients

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from dft_lightning.data.batch import Batch
    from dft_lightning.weighting import TokenStats
    from dft_lightning.weighting.base import Divisor


class StepInTheMaking:
    """Sums over a step's micro-batches, and what is done to its gradient.

    Args:
        normalize: by what the step is divided.
        divisor: that of the weighting.
        max_skipped: so many steps in a row without a finite loss and gradient are too many.
    """

    def __init__(self, normalize: Normalize, divisor: "Divisor", max_skipped: int) -> None:
        self.normalize, self.divisor, self.skipped = normalize, divisor, SkippedSteps(max_skipped)
        self._sums: Tensor | None = None
        self._told_of_nothing = False
        self._norm = torch.zeros(())
        self._terms: dict[str, Tensor] = {}
        self.wishes: dict[str, Callable[[], bool]] = {}
        """Asked on each rank at each step, by name; what any rank wishes is in `wished` on all of them."""
        self.wished: frozenset[str] = frozenset()

    def add(
        self, loss: Tensor, batch: "Batch", tokens: "TokenStats", terms: Mapping[str, Tensor] | None = None
    ) -> None:
        """Count a micro-batch.

        Args:
            terms: by name, what it adds to further terms of the loss, (); they are logged as they are.
        """
        for name, value in (terms or {}).items():
            self._terms[name] = value + self._terms.get(name, 0.0)
        self.skipped.see(batch, tokens)
        sums = token_sums(loss, units(self.normalize, batch, self.divisor, tokens.need("weight")), tokens)
        self._sums = sums if self._sums is None else self._sums + sums

    def normalise(self, trainer: "pl.Trainer", parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradient by the whole step, of all ranks.

        Lightning has divided each loss by the accumulation and averages gradients over ranks; both are undone here.
        """
        assert self._sums is not None
        wishes = torch.tensor([float(wish()) for wish in self.wishes.values()], dtype=self._sums.dtype)
        terms = [value[None].to(self._sums) for value in self._terms.values()]
        mine = torch.cat([self._sums, *terms, wishes.to(self._sums.device, non_blocking=True)])
        together = cast(Tensor, trainer.strategy.reduce(mine, reduce_op="sum"))
        places = [len(self._sums), len(self._sums) + len(terms)]
        self._sums, self._summed_terms, self._wishes = together.tensor_split(places)
        factor = trainer.world_size * trainer.accumulate_grad_batches / at_least_something(units_of(self._sums))
        scale_gradients(parts_of_gradients(parameters), factor)

    def clip(
        self, trainer: "pl.Trainer", parameters: Iterable[nn.Parameter], value: float | None, algorithm: str | None
    ) -> None:
        """Clip the normalised gradient; take it away if the step cannot be used.

        An optimizer leaves a parameter without a gradient, and its own state of it, as they are. Here the host waits
        for the device, once a step: whether there is a step at all is decided on the host, and everything that is
        logged of it comes along.
        """
        assert self._sums is not None
        given = [parameter for parameter in parameters if parameter.grad is not None]
        self._norm = common_norm([cast(Tensor, parameter.grad) for parameter in given])
        if value:
            _clip(parts_of_gradients(given), value, self._norm if algorithm in (None, "norm") else None)
        facts = [self._sums, self._summed_terms, self._wishes, self._norm[None].to(self._sums)]
        self._sums, self._summed_terms, wishes, self._norm = _together(facts)
        self.wished = frozenset(name for name, wish in zip(self.wishes, wishes.tolist(), strict=True) if wish)
        loss, norm = float(token_means(self._sums)["objective"]), float(self._norm)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not self._told_of_nothing and nothing_weighs(self._sums):
            self._told_of_nothing = True
            rank_zero_warn(f"all weights of step {trainer.global_step + 1} are 0: nothing is learnt from it")
        self.skipped.judge(finite, trainer, {} if finite else {"norm": norm, "loss": loss})
        if not finite:
            for parameter in given:
                parameter.grad = None

    def close(self, optimizer: Any) -> dict[str, Tensor]:
        """What there is to log of the step; the next one begins."""
        assert self._sums is not None
        values = {name: value for name, value in token_means(self._sums).items() if name != "top1"}
        values["lr"] = torch.tensor(float(optimizer.param_groups[0]["lr"]), dtype=torch.float64)
        values["grad_norm"] = self._norm[0]
        values |= dict(zip(self._terms, self._summed_terms, strict=True))
        if self.skipped.this_one:
            values = {name: value for name, value in values.items() if bool(torch.isfinite(value))}
        self._sums, self._terms = None, {}
        return values | {"skipped_steps": torch.tensor(float(self.skipped.total))}


def _together(parts: list[Tensor]) -> Sequence[Tensor]:
    """The same tensors (…,) on the host, by one copy."""
    return torch.split_with_sizes(torch.cat(parts).cpu(), [len(part) for part in parts])


def _clip(gradients: list[Tensor], limit: float, norm: Tensor | None) -> None:
    """Scale gradients so that their norm, which is known, is at most the limit; without one limit each entry."""
    if not gradients:
        return
    if norm is None:
        torch._foreach_clamp_min_(gradients, -limit)
        torch._foreach_clamp_max_(gradients, limit)
    else:
        torch._foreach_mul_(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))
