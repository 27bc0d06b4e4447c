"""How long the training takes, without what else a run does between two steps, and how long it waits for batches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch


class Stopwatch:
    """Runs from the first batch that is fetched; stands still while it is paused.

    Args:
        clock: seconds since some moment.
        settle: waits until the device has done what it was given, so that its time counts where it belongs.
    """

    def __init__(self, clock: Callable[[], float] = perf_counter, settle: Callable[[], None] = lambda: None) -> None:
        self._clock, self._settle = clock, settle
        self._began: float | None = None
        self._waited = self._left_out = self._asked = 0.0
        self._pauses = 0

    def reset(self) -> None:
        """Stand at zero until the next batch is fetched."""
        self._began, self._waited, self._left_out = None, 0.0, 0.0

    def fetch_begins(self) -> None:
        """The loop asks for a batch."""
        self._asked = self._clock()
        if self._began is None:
            self._began, self._left_out = self._asked, 0.0

    def fetch_ends(self) -> None:
        """It has the batch, or there is none any more."""
        self._waited += self._clock() - self._asked

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out what happens within; may be nested."""
        self._pauses += 1
        outermost = self._pauses == 1
        if outermost:
            self._settle()
            stopped = self._clock()
        try:
            yield
        finally:
            self._pauses -= 1
            if outermost:
                self._settle()
                self._left_out += self._clock() - stopped

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, and how many of them were spent waiting for batches.

        The device is not waited for: each optimizer step does so once, always at the same place (`step.py`).
        """
        now = self._clock()
        began = now if self._began is None else self._began
        seconds, waited = now - began - self._left_out, self._waited
        self._began, self._waited, self._left_out = now, 0.0, 0.0
        return seconds, waited

    def follow(self, trainer: pl.Trainer) -> None:
        """Have Lightning's training loop tell when it fetches and when it validates.

        There are no hooks around these two: `on_train_batch_start` comes after the copy to the device, and before
        `on_validation_start` workers are started.
        """
        loop = trainer.fit_loop.epoch_loop
        _before(loop, "_on_before_fetch", self.fetch_begins)
        _before(loop, "_on_after_fetch", self.fetch_ends)
        _within(loop.val_loop, "run", self.pause)


def settle(device: torch.device) -> Callable[[], None]:
    """What waits for a device."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def _before(owner: Any, name: str, first: Callable[[], None]) -> None:
    call = getattr(owner, name)

    @wraps(call)
    def both(*args: Any) -> Any:
        first()
        return call(*args)

    setattr(owner, name, both)


def _within(owner: Any, name: str, context: Callable[[], Any]) -> None:
    call = getattr(owner, name)

    @wraps(call)
    def inside(*args: Any) -> Any:
        with context():
            return call(*args)

    setattr(owner, name, inside)
