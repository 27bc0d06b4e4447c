"""A run that has ended by itself is marked as finished: the same command then has nothing to do, and says so."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer

from dft_lightning.resume import age
from dft_lightning.run_marker import read, update

if TYPE_CHECKING:
    from dft_lightning.module import FineTuner

_KEY = "finished"
#: By what ended the run, the option that extends it.
_WAYS = {
    "max_steps": "raise --trainer.max_steps",
    "max_epochs": "raise --trainer.max_epochs",
    "max_time": "raise --trainer.max_time, which counts all starts of the run",
    "EarlyStopping": "raise the patience of EarlyStopping, or leave it out",
}


class Finished(Callback):
    """After a fit that has ended by itself, its export included, the run's marker says so.

    Args:
        options: those of the command by their full names, as text; with others it is another command.
    """

    def __init__(self, options: dict[str, str]) -> None:
        self.options = options
        self._patience: dict[int, int] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take note of the patience that is asked for: a checkpoint's would replace it."""
        self._patience = {id(callback): callback.patience for callback in _early(trainer)}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The patience that is asked for is in force; a run that is extended has not been stopped."""
        for callback in _early(trainer):
            callback.patience, callback.stopped_epoch = self._patience[id(callback)], 0
            callback.stopping_reason_message = None  # of the end before the run was extended

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What is trained further is not finished."""
        trial = getattr(trainer, "fast_dev_run", False)
        if trainer.is_global_zero and not trial and read(Path(trainer.default_root_dir)).get(_KEY):
            update(Path(trainer.default_root_dir), **{_KEY: None})

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The training, and what follows it, has come to its end."""
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        option, why = _reason(trainer, cast("FineTuner", pl_module))
        facts = {"by": option, "why": why, "step": trainer.global_step, "time": time.time(), "options": self.options}
        update(Path(trainer.default_root_dir), **{_KEY: facts})


def finished(run_dir: Path, step: int, options: dict[str, str]) -> str | None:
    """What to say of a run that has ended by itself, to the same command; None to another one.

    Another one may extend the run, export it in another way, or is refused, as after any checkpoint.

    Args:
        run_dir: the run's folder.
        step: of its last checkpoint.
        options: as `Finished` was given; those that another version does not have make no difference.
    """
    facts = read(run_dir).get(_KEY)
    if not isinstance(facts, dict) or facts.get("step") != step:
        return None
    before: dict[str, str] = facts.get("options", {})
    if any(before.get(name, value) != value for name, value in options.items()):
        return None
    way = _WAYS.get(str(facts.get("by")), "change the callback that stopped it")
    return (
        f"The run in {run_dir} is finished: it ended {age(time.time() - float(facts['time']))} ago after step "
        f"{step:,}, by {facts['why']}. Nothing is changed. To extend it, {way}; to start from scratch, give "
        "--overwrite true, or another --run_dir"
    )


def _early(trainer: pl.Trainer) -> list[EarlyStopping]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, EarlyStopping)]


def _reason(trainer: pl.Trainer, module: "FineTuner") -> tuple[str, str]:
    """Which option or callback has ended the fit, and this in words."""
    step, callbacks = trainer.global_step, cast(list[Callback], trainer.callbacks)  # type: ignore[attr-defined]
    if step >= module.total_steps:
        if trainer.max_steps == step:
            return "max_steps", f"max_steps {step}"
        return "max_epochs", f"max_epochs {trainer.max_epochs}"
    for timer in callbacks:
        if isinstance(timer, Timer) and (timer.time_remaining() or 0.0) <= 0.0 and timer._duration is not None:
            return "max_time", f"max_time, {timer._duration:,.0f} s in all"
    for callback in _early(trainer):
        if callback.stopped_epoch or getattr(callback, "stopping_reason_message", None):
            message = getattr(callback, "stopping_reason_message", None)
            return "EarlyStopping", f"EarlyStopping ({' '.join((message or callback.monitor).split())})"
    return "", "a callback"
