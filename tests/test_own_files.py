"""A run writes, replaces and removes its own files alone."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import sums, write_jsonl
from launching import DDP, LONG, TORCHRUN, Runs

from dft_lightning.__main__ import main
from dft_lightning.errors import UserError
from dft_lightning.own_files import files_of, is_our_export, own_files, replace_folder
from dft_lightning.run_marker import FILE, Claim, check, is_earlier_run, listed, read, update, write


def contents(folder: Path) -> dict[str, bytes]:
    """Links are not followed: what they lead to is listed where it is."""
    return {
        name: b"" if (folder / name).is_symlink() or (folder / name).is_dir() else (folder / name).read_bytes()
        for name in files_of(folder)
    }


@pytest.fixture
def dft(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", sums(8))
    base = ["--model.model_name", str(model_dir), "--model.weighting", "DFT", "--trainer.accelerator", "cpu"]
    base += ["--data", "NuminaMathDataModule", "--data.path", str(tmp_path / "rows.jsonl"), "--data.max_length", "200"]
    base += ["--data.global_batch_size", "4", "--data.micro_batch_size", "4", "--data.cache_dir", str(tmp_path / "c")]
    return lambda command, *more: main([command, *base, "--run_dir", "run", *more])


#: What the users of these folders have made by hand.
FOREIGN = {
    "a configuration": ["config.yaml"],
    "an export": ["export/config.json", "export/notes.md"],
    "checkpoints": ["checkpoints/last.ckpt", "checkpoints/mine.pt"],
    "predictions": ["predictions/part-00000.parquet"],
    "a project": ["main.py", "README.md"],
    "a start of another tool": ["environment.json", "config.yaml"],
}


more = pytest.mark.exhaustive
REFUSED = [
    pytest.param(command, kind, marks=[] if command == "fit" or kind == "a project" else [more])
    for command in ("fit", "predict", "inspect", "diagnose")
    for kind in FOREIGN
]


def make(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


class TestFoldersOfOthers:
    @pytest.mark.parametrize(("command", "kind"), REFUSED)
    def test_are_refused_and_stay_as_they_are(self, command, kind, dft, capsys):
        make(Path("run"), FOREIGN[kind])
        before = contents(Path("run"))
        assert dft(command, *(["--overwrite", "true"] if command == "fit" else [])) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("dft: error: --run_dir run has other files (")
        assert FOREIGN[kind][0].partition("/")[0] in line
        assert f"touch run/{FILE}" in line
        assert contents(Path("run")) == before

    def test_the_working_directory_is_one_of_them(self, dft, capsys):
        Path("config.yaml").write_text("mine: true")
        assert dft("fit", "--run_dir", ".") == 2
        assert "choose a new or an empty folder" in capsys.readouterr().err
        assert Path("config.yaml").read_text() == "mine: true"

    def test_the_advice_works(self, dft):
        make(Path("run"), FOREIGN["a project"])
        (Path("run") / FILE).touch()
        assert dft("fit") == 0
        assert Path("run/main.py").read_text() == "{}"
        assert listed(Path("run"))["export"]

    @pytest.mark.parametrize(
        "names", [pytest.param([], marks=more), ["slurm-12.out", "slurm-12.err", "train.log", ".gitignore"]]
    )
    def test_what_launchers_put_there_before_is_no_reason(self, names, dft):
        Path("run").mkdir()
        make(Path("run"), names)
        assert dft("fit", "--export.enabled", "false") == 0
        assert all((Path("run") / name).exists() for name in names)

    def test_a_file_is_no_folder(self, dft, capsys):
        Path("run").write_text("")
        assert dft("fit") == 2
        assert "--run_dir run cannot be used (Not a directory)" in capsys.readouterr().err

    def test_a_page_next_to_which_the_json_has_the_name_of_a_file_of_others(self, dft, capsys):
        Path("results.json").write_text("[1]")
        assert dft("diagnose", "--output", "results.html") == 2
        assert "results.json is not a diagnosis" in capsys.readouterr().err
        assert Path("results.json").read_text() == "[1]"


class TestMarker:
    def test_it_is_written_before_anything_else(self, tmp_path, monkeypatch):
        claim, run_dir = Claim(), tmp_path / "run"
        claim.take(run_dir)
        assert os.listdir(run_dir) == [FILE]
        claim.release()
        assert not run_dir.exists()

    def test_nothing_is_left_in_a_folder_that_was_there(self, tmp_path):
        (tmp_path / "slurm-1.out").touch()
        claim = Claim()
        claim.take(tmp_path)
        claim.release()
        assert os.listdir(tmp_path) == ["slurm-1.out"]

    def test_it_stays_where_something_was_written(self, tmp_path):
        claim = Claim()
        claim.take(tmp_path)
        (tmp_path / "predictions").mkdir()
        claim.release()
        assert (tmp_path / FILE).exists()
        check(tmp_path)

    def test_a_refused_predict_leaves_nothing(self, dft):
        assert dft("predict", "--ckpt_path", "no.ckpt") == 2
        assert not Path("run").exists()

    def test_predict_writes_it_and_a_fit_may_follow(self, dft):
        assert dft("predict") == 0
        assert (Path("run") / FILE).exists()
        parts = contents(Path("run/predictions"))
        assert dft("fit", "--export.enabled", "false") == 0
        assert contents(Path("run/predictions")) == parts

    def test_other_ranks_see_a_folder_that_the_first_one_is_claiming(self, tmp_path):
        """Whatever the first one has written by then."""
        (tmp_path / ".lock").touch()
        check(tmp_path)
        (tmp_path / f"{FILE}.unfinished").touch()
        check(tmp_path)
        write(tmp_path, {})
        (tmp_path / "config.yaml").touch()
        check(tmp_path)

    @pytest.mark.parametrize(
        "content", ["", "[]", "{", '{"exported": 1}', '{"exported": {"export": [1], "../x": ["y"]}}']
    )
    def test_of_another_form_it_says_nothing(self, content, tmp_path):
        (tmp_path / FILE).write_text(content)
        check(tmp_path)
        assert listed(tmp_path) == {}

    def test_parts_of_it_are_kept(self, tmp_path):
        update(tmp_path, ended="early")
        assert not (tmp_path / FILE).exists(), "made by `Claim` alone"
        write(tmp_path, {"dft_run": 1})
        update(tmp_path, ended="early")
        update(tmp_path, exported={"export": ["a"]})
        assert read(tmp_path) == {"dft_run": 1, "ended": "early", "exported": {"export": ["a"]}}


class TestEarlierVersions:
    """They wrote no marker."""

    @pytest.fixture
    def earlier(self, dft):
        assert dft("fit", "--trainer.max_steps", "1") == 0
        (Path("run") / FILE).unlink()
        return Path("run")

    @pytest.mark.parametrize("lost", [[], pytest.param(["environment.json"], marks=more), ["checkpoints"]])
    def test_their_runs_are_known_by_what_their_files_say(self, earlier, lost, dft):
        for name in lost:
            shutil.rmtree(earlier / name) if (earlier / name).is_dir() else (earlier / name).unlink()
        assert is_earlier_run(earlier)
        assert dft("fit", "--trainer.max_steps", "2") == 0
        assert (earlier / FILE).exists()
        assert torch.load(earlier / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("config.yaml", "mine: true"),
            ("config.yaml", "model: {weighting: 1}\ndata: 1\ntrainer: 1"),
            ("config.yaml", "["),
            ("config.yaml", None),
            ("environment.json", '{"starts": [{}]}'),
        ],
    )
    def test_by_their_names_they_are_not(self, earlier, name, content):
        shutil.rmtree(earlier / "checkpoints")
        (earlier / "checkpoints").mkdir()
        (earlier / "checkpoints" / "last.ckpt").write_bytes(b"PK")
        (earlier / name).unlink() if content is None else (earlier / name).write_text(content)
        assert not is_earlier_run(earlier)
        with pytest.raises(UserError, match="is not the folder of a run"):
            check(earlier)

    def test_of_their_exports_the_files_that_an_export_has_are_replaced(self, earlier, dft):
        (earlier / "export" / "model-f16.gguf").write_text("by hand")
        assert is_our_export(earlier / "export")
        assert dft("fit", "--trainer.max_steps", "2") == 0
        assert (earlier / "export" / "model-f16.gguf").read_text() == "by hand"
        assert not [*(earlier / "export").rglob("*.kept")]


#: By other people, in folders of a run.
ADDED = [
    "notes.txt",
    "checkpoints/mine.ckpt",
    "checkpoints/epoch=1.ckpt",
    "predictions/analysis.csv",
    "predictions/part-1.parquet",
    "export/model-f16.gguf",
    "export/sub/notes.md",
    "tensorboard/notes.md",
]


BY_TORCHRUN = [*TORCHRUN, "-m", "dft_lightning"]
LINKED = ("tensorboard", "export", "predictions")


class TestOverwrite:
    def test_removes_what_we_wrote_and_nothing_else(self, dft):
        assert dft("fit", "--trainer.max_steps", "1") == 0
        assert dft("predict") == 0
        own = set(contents(Path("run")))
        make(Path("run"), ADDED)
        stamps = {name: (Path("run") / name).stat().st_mtime_ns for name in own}
        assert dft("fit", "--trainer.max_steps", "1", "--export.enabled", "false", "--overwrite", "true") == 0
        after = contents(Path("run"))
        assert {name: after.get(name) for name in ADDED} == dict.fromkeys(ADDED, b"{}")
        for name in own - {FILE}:
            path = Path("run") / name
            assert not path.exists() or path.stat().st_mtime_ns > stamps[name], name
        assert not Path("run/predictions/part-00000.parquet").exists()
        assert not Path("run/export/config.json").exists()
        assert not Path("run/.overwritten").exists()

    @pytest.mark.parametrize("name", ["checkpoints", *(pytest.param(name, marks=more) for name in LINKED)])
    def test_a_link_is_not_followed(self, name, dft, capsys):
        assert dft("fit", "--trainer.max_steps", "1") == 0
        assert dft("predict") == 0
        shutil.move(f"run/{name}", "elsewhere")
        Path(f"run/{name}").symlink_to(Path("elsewhere").absolute())
        before = contents(Path("elsewhere")), contents(Path("run"))
        assert dft("fit", "--overwrite", "true") == 2
        assert f"run/{name} is a link to " in capsys.readouterr().err
        assert (contents(Path("elsewhere")), contents(Path("run"))) == before

    def test_a_link_in_the_place_of_a_file_is_removed_itself(self, dft):
        assert dft("fit", "--trainer.max_steps", "1", "--export.enabled", "false") == 0
        shutil.move("run/checkpoints/last.ckpt", "mine.ckpt")
        Path("run/checkpoints/last.ckpt").symlink_to(Path("mine.ckpt").absolute())
        before = Path("mine.ckpt").read_bytes()
        assert dft("fit", "--trainer.max_steps", "1", "--export.enabled", "false", "--overwrite", "true") == 0
        assert Path("mine.ckpt").read_bytes() == before
        assert not Path("run/checkpoints/last.ckpt").is_symlink()

    def test_a_trial_of_one_batch_changes_nothing(self, dft):
        assert dft("fit", "--trainer.max_steps", "1") == 0
        before = contents(Path("run"))
        assert dft("fit", "--trainer.fast_dev_run", "true", "--overwrite", "true") == 0
        assert contents(Path("run")) == before


def test_predict_replaces_its_own_parts_alone(dft):
    assert dft("predict") == 0
    make(Path("run"), ["predictions/analysis.csv", "predictions/part-00003.parquet"])  # the second of a fourth rank
    assert dft("predict") == 0
    assert sorted(os.listdir("run/predictions")) == ["analysis.csv", "part-00000.parquet"]


def test_a_predict_that_fails_leaves_the_earlier_scores(dft, monkeypatch):
    assert dft("predict") == 0
    part = Path("run/predictions/part-00000.parquet")
    before = part.read_bytes()

    def fail(*_):
        raise RuntimeError("no scores")

    monkeypatch.setattr("dft_lightning.callbacks.token_scores._columns", fail)
    with pytest.raises(RuntimeError, match="no scores"):
        dft("predict")
    assert part.read_bytes() == before


class TestReplacing:
    def test_files_of_others_stay_and_give_way_where_a_name_is_taken(self, tmp_path):
        new, folder = tmp_path / "new", tmp_path / "export"
        make(new, ["config.json", "README.md"])
        make(folder, ["config.json", "README.md", "notes.md", "stale.json", "sub/x"])
        (folder / "README.md").write_text("by hand")
        replace_folder(new, folder, ["config.json", "stale.json"])
        assert files_of(folder) == ["README.md", "README.md.kept", "config.json", "notes.md", "sub/x"]
        assert (folder / "README.md.kept").read_text() == "by hand"
        assert os.listdir(tmp_path) == ["export"]

    def test_names_of_a_list_do_not_lead_out_of_the_folder(self, tmp_path):
        """A marker is data."""
        make(tmp_path / "run", ["export/a"])
        make(tmp_path, ["outside"])
        found = own_files(tmp_path / "run", {"export": ["a", "../../outside", str(tmp_path / "outside")]})
        assert [*found] == [Path("export/a")]


def test_the_configuration_says_what_the_folder_is(dft):
    assert dft("fit", "--trainer.max_steps", "1") == 0
    assert yaml.safe_load(Path("run/config.yaml").read_text())["run_dir"] == "run"
    marker = json.loads((Path("run") / FILE).read_text())
    assert sorted(marker["exported"]["export"]) == files_of(Path("run/export"))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_ranks_by_torchrun(tmp_path):
    """They start at the same moment: none refuses the folder for what the first one has written."""
    runs = Runs(tmp_path)
    runs.whole("fresh", DDP, BY_TORCHRUN)
    assert (tmp_path / "fresh" / FILE).exists()
    make(tmp_path / "fresh", ["notes.txt", "checkpoints/mine.ckpt"])
    runs.whole("fresh", f"{DDP} --overwrite true", BY_TORCHRUN)
    assert (tmp_path / "fresh/checkpoints/mine.ckpt").exists()
    make(tmp_path / "taken", ["main.py"])
    assert runs.start("taken", DDP, BY_TORCHRUN).wait(LONG) != 0
    assert "is not the folder of a run" in runs.log("taken")
    assert os.listdir(tmp_path / "taken") == ["main.py"]
