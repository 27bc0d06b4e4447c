"""Weightings of installed packages: a real one, used by its name, and those that cannot be used."""

import logging
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from conftest import sums, write_jsonl

from dft_lightning.weighting import DFT, plugins
from dft_lightning.weighting.plugins import GROUP, load_plugins, weightings
from dft_lightning.weighting.spec import from_spec

PACKAGE = Path(__file__).parents[1] / "plugin_package"
REPOSITORY = Path(__file__).parents[2]

BAD = '''
from dataclasses import dataclass
from dft_lightning.weighting import DFT, TokenWeighting

@dataclass(frozen=True)
class Fine(DFT):
    """A good one."""

class Bare(TokenWeighting):
    def weights(self, tokens):
        return tokens.p

@dataclass(frozen=True)
class Called(DFT):
    """Its entry point has another name."""

NUMBER = 3
'''


@pytest.fixture
def entries(monkeypatch, tmp_path):
    """Makes entry points of a module in a folder that is on the path."""
    (tmp_path / "somebodys.py").write_text(BAD)
    (tmp_path / "broken.py").write_text("raise RuntimeError('no such\\nlibrary')")
    monkeypatch.syspath_prepend(tmp_path)

    def install(**values):
        made = [EntryPoint(name, value, GROUP) for name, value in values.items()]
        monkeypatch.setattr(plugins, "entry_points", lambda group: made if group == GROUP else [])
        plugins._loaded.cache_clear()

    yield install
    sys.modules.pop("somebodys", None)
    monkeypatch.undo()
    plugins._loaded.cache_clear()


def test_one_that_cannot_be_used_is_named_and_left_out(entries, caplog):
    reasons = {
        "Broken": ("broken:Broken", "RuntimeError: no such library"),
        "Missing": ("nowhere_at_all:Missing", "ModuleNotFoundError"),
        "Absent": ("somebodys:Absent", "AttributeError"),
        "NUMBER": ("somebodys:NUMBER", "got 3; expected a dataclass that is a TokenWeighting"),
        "Bare": ("somebodys:Bare", "expected a dataclass"),
        "Misnamed": ("somebodys:Called", "the class is called Called: name its entry point so, too"),
        "DFT": ("somebodys:DFT", "there is another one of that name"),
    }
    entries(Fine="somebodys:Fine", **{name: value for name, (value, _) in reasons.items()})
    with caplog.at_level(logging.WARNING):
        found = load_plugins()
    assert list(found) == ["Fine"]
    assert issubclass(found["Fine"], DFT)
    assert found["Fine"] in weightings()
    said = {record.args[0]: record.getMessage() for record in caplog.records}
    assert said.keys() == reasons.keys()
    for name, (value, reason) in reasons.items():
        assert f"The weighting {name} ({value}) is left out." in said[name]
        assert reason in said[name]
        assert "\n" not in said[name]


def test_they_are_loaded_once(entries, caplog):
    entries(Broken="broken:Broken")
    assert load_plugins() == load_plugins() == {}
    assert len(caplog.records) == 1


def test_a_checkpoint_names_one_that_is_not_imported_yet(entries):
    """Then, and only then, are the installed ones loaded."""
    entries(Fine="somebodys:Fine")
    assert from_spec({"class_path": "dft_lightning.weighting.likelihood.DFT"}) == DFT()
    assert "somebodys" not in sys.modules
    made = from_spec({"class_path": "somebodys.Fine", "init_args": {"floor": 0.2}})
    assert (type(made).__name__, made.floor) == ("Fine", 0.2)


def test_what_cannot_be_made_is_no_weighting_to_choose():
    names = {cls.__name__ for cls in weightings()}
    assert {"DFT", "Mixed", "Exempt"} <= names
    assert not names & {"TokenWeighting", "TokenTarget", "Modifier", "Blend"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which pip has installed the example package."""
    target = tmp_path_factory.mktemp("installed")
    source = tmp_path_factory.mktemp("source") / "package"
    source.mkdir()
    for file in PACKAGE.iterdir():
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())  # setuptools builds beside its sources
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.slow
class TestInstalled:
    def dft(self, installed, folder, *options):
        path = os.pathsep.join([str(installed), str(REPOSITORY)])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DFT_CACHE": str(folder / "cache")}
        command = [sys.executable, "-m", "dft_lightning", "fit", *map(str, options)]
        return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)

    def test_it_trains_by_its_name(self, installed, tmp_path, model_dir):
        rows = write_jsonl(tmp_path / "rows.jsonl", sums(8))
        done = self.dft(
            installed, tmp_path, "--model.model_name", model_dir, "--data", "NuminaMathDataModule", "--data.path", rows,
            "--data.global_batch_size", 8, "--data.max_length", 200, "--trainer.accelerator", "cpu",
            "--trainer.max_steps", 1, "--token_probabilities.every_n_steps", 0,
            "--model.weighting", "Exempt", "--model.weighting.of", "Confident", "--model.weighting.of.threshold", 0.01,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Exempt(of=Confident(threshold=0.01)" in done.stdout
        assert "class_path: confident.Confident" in (tmp_path / "runs/default/config.yaml").read_text()

    def test_help_and_hint_know_it(self, installed, tmp_path):
        said = self.dft(installed, tmp_path, "--model.weighting.help", "Confident").stdout
        assert "smallest p that is learnt" in said
        assert "confident.Confident" in self.dft(installed, tmp_path, "--help").stdout
        wrong = self.dft(installed, tmp_path, "--model.weighting", "Confidant")
        assert wrong.returncode == 2
        assert "Confident" in wrong.stderr
