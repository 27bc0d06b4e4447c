"""A signal within a training: the step is finished, what is due is done, the state is saved, and the rest goes on."""

import multiprocessing
import os
import signal
import subprocess

import lightning.pytorch as pl
import pytest
import torch
from harness import events, fit, logger
from kill_and_resume import difference

from dft_lightning.callbacks import Checkpoints, Preemption
from dft_lightning.signals import AGAIN, NOTICE, Preempted

CONSTANT = {"lr_schedule": "constant", "optimizer": torch.optim.Adam}
HALVES = {"micro_batch_size": 4}  # two micro-batches a step, four steps


class Send(pl.Callback):
    """Sends this process a signal before a micro-batch of the epoch, and counts micro-batches."""

    def __init__(self, before: int, number: int = signal.SIGTERM):
        self.before, self.number, self.seen, self.handlers = before, number, 0, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen += 1
        self.handlers.append(signal.getsignal(signal.SIGTERM))
        if batch_idx == self.before:
            os.kill(os.getpid(), self.number)


def run(model, rows_file, folder, *callbacks, **more):
    options = {"module": CONSTANT, "data": HALVES, "enable_checkpointing": True, "default_root_dir": folder} | more
    with NOTICE.watching():
        return fit(model, rows_file, callbacks=[Preemption(), *callbacks, Checkpoints()], **options)


def step_of(folder) -> int:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("before", [2, 3])
def test_the_step_is_finished_and_saved_and_the_rest_is_as_undisturbed(model_dir, rows_file, tmp_path, number, before):
    send = Send(before, number)
    with pytest.raises(Preempted) as left:
        run(model_dir, rows_file, tmp_path / "parts", send)
    assert left.value.code == AGAIN == 85
    assert (send.seen, step_of(tmp_path / "parts")) == (4, 2)
    assert not [path for path in (tmp_path / "parts" / "checkpoints").iterdir() if "unfinished" in path.name]
    last = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    rest = run(model_dir, rows_file, tmp_path / "parts", ckpt_path=last)[1].gradients
    whole = run(model_dir, rows_file, tmp_path / "whole")[1].gradients
    assert (len(rest), len(whole)) == (2, 4)
    for ours, truth in zip(rest, whole[2:], strict=True):
        assert torch.equal(ours, truth)


@pytest.mark.parametrize(
    ("every", "before", "epochs"),
    [(2, 3, 1), (2, 3, 2), (1.0, 5, 2)],
    ids=["within", "within, two epochs", "at its end"],
)
def test_a_validation_that_is_due_is_made_up_for(model_dir, rows_file, tmp_path, every, before, epochs):
    """A scheduler's grace need not cover it, but at an epoch's end; what goes on is the undisturbed run to the bit."""
    more = {"data": HALVES | {"val_size": 4}, "val_check_interval": every, "max_epochs": epochs}
    with pytest.raises(Preempted):
        run(model_dir, rows_file, tmp_path / "parts", Send(before), logger=logger(tmp_path / "parts"), **more)
    step = (before + 1) // 2
    assert step_of(tmp_path / "parts") == step
    assert (step in [event.step for event in validations(tmp_path / "parts")]) is (every == 1.0)
    last = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    run(model_dir, rows_file, tmp_path / "parts", ckpt_path=last, logger=logger(tmp_path / "parts"), **more)
    run(model_dir, rows_file, tmp_path / "whole", logger=logger(tmp_path / "whole"), **more)
    ours, truth = ([(event.step, event.value) for event in validations(tmp_path / name)] for name in ("parts", "whole"))
    assert ours == truth
    assert step in dict(ours)
    for name in ("last", "best"):
        ours, truth = (stored(tmp_path / run, name) for run in ("parts", "whole"))
        assert difference(ours, truth) is None


def stored(folder, name):
    """A checkpoint, but for when it was written, and when the one before."""
    found = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
    del found["dft_lightning"]["saved_at"], found["callbacks"]["Checkpoints"]["saved_at"]
    return found


def validations(folder):
    found = events(folder)
    return found.Scalars("val/nll") if "val/nll" in found.Tags()["scalars"] else []


def test_after_the_last_step_the_run_just_ends(model_dir, rows_file, tmp_path):
    send = Send(7)
    run(model_dir, rows_file, tmp_path, send)
    assert (send.seen, step_of(tmp_path)) == (8, 4)


class Early(pl.Callback):
    def on_fit_start(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGTERM)


def test_before_the_training_it_leaves_at_once(model_dir, rows_file, tmp_path):
    send = Send(-1)
    with pytest.raises(Preempted):
        run(model_dir, rows_file, tmp_path, Early(), send)
    assert send.seen == 0
    assert not (tmp_path / "checkpoints").exists()


def test_lightnings_own_handling_is_off_and_the_handlers_come_back(model_dir, rows_file, tmp_path):
    """It would have every micro-batch wait for a flag, and leave with 0."""
    before, send = signal.getsignal(signal.SIGTERM), Send(-1)
    run(model_dir, rows_file, tmp_path, send)
    assert send.handlers == [NOTICE._take] * 8
    assert signal.getsignal(signal.SIGTERM) == before


class SignalWorkers(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for worker in multiprocessing.active_children():
            subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # not from its parent


def test_data_workers_outlive_a_signal_to_the_whole_job(model_dir, rows_file, tmp_path):
    run(model_dir, rows_file, tmp_path, SignalWorkers(), data=HALVES | {"num_workers": 1})
    assert step_of(tmp_path) == 4
