"""What becomes of the same command, and of a longer one, after a run has ended."""

import hashlib
import json
from pathlib import Path

import pytest
from test_cli import dft, fails, here, scalars  # noqa: F401 - fixtures

from dft_lightning.callbacks.finished import finished
from dft_lightning.checkpointing import skeleton
from dft_lightning.run_marker import read

DFT = ["--model.weighting", "DFT"]
LONG = ["--trainer.max_epochs", "100"]
STOP = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/nll"]
STOP += ["--trainer.callbacks.min_delta", "100", "--trainer.callbacks.patience"]
#: How a run ends, the options by which it does, and those that extend it.
ENDS = {
    "max_steps": (["--trainer.max_steps", "1"], ["--trainer.max_steps", "2"]),
    "max_epochs": (["--trainer.max_epochs", "1"], ["--trainer.max_epochs", "2"]),
    "max_time": ([*LONG, "--trainer.max_time", "00:00:00:01"], [*LONG, "--trainer.max_time", "00:00:00:03"]),
    "EarlyStopping": ([*LONG, *STOP, "1"], [*LONG, *STOP, "3"]),
}


def files(run: str) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(run).rglob("*") if path.is_file()}


def step() -> int:
    return int(skeleton(Path("run/checkpoints/last.ckpt"))["global_step"])


@pytest.mark.parametrize("by", ENDS)
def test_the_same_command_changes_nothing_and_a_longer_one_goes_on(dft, capsys, by):  # noqa: F811
    ends, longer = ENDS[by]
    assert dft("fit", *DFT, *ends) == 0
    before, there = files("run"), step()
    capsys.readouterr()
    for _ in range(2):
        assert dft("fit", *DFT, *ends) == 0
        said = capsys.readouterr().out
        assert f"after step {there}, by {by}" in " ".join(said.split())
        assert by in said.partition("To extend it")[2]
        assert files("run") == before
    assert dft("fit", *DFT, *longer) == 0
    assert step() > there
    facts = read(Path("run"))["finished"]
    assert facts["step"] == step()
    if by == "EarlyStopping":  # the patience that is asked for was in force, not the checkpoint's
        assert "last 3 records" in facts["why"]
    assert files("run")["run/export/model.safetensors"] != before["run/export/model.safetensors"]


def test_what_may_have_changed_is_asked_for_and_not_finished(dft, capsys):  # noqa: F811
    """Another weighting is refused as ever, and one that is allowed is trained."""
    assert dft("fit", *DFT, "--trainer.max_steps", "1") == 0
    fails(lambda: dft("fit", "--model.weighting", "Uniform", "--trainer.max_steps", "1"), capsys, "weighting")
    assert dft("fit", *DFT, "--trainer.max_steps", "1", "--overwrite", "true") == 0
    assert "is finished" not in capsys.readouterr().out


def test_the_reason_is_that_of_the_last_end(dft, capsys):  # noqa: F811
    Path("stops.py").write_text(
        "from lightning.pytorch import Callback\nclass Stop(Callback):\n"
        "    def on_train_batch_end(self, trainer, *_):\n        trainer.should_stop = True\n"
    )
    assert dft("fit", *DFT, *LONG, *STOP, "1") == 0
    assert read(Path("run"))["finished"]["by"] == "EarlyStopping"
    again = [*DFT, *LONG, *STOP, "50", "--trainer.callbacks+=stops.Stop"]
    assert dft("fit", *again) == 0
    capsys.readouterr()
    assert dft("fit", *again) == 0
    assert "by a callback" in " ".join(capsys.readouterr().out.split())


def test_another_export_of_a_finished_run_is_made(dft):  # noqa: F811
    lora = [*DFT, "--model.lora.rank", "2", "--trainer.max_steps", "1"]
    assert dft("fit", *lora) == 0
    assert not Path("run/export-merged").exists()
    assert dft("fit", *lora, "--export.merge_lora", "true") == 0
    assert Path("run/export-merged/model.safetensors").exists()


def test_a_run_that_fails_after_its_training_is_not_finished(dft, monkeypatch):  # noqa: F811
    from dft_lightning.callbacks import Export

    def fail(*_):
        raise RuntimeError("no export")

    with monkeypatch.context() as patched:
        patched.setattr(Export, "on_train_end", fail)
        with pytest.raises(RuntimeError, match="no export"):
            dft("fit", *DFT, "--trainer.max_steps", "1")
    assert not read(Path("run")).get("finished")
    assert dft("fit", *DFT, "--trainer.max_steps", "1") == 0
    assert Path("run/export/model.safetensors").exists()


