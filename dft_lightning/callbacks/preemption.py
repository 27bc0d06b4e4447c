"""A run that is asked to leave finishes its step, saves, and says that it wants to be started again."""

import time
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from dft_lightning.signals import NOTICE, Preempted, exit_code

if TYPE_CHECKING:
    from dft_lightning.module import FineTuner

#: Seconds that ranks have for what they write once the one that started them has failed.
GRACE = 20.0
LEAVE = "save the last state, and leave: a signal has come"
"""Asked with each optimizer step; `Checkpoints` grants it."""


class Preemption(Callback):
    """On SIGTERM, SIGUSR1 or Ctrl-C all ranks finish the optimizer step, save `last.ckpt`, and leave.

    The exit code is 85, by which launchers start the command again, and after Ctrl-C 130.

    One rank's signal is enough: it is told to the others by the sum over ranks that each step takes anyway. A
    validation that would follow the step is made up for when the run goes on. A second signal, some seconds later,
    ends a rank at once, and so does a second Ctrl-C.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """From here on a rank does not leave without the others."""
        if stage != "fit":
            return
        cast("FineTuner", pl_module).step.wishes[LEAVE] = lambda: NOTICE.received is not None
        NOTICE.is_kept = trainer.world_size > 1
        _without_lightnings(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave where a signal came meanwhile; there is nothing to save."""
        NOTICE.is_kept = True
        asked = torch.tensor(float(NOTICE.received is not None), device=trainer.strategy.root_device)
        if trainer.world_size > 1:
            asked = cast(torch.Tensor, trainer.strategy.reduce(asked, reduce_op="sum"))
        if asked:
            leave(trainer, "before any step")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """A rank that leaves before there is a step, or that fails alone, takes those with it that it has started.

        They may wait for it in a message that never comes, and hold their devices; after some seconds they are ended.
        """
        started = _started(trainer)
        for process in started:
            process.terminate()
        if isinstance(exception, Preempted):
            return
        end = time.monotonic() + GRACE
        while any(process.poll() is None for process in started) and time.monotonic() < end:
            time.sleep(0.05)
        for process in started:
            process.kill()


def leave(trainer: pl.Trainer, when: str) -> None:
    """Raise `Preempted` on all ranks, once all of them are here."""
    _started(trainer).clear()  # Lightning would kill this process for the exit codes of these
    trainer.strategy.barrier()
    rank_zero_info(
        f"Asked to leave by {NOTICE.received or 'a signal to another rank'}: left {when}. Start the same command "
        f"again; the exit code is {exit_code(NOTICE.received)}"
    )
    raise Preempted(when)


def _started(trainer: pl.Trainer) -> list[Any]:
    """Processes of other ranks that this one has started."""
    return cast(list[Any], getattr(trainer.strategy.launcher, "procs", []))


def _without_lightnings(trainer: pl.Trainer) -> None:
    """Switch off what Lightning does about signals.

    Its handler of SIGTERM sends a message to all ranks out of the handler, and ends the run after a micro-batch with
    exit code 0; for SLURM it saves within a handler; and before each micro-batch it has each rank's host wait for a
    flag from the first.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
