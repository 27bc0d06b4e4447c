"""Being told of signals costs a step nothing: no message of its own, and no host that waits for a device."""

import os
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from conftest import sums, tiny_model, tiny_tokenizer, write_jsonl
from harness import fit
from ranks import start
from torch.utils._python_dispatch import TorchDispatchMode

from dft_lightning.callbacks import Checkpoints, Preemption
from dft_lightning.callbacks.preemption import _without_lightnings

pytestmark = pytest.mark.slow  # starts other processes

MICRO_BATCHES = 8  # of 26 rows on two ranks: four steps of two


class Waits(TorchDispatchMode):
    """Counts messages, and values that the host wants to have."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" or func is torch.ops.aten._local_scalar_dense.default:
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


class Counting(pl.Callback):
    """From the first micro-batch of the epoch to its end."""

    def __init__(self) -> None:
        self.waits = Waits()

    def on_train_epoch_start(self, trainer, pl_module):
        self.waits.__enter__()

    def on_train_epoch_end(self, trainer, pl_module):
        self.waits.__exit__(None, None, None)


class NothingAtAll(pl.Callback):
    """Signals are not looked at, by Lightning neither."""

    def setup(self, trainer, pl_module, stage):
        _without_lightnings(trainer)


def count(folder: Path) -> None:
    found = {}
    for name, callbacks in {"ours": [Preemption()], "nothing": [NothingAtAll()], "Lightning's": []}.items():
        counting = Counting()
        more = {"enable_checkpointing": True, "default_root_dir": folder / name, "devices": 2, "strategy": "ddp"}
        every = [*callbacks, Checkpoints(100), counting]
        fit(folder / "model", folder / "rows.jsonl", data={"micro_batch_size": 2}, callbacks=every, **more)
        found[name] = dict(counting.waits.counts)
    if os.environ["RANK"] == "0":
        torch.save(found, folder / "found.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("waits")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "rows.jsonl", sums(26))
    start(2, __file__, "count", folder)
    return torch.load(folder / "found.pt")


def test_a_step_neither_sends_nor_waits_more_for_signals(found):
    assert found["ours"] == found["nothing"]
    assert found["ours"]["c10d::allreduce_"] > 0


def test_lightnings_way_would_be_seen(found):
    """A broadcast and a wait before each micro-batch."""
    for what in ("c10d::broadcast_", "aten::_local_scalar_dense"):
        assert found["Lightning's"].get(what, 0) - found["nothing"].get(what, 0) == MICRO_BATCHES
