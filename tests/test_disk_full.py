"""A disk that is full at one moment of a run: nothing that was complete is lost, one line says what could not be
written, and the same command resumes once there is space again."""

import errno
import json
import os
import shutil
import subprocess
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from conftest import sums, write_jsonl

from dft_lightning.__main__ import main
from dft_lightning.checkpointing.checksums import is_sealed


class Disk:
    """A small file system that can be filled; where none can be mounted, the moment raises what a full one would."""

    def __init__(self, path: Path) -> None:
        self.path = path
        command = ["mount", "-t", "tmpfs", "-o", "size=24M", "none", str(path)]
        tried = shutil.which("mount") and subprocess.run(command, capture_output=True, check=False)
        self.is_real = bool(tried) and tried.returncode == 0
        self.before: dict[str, bytes] = {}

    def fill(self) -> None:
        self.before = complete(self.path)
        if not self.is_real:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with (self.path / ".filler").open("wb", buffering=0) as filler:
            for size in (1 << 20, 1 << 12, 1):
                with suppress(OSError):
                    while filler.write(b"\0" * size) == size:
                        pass

    def free(self) -> None:
        (self.path / ".filler").unlink(missing_ok=True)

    def leave(self) -> None:
        if self.is_real:
            subprocess.run(["umount", "-l", str(self.path)], check=True)


def complete(folder: Path) -> dict[str, bytes]:
    """Files with a final name; TensorBoard only ever appends to its own."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    named = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in named}


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    made = Disk(path)
    yield made
    made.leave()


@pytest.fixture
def dft(model_dir, tmp_path, monkeypatch):
    """A command of `dft`, with the run and the caches on the disk."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", sums(12))
    base = ["--model.model_name", str(model_dir), "--trainer.accelerator", "cpu", "--data", "NuminaMathDataModule"]
    base += ["--data.path", "rows.jsonl", "--data.max_length", "200", "--data.global_batch_size", "4"]
    base += ["--data.micro_batch_size", "4", "--data.cache_dir", "disk/cache", "--run_dir", "disk/run"]
    training = ["--checkpoints.every_n_steps", "1"]

    def call(command, *more):
        if command == "export":
            return main(["export", "disk/run/checkpoints/last.ckpt", "disk/out"])
        weighting = [] if "--model.weighting" in more else ["--model.weighting", "DFT"]
        return main([command, *base, *weighting, *(training if command == "fit" else []), *more])

    return call


#: What is being written, by which command; the function before which the disk is full, and at which of its calls; how
#: the file is called in the message.
MOMENTS = {
    "the marker": ("fit", "run_marker.write", 1, ".dft-run.json"),
    "rows": ("fit", "data.sources.write_arrow", 1, ".arrow"),
    "tokens": ("fit", "data.tokenized._write", 1, "cache/tokens/"),
    "reference": ("fit", "reference._scores", 1, "cache/reference/"),
    "events at the start": ("fit", "events.EventLogger.log_hyperparams", 1, "tensorboard"),
    "config.yaml": ("fit", "config_file.SaveConfig._write", 1, "config.yaml"),
    "environment.json": ("fit", "environment.record", 1, "environment.json"),
    "distributions of the probe": ("fit", "callbacks.looks.initial._write", 1, "initial-"),
    "events later": ("fit", "events.EventLogger.log_metrics", 3, "disk/run/"),
    "the first checkpoint": ("fit", "checkpointing.io._write_file", 1, "last.ckpt"),
    "a later checkpoint": ("fit", "checkpointing.io._write_file", 3, "last.ckpt"),
    "the checksum of a checkpoint": ("fit", "checkpointing.checksums.seal", 2, "disk/run/"),
    "the model of the export": ("fit", "exporting.folder._embeddings", 1, "export"),
    "the files of the export": ("fit", "exporting.folder._take_place", 1, ".dft-run.json"),
    "predictions": ("predict", "callbacks.token_scores._columns", 2, "predictions"),
    "dft export": ("export", "exporting.folder._embeddings", 1, "out"),
    "the page of dft inspect": ("inspect", "insight.inspect_command.write", 1, "inspect.html"),
}
#: These are tried by `make test`; the others by `make test-all`.
SHORT = (
    "the marker",
    "tokens",
    "config.yaml",
    "events later",
    "a later checkpoint",
    "the model of the export",
    "predictions",
)
ROWS = [pytest.param(name, marks=[] if name in SHORT else [pytest.mark.exhaustive]) for name in MOMENTS]


def full_before(monkeypatch, disk, name: str, number: int) -> list[int]:
    """Have the disk full before a call of a function of the package."""
    path, _, attribute = name.rpartition(".")
    module, _, cls = path.rpartition(".") if path.rpartition(".")[2][0].isupper() else (path, "", "")
    owner = import_module(f"dft_lightning.{module}")
    owner = getattr(owner, cls) if cls else owner
    original, calls = getattr(owner, attribute), [0]

    def call(*args, **options):
        calls[0] += 1
        if calls[0] == number:
            disk.fill()
        return original(*args, **options)

    monkeypatch.setattr(owner, attribute, call)
    return calls


@pytest.mark.parametrize("moment", ROWS)
def test_nothing_is_lost_and_the_same_command_resumes(moment, dft, disk, capfd):
    command, where, number, named = MOMENTS[moment]
    more = ["--model.weighting", "ImportanceWeighted"] if moment == "reference" else []
    if command != "fit":
        assert dft("fit") == 0
    if command == "predict":
        assert dft("predict", *more) == 0
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        calls = full_before(patch, disk, where, number)
        assert dft(command, *more) == 2
    assert calls[0] >= number
    said = capfd.readouterr().err
    (line,) = [line for line in said.splitlines() if "dft: error: " in line]
    assert "Traceback" not in said
    assert named in line
    assert "No space left" in line
    after = complete(disk.path)
    if moment == "the checksum of a checkpoint":  # it may still fit: a newer one, valid as well, is in its place then
        disk.before = {
            name: after.get(name, b"") if name.endswith(".ckpt") else content for name, content in disk.before.items()
        }
    assert {name: after.get(name) == content for name, content in disk.before.items()} == dict.fromkeys(
        disk.before, True
    )
    all_is_valid(disk.path / "run")
    disk.free()
    assert dft(command, *more) == 0
    all_is_valid(disk.path / "run")
    assert not [*disk.path.rglob("*.unfinished")], "left behind"
    if command == "fit":
        as_without_an_interruption(dft, disk.path / "run", more)


def all_is_valid(run_dir: Path) -> None:
    """What has a final name can be read."""
    for path in run_dir.glob("checkpoints/*.ckpt"):
        assert is_sealed(path)
        torch.load(path, weights_only=True)
    for path in run_dir.glob("*.json"):
        json.loads(path.read_text())
    for path in run_dir.glob("config.yaml"):
        assert "model" in yaml.safe_load(path.read_text())
    if (run_dir / "export").exists():
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(run_dir / "export")


def as_without_an_interruption(dft, run_dir: Path, more: list[str]) -> None:
    """The weights are, to the bit, those of a run that had space."""
    assert dft("fit", *more, "--run_dir", "undisturbed") == 0
    state, expected = (
        torch.load(Path(folder) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (run_dir, "undisturbed")
    )
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
