"""Lightning's `WeightAveraging` and `EMAWeightAveraging`, fitted to this module's steps and checkpoints."""

import math
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from dft_lightning.averaging import STATE, Average, AverageAll, Averages
from dft_lightning.errors import UserError
from dft_lightning.sharding import FSDP2Strategy

if TYPE_CHECKING:
    from dft_lightning.module import FineTuner


class Averaging(Callback):
    """Averages the trained weights during a fit; validation, `best.ckpt` and exports use the averages.

    The averages take part once per optimizer step, and not in steps that were skipped. Until the first update there are
    none, and everything uses the trained weights.
    """

    averages: Averages | None = None
    _loaded: dict[str, Any] | None = None
    _step, _epoch = 0, -1  # the last ones that the rule was asked about

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to update after an optimizer step, or after an epoch, both counted from 0."""
        raise NotImplementedError

    def rule(self) -> tuple[Average | None, AverageAll | None]:
        """How an average and the newest weights become the new average; None where each update has an equal share."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Further options to print."""
        return {}

    @property
    def device(self) -> torch.device | str | int | None:
        """Where averages are held; None for next to the weights."""
        return cast("torch.device | str | int | None", getattr(self, "_device", None))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """A fit begins without averages."""
        if stage == "fit":
            self.averages, self._loaded, self._step, self._epoch = None, None, 0, -1
            refuse_sharded(self, isinstance(trainer.strategy, FSDP2Strategy))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continue with a checkpoint's averages; one without them begins none before the next update."""
        self._loaded = checkpoint.get(STATE) if trainer.state.fn == "fit" else None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make room for the averages, and refuse a rule by which there would never be any."""
        module = cast("FineTuner", pl_module)
        self.refuse_no_updates(trainer, module)
        self.averages = Averages(module, self.device, *self.rule())
        if self._loaded is not None:
            self.averages.load(self._loaded)
            self._loaded = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After a resume: what was due at the checkpoint's step is done, but for an epoch that ended with that step.

        A checkpoint is written before the end of the epoch, and Lightning resumes after it.
        """
        self._step = max(self._step, trainer.global_step)
        ended, further = divmod(trainer.global_step, steps_of_an_epoch(trainer))
        if ended and not further:
            self._end_epoch(ended - 1)

    def refuse_no_updates(self, trainer: pl.Trainer, module: "FineTuner") -> None:
        """Refuse a rule that never updates in this run."""
        known = (StepAveraging.should_update, EMAWeightAveraging.should_update)
        steps, epochs = module.total_steps, epochs_of(trainer, module)
        if type(self).should_update not in known:  # a rule of the user's own may have a state
            return
        if any(self.should_update(step_idx=step) for step in range(steps)):
            return
        if not any(self.should_update(epoch_idx=epoch) for epoch in range(epochs)):
            raise UserError(
                f"{described(self)} never updates its averages in this run of {steps:,} optimizer steps and {epochs} "
                "epochs: lower update_starting_at_step (or update_starting_at_epoch), or leave the callback out"
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, which the last of its micro-batches ends; nothing where the step was skipped."""
        step = trainer.global_step
        if step <= self._step:
            return
        self._step = step  # each step is asked about once
        if not cast("FineTuner", pl_module).step.skipped.this_one and self.should_update(step_idx=step - 1):
            self._update()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After an epoch."""
        self._end_epoch(trainer.current_epoch)

    def _end_epoch(self, epoch: int) -> None:
        if epoch > self._epoch:
            self._epoch = epoch
            if self.should_update(epoch_idx=epoch):
                self._update()

    def _update(self) -> None:
        assert self.averages is not None
        self.averages.update()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate the averages. Not Lightning's later hook: a weighting of step scope scores at the end once more."""
        if self.averages is not None and trainer.state.fn == "fit":
            self.averages.swap_in()

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See `on_validation_start`."""

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See `on_validation_end`."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Continue with the trained weights."""
        if self.averages is not None:
            self.averages.swap_out()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """As at the end of a validation."""
        if self.averages is not None:
            self.averages.swap_out()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on the model is the averaged one."""
        assert self.averages is not None
        if self.averages.count == 0:
            rank_zero_warn(f"{described(self)} made no update: the model is the one trained last, not an average")
        self.averages.swap_in()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the memory back."""
        self.averages = self._loaded = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Nothing: the module does it (`keep_averages`), since this hook is not called for weights alone."""

    def state_dict(self) -> dict[str, Any]:
        """What the rule was asked about last; the averages themselves are in `averaging_state`."""
        return {"latest_update_step": self._step, "latest_update_epoch": self._epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        self._step, self._epoch = state_dict["latest_update_step"], state_dict["latest_update_epoch"]


class StepAveraging(Averaging, WeightAveraging):
    """`WeightAveraging` and `EMAWeightAveraging`: by default after each optimizer step."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """As Lightning has it."""
        return WeightAveraging.should_update(self, step_idx, epoch_idx)

    def rule(self) -> tuple[Average | None, AverageAll | None]:
        """What `AveragedModel` would be given."""
        known = {"avg_fn", "multi_avg_fn"}
        if unknown := self._kwargs.keys() - known:
            raise UserError(f"{self.state_key} has unknown options {sorted(unknown)}; expected some of {known}")
        return self._kwargs.get("avg_fn"), self._kwargs.get("multi_avg_fn")


def refuse_sharded(callback: Callback, sharded: bool) -> None:
    """Averages of a sharded model are not supported."""
    if sharded:
        raise UserError(
            f"{callback.state_key} does not average weights that trainer.strategy fsdp2 shards: set "
            "trainer.strategy ddp, or leave the callback out"
        )


def described(callback: Averaging) -> str:
    """The rule, with the share that the newest weights get at the second and the eleventh update."""
    given = {name: value for name, value in vars(callback).items() if not name.startswith("_") and name != "averages"}
    given |= callback.options()
    values = [f"{name}={value}" for name, value in sorted(given.items()) if isinstance(value, int | float | str | list)]
    shares = " and ".join(f"{share:.3g}" for share in dict.fromkeys(_shares(callback)))
    return f"{callback.state_key}({', '.join([*values, f'share of the newest weights {shares}'])})"


def _shares(callback: Averaging) -> list[float]:
    found = []
    for count in (1, 10):
        one = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(one.weight)
        averages = Averages(one, None, *callback.rule())
        nn.init.ones_(one.weight)
        averages.count = count
        averages.update()
        found.append(float(averages.weights["weight"]))
    return found


def steps_of_an_epoch(trainer: pl.Trainer) -> int:
    """Optimizer steps; the loaders are there by now."""
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)


def epochs_of(trainer: pl.Trainer, module: "FineTuner") -> int:
    """Epochs of the run, the last of which may be a part."""
    return math.ceil(module.total_steps / max(steps_of_an_epoch(trainer), 1))
