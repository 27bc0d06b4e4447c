"""Says which rank hangs: when nothing has moved for a while, the ranks tell each other how far they are.

It costs a thread and a counter. The ranks speak over the store that brought them together, not by a collective
operation, which is what they hang in; so it does not matter over what they reduce gradients.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from dft_lightning.errors import UserError


@dataclass(frozen=True)
class Place:
    """How far a rank is: two that are equally far have passed equally many `marks`."""

    rank: int
    marks: int
    step: int
    after: str
    doing: str


class RollCall(Callback):
    """Names the rank that hangs, on standard error, once nothing has moved for a while.

    What ends the run then is the time-out of the process group, half an hour by default: for ten minutes give
    `--trainer.strategy DDPStrategy --trainer.strategy.timeout 0:10:00`.

    Args:
        minutes: how long a rank may take from one micro-batch to the next before all of them say where they are; 0
            switches it off. A step that takes longer for good reason, as the first one of a compiled model, is named in
            vain, and goes on.
    """

    def __init__(self, minutes: float = 10.0) -> None:
        if minutes < 0:
            raise UserError(f"roll_call.minutes is {minutes}; expected 0 or more")
        self.minutes = minutes
        self._moved, self._marks, self._step, self._after = time.monotonic(), 0, 0, "the start"
        self._end = threading.Event()
        self._store: Any = None
        self._rank = self._ranks = 0

    @property
    def _patience(self) -> float:
        """Seconds that an answer may take: clocks and moments of the last step differ a little between ranks."""
        return min(30.0, 30 * self.minutes)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to watch, where there are several ranks."""
        if not self.minutes or not (dist.is_available() and dist.is_initialized()) or trainer.world_size == 1:
            return
        self._rank, self._ranks = trainer.global_rank, trainer.world_size
        default: Any = dist.distributed_c10d._get_default_store()
        own = default.clone()  # a connection of its own: the main thread may be waiting on the other one
        self._store = dist.distributed_c10d.PrefixStore("roll call", own)
        self._store.set(f"where/{self._rank}", f"{socket.gethostname()}, process {os.getpid()}")
        self._end.clear()
        self._mark(trainer, "the start")
        threading.Thread(target=self._watch, daemon=True, name="roll-call").start()

    def _mark(self, trainer: pl.Trainer, what: str) -> None:
        self._marks, self._step, self._after = self._marks + 1, trainer.global_step, what
        self._moved = time.monotonic()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """A mark, as all of these are."""
        self._mark(trainer, "taking a micro-batch")

    def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        self._mark(trainer, "the forward pass")

    def on_after_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        self._mark(trainer, "the backward pass")

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        self._mark(trainer, "the last backward pass of a step")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._mark(trainer, "a micro-batch")

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._mark(trainer, "taking a batch of the validation")

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._mark(trainer, "a batch of the validation")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop watching."""
        self._end.set()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self._end.set()

    def _watch(self) -> None:
        told = -1
        while not self._end.wait(min(5.0, 6 * self.minutes)):
            if self._marks == told:
                continue
            try:
                if told >= 0 and self._store.check([self._place]):
                    self._store.delete_key(self._place)  # it has moved since: that is no answer to another call
                if time.monotonic() - self._moved > 60 * self.minutes:
                    told = self._marks
                    self._call()
            except RuntimeError as gone:  # the store is, with the rank or the launcher that held it
                print(f"roll call: no store to speak over any more ({gone})", file=sys.stderr, flush=True)

    @property
    def _place(self) -> str:
        return f"place/{self._rank}"

    def _call(self) -> None:
        mine = Place(self._rank, self._marks, self._step, self._after, main_thread())
        self._store.set(self._place, json.dumps(asdict(mine)))
        self._end.wait(self._patience)
        there = [rank for rank in range(self._ranks) if self._store.check([f"place/{rank}"])]
        if self._rank != min(there, default=self._rank) or self._end.is_set():
            return
        places = [Place(**json.loads(self._store.get(f"place/{rank}"))) for rank in there]
        where = {rank: self._store.get(f"where/{rank}").decode() for rank in range(self._ranks)}
        print(verdict(places, where, self.minutes), file=sys.stderr, flush=True)


def verdict(places: list[Place], where: dict[int, str], minutes: float) -> str:
    """Who hangs, in words.

    Args:
        places: of the ranks that have answered.
        where: each rank's host and process.
    """
    silent = sorted(where.keys() - {place.rank for place in places})
    behind = [place for place in places if place.marks < max(one.marks for one in places)]
    lines = [f"Nothing has moved for {minutes:g} minutes."]
    lines += [f"Rank {rank} ({where[rank]}) does not answer: it is stopped, busy or gone." for rank in silent]
    lines += [f"Rank {one.rank} ({where[one.rank]}) is behind the others: {_said(one)}" for one in behind]
    waiting = [place for place in places if place not in behind]
    if not behind and not silent:
        lines += [f"All ranks are equally far; rank {one.rank} ({where[one.rank]}): {_said(one)}" for one in waiting]
    elif waiting:
        lines.append(f"Rank {', '.join(str(one.rank) for one in waiting)} waits: {_said(waiting[0])}")
    return "\n".join(["", *lines, ""])


def _said(place: Place) -> str:
    return f"in the step after {place.step:,}, past {place.after}, in {place.doing}"


def main_thread() -> str:
    """Where the main thread is: its innermost calls."""
    ident = threading.main_thread().ident
    frame = sys._current_frames().get(ident) if ident is not None else None
    calls = traceback.extract_stack(frame)[-4:] if frame is not None else []
    return " < ".join(f"{call.name} ({Path(call.filename).name}:{call.lineno})" for call in reversed(calls))
