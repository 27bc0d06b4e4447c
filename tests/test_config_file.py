"""config.yaml is written when the training begins; a start that is refused before leaves the folder as it was."""

from pathlib import Path

import pytest
from conftest import sums, write_jsonl

from dft_lightning.__main__ import main


def contents(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def dft(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", sums(8))
    base = ["fit", "--model.model_name", str(model_dir), "--trainer.accelerator", "cpu", "--run_dir", "runs/one"]
    base += ["--data", "NuminaMathDataModule", "--data.path", "rows.jsonl", "--data.max_length", "200"]
    base += ["--data.global_batch_size", "4", "--data.micro_batch_size", "4", "--export.enabled", "false"]
    return lambda *more: main([*base, *more])


#: Refused once the rows are known, and once the model is there.
REFUSED = [
    ["--model.weighting", "DataWeighted", "--model.weighting.of", "Uniform"],
    ["--model.weighting", "DFT", "--trainer.gradient_clip_val", "-1"],
]


@pytest.mark.parametrize("options", REFUSED)
def test_a_new_run_that_is_refused_leaves_nothing(dft, capsys, options):
    assert dft(*options) == 2
    assert "dft: error: " in capsys.readouterr().err
    assert not Path("runs/one").exists()


@pytest.mark.parametrize("more", [[], ["--overwrite", "true"]])
@pytest.mark.parametrize("options", REFUSED)
def test_an_earlier_run_stays_as_it_was(dft, options, more):
    assert dft("--model.weighting", "Uniform") == 0
    Path("runs/one/notes.txt").write_text("by hand")
    before = contents(Path("runs/one"))
    assert {"config.yaml", "tensorboard", "checkpoints/last.ckpt"} <= before.keys()
    assert dft(*options, "--allow_changes", "[weighting]", "--trainer.max_epochs", "2", *more) == 2
    assert contents(Path("runs/one")) == before


def test_a_run_that_fails_later_keeps_what_it_has(dft, monkeypatch):
    from dft_lightning import FineTuner

    monkeypatch.setattr(FineTuner, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dft("--model.weighting", "DFT")
    assert Path("runs/one/config.yaml").exists()
    assert [*Path("runs/one/tensorboard").glob("events*")]