def test_a_note_of_another_checkpoint_counts_nothing(tmp_path):
    facts = {
        "by": "max_steps",
        "why": "max_steps 3",
        "step": 3,
        "time": 0.0,
        "options": {"max_steps": "3", "of an earlier version": "1"},
    }
    (tmp_path / ".dft-run.json").write_text(json.dumps({"finished": facts}))
    assert "max_steps 3" in finished(tmp_path, 3, {"max_steps": "3"})
    assert finished(tmp_path, 2, {"max_steps": "3"}) is None
    assert finished(tmp_path, 3, {"max_steps": "4"}) is None
    assert "max_steps 3" in finished(tmp_path, 3, {"max_steps": "3", "of a later version": "1"})


class TestValidationAtTheEnd:
    def test_max_steps_before_the_first_one(self, dft):  # noqa: F811
        assert dft("fit", *DFT, "--trainer.max_steps", "2", "--export.which", "best") == 0
        assert int(skeleton(Path("run/checkpoints/best.ckpt"))["global_step"]) == 2
        assert [*scalars("run")["val/nll"]] == [2]

    def test_not_twice(self, dft):  # noqa: F811
        assert dft("fit", *DFT, "--trainer.max_epochs", "2") == 0
        assert [*scalars("run")["val/nll"]] == [3, 6]

    def test_a_longer_run_ends_as_if_it_had_not_been_parted(self, dft):  # noqa: F811
        constant = ["--model.lr_schedule", "constant", "--model.warmup_ratio", "0", "--trainer.max_epochs", "2"]
        assert dft("fit", *DFT, *constant, "--trainer.max_steps", "4", "--run_dir", "whole") == 0
        assert dft("fit", *DFT, *constant, "--trainer.max_steps", "2") == 0
        assert dft("fit", *DFT, *constant, "--trainer.max_steps", "4") == 0
        ours, theirs = (Path(run, "export", "model.safetensors").read_bytes() for run in ("run", "whole"))
        assert ours == theirs
        assert [*scalars("run")["val/nll"]] == [2, 3, 4]

    def test_none_where_it_is_switched_off(self, dft):  # noqa: F811
        assert dft("fit", *DFT, "--trainer.max_steps", "2", "--trainer.limit_val_batches", "0") == 0
        assert "val/nll" not in scalars("run")


class TestMonitors:
    @pytest.mark.parametrize("monitor", ["val/los", "val_nll", "nll", "train/top1"])
    @pytest.mark.parametrize("callback", ["EarlyStopping", "ModelCheckpoint", "checkpoints"])
    def test_names_that_nothing_logs(self, dft, capsys, callback, monitor):  # noqa: F811
        more = ["--checkpoints.monitor", monitor]
        if callback != "checkpoints":
            more = [f"--trainer.callbacks+={callback}", "--trainer.callbacks.monitor", monitor]
        fails(lambda: dft("fit", *DFT, *more), capsys, f"monitors {monitor!r}, which is not logged", "val/nll")
        assert not Path("run").exists()

    def test_without_rows_to_validate_on(self, dft, capsys):  # noqa: F811
        more = ["--data.val_size", "0", *STOP, "1"]
        fails(lambda: dft("fit", *DFT, *more), capsys, "monitors 'val/nll'", "data.val_size")

    @pytest.mark.parametrize("monitor", ["train/nll", "train/grad_norm", "val/top1", "lr-AdamW"])
    def test_names_that_are_logged(self, dft, monitor):  # noqa: F811
        more = ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks+=EarlyStopping"]
        assert dft("fit", *DFT, *more, "--trainer.callbacks.monitor", monitor, "--trainer.max_epochs", "1") == 0

    def test_what_a_callback_of_the_users_own_logs(self, dft):  # noqa: F811
        Path("logs.py").write_text(
            "from lightning.pytorch import Callback\nclass Mine(Callback):\n"
            "    def on_validation_epoch_end(self, trainer, module):\n        module.log('mine', 1.0)\n"
        )
        more = ["--trainer.callbacks+=logs.Mine", "--trainer.callbacks+=EarlyStopping"]
        assert dft("fit", *DFT, *more, "--trainer.callbacks.monitor", "mine", "--trainer.max_epochs", "1") == 0
