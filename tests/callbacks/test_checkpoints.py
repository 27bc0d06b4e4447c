"""`last.ckpt` and `best.ckpt` of real runs: when, by what, and always whole."""

import os
import time

import lightning.pytorch as pl
import pytest
import torch
from harness import events, fit, logger
from lightning.pytorch.loggers import TensorBoardLogger

from dft_lightning import FineTuner
from dft_lightning.callbacks import Checkpoints
from dft_lightning.callbacks.checkpoints import checkpoint_folder
from dft_lightning.checkpointing import place as disk
from dft_lightning.errors import UserError
from dft_lightning.models import LoRA
from dft_lightning.weighting import DFT, Uniform

P_MEANS, NLLS = [0.3, 0.6, float("nan"), 0.5], [2.0, 1.0, 0.5, 0.7]


def run(model_dir, rows_file, tmp_path, checkpoints, weighting=None, **more):
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path} | more
    options["callbacks"] = [*options.get("callbacks", []), checkpoints]
    return fit(model_dir, rows_file, weighting, **({"data": {"val_size": 4, "global_batch_size": 6}} | options))


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


class Spy(Checkpoints):
    """Keeps what is saved, and when."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.saved = []

    def _save(self, trainer, name):
        super()._save(trainer, name)
        self.saved.append((name, trainer.global_step))


@pytest.fixture
def scripted(monkeypatch):
    """Four validations with these results."""

    def log(self, stage):
        number = self.trainer.global_step - 1
        self.log(f"{stage}/p_mean", P_MEANS[number])
        self.log(f"{stage}/nll", NLLS[number])
        self.log(f"{stage}/objective", number - 9.0)  # least where it is first, as that of a collapsed model

    monkeypatch.setattr(FineTuner, "_log_means", log)


@pytest.mark.parametrize(
    ("weighting", "step", "best", "more"),
    [
        (DFT(), 2, 0.6, {}),  # the most probable
        (Uniform(), 3, 0.5, {}),  # the lowest NLL
        (DFT(), 3, 0.5, {"monitor": "val/nll"}),
        (Uniform(), 2, 0.6, {"monitor": "val/p_mean", "mode": "max"}),
    ],
)
def test_the_best_is_by_what_the_weighting_descends(
    model_dir, rows_file, tmp_path, scripted, weighting, step, best, more
):
    checkpoints = Checkpoints(**more)
    run(model_dir, rows_file, tmp_path, checkpoints, weighting, val_check_interval=1)
    assert step_of(checkpoint_folder(tmp_path) / "best.ckpt") == step
    assert checkpoints.best == pytest.approx(best)


def test_a_first_value_that_is_no_number_is_not_the_best(model_dir, rows_file, tmp_path, scripted, monkeypatch):
    monkeypatch.setattr("test_checkpoints.P_MEANS", [float("nan"), 0.1, 0.2, 0.1])
    run(model_dir, rows_file, tmp_path, Checkpoints(), DFT(), val_check_interval=1)
    assert step_of(checkpoint_folder(tmp_path) / "best.ckpt") == 3


def test_an_unknown_monitor_is_named_with_those_that_are_logged(model_dir, rows_file, tmp_path):
    with pytest.raises(UserError, match=r"'val/bleu'; validation logs .*val/nll.*val/p_mean.*val/top1"):
        run(model_dir, rows_file, tmp_path, Checkpoints(monitor="val/bleu"))


def test_a_negative_number_of_previous_ones():
    with pytest.raises(UserError, match="keep_previous is -1; expected 0 or more"):
        Checkpoints(keep_previous=-1)


def test_none_every_zero_steps():
    with pytest.raises(UserError, match="every_n_steps is 0; expected 1 or more"):
        Checkpoints(every_n_steps=0)


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3, 4]), (50, [4])])
def test_the_last_is_saved_now_and_then_and_at_the_end(model_dir, rows_file, tmp_path, every, steps):
    """Whole steps only, with accumulation; nothing but the previous one is left in the folder."""
    spy = Spy(every, save_best=False)
    data = {"val_size": 4, "global_batch_size": 6, "micro_batch_size": 2}
    run(model_dir, rows_file, tmp_path, spy, data=data)
    assert spy.saved == [("last", step) for step in steps]
    kept = {path.name: step_of(path) for path in checkpoint_folder(tmp_path).iterdir()}
    assert kept == dict(zip(["last.ckpt", ".last.ckpt.before"], reversed(steps), strict=False))


def test_last_and_best_and_no_others(model_dir, rows_file, tmp_path):
    run(model_dir, rows_file, tmp_path, Checkpoints(1, keep_previous=0), val_check_interval=1)
    assert sorted(path.name for path in checkpoint_folder(tmp_path).iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_saving_that_fails_leaves_the_one_before(model_dir, rows_file, tmp_path, monkeypatch):
    whole = torch.save

    def full_disk(checkpoint, path):
        if checkpoint["global_step"] > 2:
            path.write_bytes(b"the first half")
            raise OSError("no space left on device")
        whole(checkpoint, path)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match=r"last\.ckpt could not be written \(no space left on device\)"):
        run(model_dir, rows_file, tmp_path, Checkpoints(1))
    assert step_of(checkpoint_folder(tmp_path) / "last.ckpt") == 2


class AtTheEnd(pl.Callback):
    """What an export finds; Lightning has the callbacks that save come last."""

    def on_fit_end(self, trainer, pl_module):
        self.found = step_of(checkpoint_folder(trainer.default_root_dir) / "last.ckpt")


def test_what_is_written_meanwhile_is_there_before_the_export(model_dir, rows_file, tmp_path, monkeypatch):
    finish, end = disk.finish, AtTheEnd()
    monkeypatch.setattr(disk, "finish", lambda path, keep=0: time.sleep(0.5) or finish(path, keep))
    *_, trainer = run(model_dir, rows_file, tmp_path, Checkpoints(1, asynchronous=True), callbacks=[end])
    assert end.found == trainer.global_step > 1


@pytest.mark.parametrize("options", [{"sharded": True}, {"sharded": True, "asynchronous": True}])
def test_folders_are_refused_where_nothing_is_dealt_out(model_dir, rows_file, tmp_path, options):
    with pytest.raises(UserError, match=r"SingleDeviceStrategy every rank .* set trainer\.strategy fsdp2"):
        run(model_dir, rows_file, tmp_path, Checkpoints(**options))


class Read(pl.Callback):
    """Keeps the rows of every micro-batch."""

    def __init__(self):
        self.rows = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.append(batch.row.tolist())


@pytest.mark.parametrize("end", [{"max_steps": 1}, {"max_steps": 2}, {"max_steps": 5}, {"max_epochs": 1}], ids=str)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_in_two_parts_is_the_whole_run_to_the_bit(model_dir, rows_file, tmp_path, end, workers):
    """Trap 21: from last.ckpt as the end of a shorter run leaves it, mid-epoch too, with accumulation and Adam.

    A worker has fetched its first rows before Lightning says which epoch it is.
    """
    constant = {"lr_schedule": "constant", "optimizer": torch.optim.Adam}  # a schedule would know of the shorter run
    more = {"module": constant, "data": {"micro_batch_size": 4, "num_workers": workers}}

    def go(folder, ends, **options):
        read = Read()
        recorder = run(
            model_dir,
            rows_file,
            folder,
            Checkpoints(),
            **more,
            **({"max_epochs": 2} | ends),
            callbacks=[read],
            **options,
        )[1]
        return read.rows, recorder.gradients

    rows, gradients = go(tmp_path / "whole", {})
    first, early = go(tmp_path / "parts", end)
    rest, late = go(tmp_path / "parts", {}, ckpt_path=checkpoint_folder(tmp_path / "parts") / "last.ckpt")
    assert first + rest == rows
    assert len(rows) == 16
    for ours, truth in zip(early + late, gradients, strict=True):
        assert torch.equal(ours, truth)


class Interrupt(pl.Callback):
    """Ends the run as a validation begins, as a kill would."""

    def __init__(self, step):
        self.step = step

    def on_validation_start(self, trainer, pl_module):
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_run_that_dies_in_a_validation_does_it_again(model_dir, rows_file, tmp_path, step):
    """A checkpoint from before a validation would be taken up after it."""
    more = {"val_check_interval": 1, "data": {"val_size": 4, "global_batch_size": 6}}
    whole = logger(tmp_path / "whole"), logger(tmp_path / "parts"), logger(tmp_path / "parts")
    run(model_dir, rows_file, tmp_path / "whole", Checkpoints(1), logger=whole[0], **more)
    killed = {"callbacks": [Interrupt(step)], "logger": whole[1]}
    with pytest.raises(RuntimeError, match="killed"):
        run(model_dir, rows_file, tmp_path / "parts", Checkpoints(1), **killed, **more)
    last = checkpoint_folder(tmp_path / "parts") / "last.ckpt"
    resumed = {"ckpt_path": last} if last.exists() else {}
    run(model_dir, rows_file, tmp_path / "parts", Checkpoints(1), logger=whole[2], **resumed, **more)
    ours, truth = ({e.step: e.value for e in events(tmp_path / f).Scalars("val/nll")} for f in ("parts", "whole"))
    assert ours == truth
    assert sorted(truth) == [1, 2, 3, 4]


def test_what_was_logged_is_on_disk_with_the_checkpoint(model_dir, rows_file, tmp_path, monkeypatch):
    """A kill right after it loses nothing that comes before it: logged, flushed, named."""
    happened = []

    class Logger(TensorBoardLogger):
        def log_metrics(self, metrics, step=None):
            happened.extend(["logged"] if "train/nll" in metrics else [])
            super().log_metrics(metrics, step)

        def save(self):
            happened.append("flushed")
            super().save()

    def named(source, target):
        happened.append("named")
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "replace", named)
    spy = Logger(str(tmp_path), name="tensorboard", version="")
    run(model_dir, rows_file, tmp_path, Checkpoints(1, save_best=False), logger=spy, log_every_n_steps=1)
    assert happened.count("named") == 4
    for place in [index for index, what in enumerate(happened) if what == "named"]:
        assert happened[place - 2 : place] == ["logged", "flushed"]


def test_dropout_goes_on_where_it_was(model_dir, rows_file, tmp_path):
    """Its random numbers follow from the step, not from what happened in this process."""
    lora = {"lora": LoRA(rank=4, dropout=0.5), "lr_schedule": "constant"}
    data = {"micro_batch_size": 4}
    whole = run(model_dir, rows_file, tmp_path / "whole", Checkpoints(), module=lora, data=data)[1]
    run(model_dir, rows_file, tmp_path / "parts", Checkpoints(), module=lora, data=data, max_steps=2)
    last = checkpoint_folder(tmp_path / "parts") / "last.ckpt"
    rest = run(model_dir, rows_file, tmp_path / "parts", Checkpoints(), module=lora, data=data, ckpt_path=last)[1]
    for ours, truth in zip(rest.gradients, whole.gradients[2:], strict=True):
        assert torch.equal(ours, truth)


def test_the_best_score_goes_on(model_dir, rows_file, tmp_path, scripted):
    first, second, other = Checkpoints(1), Checkpoints(1), Checkpoints(1, monitor="val/nll")
    run(model_dir, rows_file, tmp_path, first, DFT(), val_check_interval=1)
    state = first.state_dict()
    second.monitor = "val/p_mean"
    second._validated_on = other._validated_on = state["validated_on"]
    second.load_state_dict(state)
    other.load_state_dict(state)
    assert (second.best, second.state_dict()) == (first.best, state)
    assert other.best is None
    third = Checkpoints(1, monitor="val/p_mean")
    third.load_state_dict(state | {"validated_on": "other rows"})
    assert third.best is None
