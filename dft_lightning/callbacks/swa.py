"""Lightning's `StochasticWeightAveraging`, fitted to this module's epochs, checkpoints and schedule."""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch.optim.lr_scheduler import LambdaLR

from dft_lightning.averaging import Average, AverageAll
from dft_lightning.callbacks.averaging import Averaging, epochs_of, steps_of_an_epoch
from dft_lightning.errors import UserError

if TYPE_CHECKING:
    from dft_lightning.module import FineTuner

_OVER_STEPS = "EMAWeightAveraging (--trainer.callbacks+=EMAWeightAveraging), which averages over optimizer steps"


class EpochAveraging(Averaging, StochasticWeightAveraging):
    """`StochasticWeightAveraging`: at the ends of the last epochs, during which the learning rate goes to `swa_lrs`.

    Izmailov, Podoprikhin, Garipov, Vetrov, Wilson, "Averaging Weights Leads to Wider Optima and Better Generalization",
    arXiv 1803.05407, algorithm 1. Lightning averages at the starts of these epochs, which leaves the last epoch out.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As above, and change the schedule."""
        super().on_fit_start(trainer, pl_module)
        self._anneal(trainer, cast("FineTuner", pl_module))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing: Lightning would average and change the schedule here."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After each epoch from the first of the averaged ones on."""
        return epoch_idx is not None and epoch_idx >= self._first

    def rule(self) -> tuple[Average | None, AverageAll | None]:
        """`avg_fn`, which by default gives each epoch an equal share."""
        return self._avg_fn, None

    def options(self) -> dict[str, Any]:
        """Those that Lightning keeps under other names."""
        return {name: getattr(self, f"_{name}") for name in ("swa_lrs", "swa_epoch_start", "annealing_epochs")}

    def refuse_no_updates(self, trainer: pl.Trainer, module: "FineTuner") -> None:
        """An average of one epoch's weights is none."""
        epochs, start = epochs_of(trainer, module), self._swa_epoch_start
        self._first = max((start if isinstance(start, int) else int(epochs * start)) - 1, 0)
        if epochs - self._first < 2:
            raise UserError(
                f"StochasticWeightAveraging averages the weights at the ends of epochs, and with swa_epoch_start "
                f"{start} this run of {epochs} {'epoch' if epochs == 1 else 'epochs'} has "
                f"{max(epochs - self._first, 0)} of them to average: raise trainer.max_epochs, lower swa_epoch_start, "
                f"or take {_OVER_STEPS}"
            )

    def _anneal(self, trainer: pl.Trainer, module: "FineTuner") -> None:
        """Let the schedule's factors lead from the learning rate at the first averaged epoch to `swa_lrs`.

        The schedule stays a function of the step, so that resuming and settings of the new command work as ever.
        """
        scheduler: Any = trainer.lr_scheduler_configs[0].scheduler
        if not isinstance(scheduler, LambdaLR):
            raise UserError(
                f"StochasticWeightAveraging changes the learning rate by the step; model.lr_schedule is a "
                f"{type(scheduler).__name__}, expected one that is a function of the step, as constant or cosine is"
            )
        count, given = len(scheduler.lr_lambdas), self._swa_lrs
        targets = given if isinstance(given, list) else [given] * count
        if len(targets) != count:
            raise UserError(f"swa_lrs has {len(targets)} values; the optimizer has {count} groups of parameters")
        every = steps_of_an_epoch(trainer)
        scheduler.lr_lambdas = [
            partial(self._factor, scheduler, index, factor, target, every)
            for index, (factor, target) in enumerate(zip(scheduler.lr_lambdas, targets, strict=True))
        ]

    def _factor(
        self, scheduler: LambdaLR, index: int, before: Callable[[int], float], target: float, every: int, step: int
    ) -> float:
        """What the base learning rate is multiplied with at a step."""
        first = self._first * every
        if step < first:
            return before(step)
        base = scheduler.base_lrs[index]
        if not base > 0:
            raise UserError("StochasticWeightAveraging: model.optimizer's lr is 0; expected a positive number")
        share = min(((step - first) // every) / self._annealing_epochs, 1.0) if self._annealing_epochs else 1.0
        if self._annealing_strategy == "cos":
            share = (1 - math.cos(math.pi * share)) / 2
        return float(before(first) * (1 - share) + target / base * share)
