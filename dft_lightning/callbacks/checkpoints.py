"""`last.ckpt`, to continue from, and `best.ckpt`, by what the weighting truly descends."""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint

from dft_lightning.callbacks.preemption import LEAVE, leave
from dft_lightning.callbacks.throughput import not_training
from dft_lightning.checkpointing import RunCheckpoints
from dft_lightning.errors import UserError
from dft_lightning.sharding import FSDP2Strategy

if TYPE_CHECKING:
    from dft_lightning.module import FineTuner

#: Asked with each optimizer step, so that it takes no message of its own.
_WISH = "save the last state: it is time"


def checkpoint_folder(run_dir: str | Path) -> Path:
    """Where a run's checkpoints are."""
    return Path(run_dir) / "checkpoints"


class Checkpoints(Checkpoint):
    """Keeps the state of the run in `last.ckpt`, and the best validated one in `best.ckpt`.

    Each is written beside and renamed, so that one of that name is always whole. A run goes on from either form with
    any strategy, on any number of ranks.

    Args:
        every_n_steps: optimizer steps between two savings of the last state; the end of training is always saved.
        every_minutes: save the last state also when this much time has gone since it was saved.
        monitor: metric by which the best is chosen; by default the weighting's own: val/p_mean for DFT, val/nll
            otherwise. The weighted loss is never a good one: −p·log p is lowest where a model has collapsed.
        mode: "min" or "max", for a monitor of your own.
        save_best: whether to keep the best at all (it costs as much disk as the last).
        sharded: a folder to which each rank writes the part that it holds, in place of one file; for fsdp2. All ranks
            have to see the run's folder.
        asynchronous: only copy to the host's memory, and write while the training goes on.
        keep_previous: how many checkpoints before `last.ckpt` to keep, each at the cost of as much disk; a run whose
            `last.ckpt` is damaged resumes from the newest of them.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        every_minutes: float = 10.0,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_best: bool = True,
        sharded: bool = False,
        asynchronous: bool = False,
        keep_previous: int = 1,
    ) -> None:
        if every_n_steps < 1:
            raise UserError(f"checkpoints.every_n_steps is {every_n_steps}; expected 1 or more")
        if keep_previous < 0:
            raise UserError(f"checkpoints.keep_previous is {keep_previous}; expected 0 or more")
        self.every_minutes, self._saved_time = every_minutes, time.monotonic()
        self.every_n_steps, self.monitor, self.mode, self.save_best = every_n_steps, monitor, mode, save_best
        self._io = RunCheckpoints(sharded, asynchronous, keep_previous)
        self.best: float | None = None
        self._saved_at = 0
        self._due = self._now = self._stop = self._leaving = self._owes_validation = False
        self._validated_on: str | None = None
        self._metrics: dict[str, float] = {}  # of the last validation

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the weighting's monitor where none is set."""
        if self.monitor is None:
            self.monitor, self.mode = cast("FineTuner", pl_module).weighting.monitor
        self._due = self._stop = self._leaving = self._owes_validation = False
        if self._io.sharded and not isinstance(trainer.strategy, FSDP2Strategy):
            raise UserError(
                f"checkpoints.sharded is true, but under trainer.strategy {type(trainer.strategy).__name__} every rank "
                "holds the whole model: set trainer.strategy fsdp2, or checkpoints.sharded false"
            )
        trainer.strategy.checkpoint_io = self._io
        self._io.prepare(trainer.strategy, goes_on=stage == "fit")
        cast("FineTuner", pl_module).step.wishes[_WISH] = self._is_late
        rows = getattr(getattr(trainer, "datamodule", None), "val_rows", None)
        self._validated_on = None if rows is None else rows.fingerprint

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the last state, every so many steps and after the last; where a validation is due now, after that.

        Not in `on_train_end`: there Lightning counts the epoch as done, and a longer run would go on with the next one.
        """
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            if trainer.should_stop:  # by max_time, say: the optimizer step is finished first
                self._stop, trainer.should_stop = True, False
            return
        trainer.should_stop |= self._stop
        module = cast("FineTuner", pl_module)
        step, skipped, wished = trainer.global_step, module.step.skipped, module.step.wished
        if step == self._saved_at:
            return
        if skipped.too_many:
            self._save(trainer, "stopped")
            self._io.wait()
            trainer.strategy.barrier()  # the run ends with an error now, and whoever sees one may end the others
            return
        self._due |= step % self.every_n_steps == 0 or _WISH in wished  # of one rank's clock, and known to all of them
        self._leaving = LEAVE in wished and step < module.total_steps  # after the last one only the export is left
        last = _stops(trainer) or step == module.total_steps
        self._now = (self._due and not skipped.in_a_row) or last or self._leaving
        if last and not _validates_now(trainer):
            _validate_after_this_step(trainer)
        within = not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self._owes_validation = self._leaving and within and not last and _validates_now(trainer)
        if self._now and (self._owes_validation or not _validates_now(trainer)):
            self._save(trainer, "last")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make up for the validation that a run that was asked to leave had no time for.

        Where Lightning goes on after a step with a validation, it counts that as done: then, instead, it is done.
        """
        _refuse_different_starts(trainer, cast("FineTuner", pl_module))
        # a callback such as EarlyStopping looks for them at the end of the epoch that the checkpoint was written in
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self._metrics.items()})
        if not self._owes_validation:
            return
        loop = trainer.fit_loop.epoch_loop.val_loop

        def make_up() -> None:
            del loop.increment_progress_to_evaluation_end  # Lightning's own is there again
            self._owes_validation = False
            _validate(trainer)

        loop.increment_progress_to_evaluation_end = make_up  # type: ignore[method-assign]

    def _is_late(self) -> bool:
        return time.monotonic() - self._saved_time > 60 * self.every_minutes

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save where another callback ends the training now."""
        if _stops(trainer) and trainer.global_step != self._saved_at:
            self._save(trainer, "last")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the best state so far, and the last where it is due."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = trainer.callback_metrics.items()
        self._metrics = {name: float(value) for name, value in metrics if name.startswith("val/")}
        if self.save_best:
            self._save_best(trainer)
        if self._now or _stops(trainer) or trainer.global_step == self._saved_at:
            self._save(trainer, "last")

    def _save_best(self, trainer: pl.Trainer) -> None:
        assert self.monitor is not None
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise UserError(f"checkpoints.monitor is {self.monitor!r}; validation logs {known}")
        value = float(trainer.callback_metrics[self.monitor])
        if math.isnan(value):  # never the best, and no other value compares with it
            return
        if self.best is None or (value < self.best if self.mode == "min" else value > self.best):
            self.best = value
            self._save(trainer, "best")

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        with not_training(trainer):
            self._write(trainer, name)
        if name == "last" and self._leaving:
            self._io.wait()
            leave(trainer, f"after step {trainer.global_step:,}, which is saved")

    def _write(self, trainer: pl.Trainer, name: str) -> None:
        if name == "last":
            self._saved_at, self._saved_time = trainer.global_step, time.monotonic()
            self._due = self._now = False
        for logger in trainer.loggers:  # what was logged up to here is not lost with the process
            logger.save()
        trainer.save_checkpoint(checkpoint_folder(trainer.default_root_dir) / f"{name}.ckpt", weights_only=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What is written meanwhile is there when the run has ended, and before the model is exported."""
        self._io.wait()
        trainer.strategy.barrier()

    def state_dict(self) -> dict[str, Any]:
        """The best score so far, and the step saved last."""
        compared = {"monitor": self.monitor, "validated_on": self._validated_on}
        found = {"best": self.best, "saved_at": self._saved_at, "owes_validation": self._owes_validation, **compared}
        return found | {"metrics": self._metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with them, unless another monitor is chosen by now, or other rows to validate on."""
        self._saved_at = state_dict["saved_at"]
        self._owes_validation = state_dict.get("owes_validation", False)
        self._metrics = state_dict.get("metrics", {})
        if (state_dict["monitor"], state_dict["validated_on"]) == (self.monitor, self._validated_on):
            self.best = state_dict["best"]


def _refuse_different_starts(trainer: pl.Trainer, module: "FineTuner") -> None:
    """Ranks that see other checkpoints than the first would train another model with it, or parts of two models."""
    if trainer.world_size == 1:
        return
    saved = "" if module._resumed is None else f" (saved at {module._resumed['saved_at']:.3f})"
    found = f"step {trainer.global_step:,}{saved}"
    first = trainer.strategy.broadcast(found)
    differ = torch.tensor(float(found != first), device=trainer.strategy.root_device)
    if trainer.strategy.reduce(differ, reduce_op="sum"):
        raise UserError(
            f"rank {trainer.global_rank} begins at {found}, the first rank at {first}: all ranks have to see the same "
            f"run_dir ({trainer.default_root_dir}), on a disk that they share"
        )


def _stops(trainer: pl.Trainer) -> bool:
    """Whether a wish to stop is granted: min_epochs and min_steps are met."""
    return trainer.should_stop and bool(trainer.fit_loop._can_stop_early)


def _validates_now(trainer: pl.Trainer) -> bool:
    """Whether Lightning runs a validation between this step and the next one.

    A checkpoint from before it would be taken up after it, and the validation be left out.
    """
    loop = trainer.fit_loop.epoch_loop
    fetcher: Any = trainer.fit_loop._data_fetcher
    return loop._should_check_val_fx(fetcher) and sum(trainer.num_val_batches) > 0


def _validate_after_this_step(trainer: pl.Trainer) -> None:
    """Let Lightning validate after the last step of a run too, where it would not: max_steps before a validation."""
    loop = trainer.fit_loop.epoch_loop
    if not trainer.enable_validation:
        return
    loop.val_loop.setup_data()
    if sum(trainer.num_val_batches) > 0:

        def due(fetcher: Any) -> bool:
            return bool(trainer.global_step == step) or type(loop)._should_check_val_fx(loop, fetcher)

        step = trainer.global_step
        loop._should_check_val_fx = due  # type: ignore[method-assign, assignment]


def _validate(trainer: pl.Trainer) -> None:
    """Run the validation as Lightning does between two steps, the first of which it counts only afterwards."""
    steps, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    is_first, steps.val_loop.restarting = connector._first_loop_iter, False
    steps._batches_that_stepped -= 1
    trainer.validating = True
    steps.val_loop.run()
    trainer.training = True
    steps._batches_that_stepped += 1
    connector._first_loop_iter = is_first
