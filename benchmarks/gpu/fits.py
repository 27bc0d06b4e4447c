"""Fits by the command line of `dft`, in this process, and what they leave."""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gpu.part import Setting
from gpu.recorder import FILE

#: Rows are packed, so that batches have one shape, and documents share rows.
_OPTIONS = """--model.weighting DFT --model.chat_template chatml --model.optimizer.lr 0.003
    --model.lr_schedule constant --model.warmup_ratio 0 --data PracticeDataModule --data.problems 96 --data.held_out 4
    --data.max_length 256 --data.packing true --data.global_batch_size 8 --data.micro_batch_size 2
    --trainer.devices 1 --trainer.gradient_clip_val 1 --trainer.enable_progress_bar false
    --trainer.limit_val_batches 0 --checkpoints.save_best false --export.enabled false
    --token_probabilities.every_n_steps 0"""


def dft(*arguments: Any) -> str:
    """What a command prints; its error as an exception."""
    from dft_lightning.__main__ import main

    printed, errors = io.StringIO(), io.StringIO()
    words = [str(one) for one in arguments]
    print("dft", *words, flush=True)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            code = main(words)
    except SystemExit as end:  # as wrong options leave
        code = int(end.code or 0) if isinstance(end.code, int) or end.code is None else 1
    finally:
        print(printed.getvalue()[-4000:], errors.getvalue()[-4000:], flush=True)
    if code:
        raise RuntimeError(f"dft {words[0]} ended with {code}: {(errors.getvalue().strip().splitlines() or [''])[-1]}")
    return printed.getvalue()


def options_of(setting: Setting, model: Path, *more: Any) -> list[str]:
    """Of a fit, and of a plan."""
    base = [*_OPTIONS.split(), "--model.model_name", str(model), "--trainer.accelerator", setting.accelerator]
    return [*base, *(str(one) for one in more)]


def fit(setting: Setting, model: Path, run: str, steps: int, *more: Any) -> dict[str, Any]:
    """A fit of so many steps; what `Recorder` has written down."""
    folder = setting.folder / run
    own = ["--run_dir", folder, "--trainer.max_steps", steps, "--trainer.max_epochs", 100]
    dft("fit", *options_of(setting, model, *own, "--trainer.callbacks+=gpu.recorder.Recorder", *more))
    found: dict[str, Any] = json.loads((folder / FILE).read_text())
    return found


def losses(record: dict[str, Any]) -> list[float]:
    """NLL of each step; of one that was skipped it may be missing."""
    return [step["logged"].get("train/nll", float("nan")) for step in record["steps"]]


def last_checkpoint(setting: Setting, run: str) -> Path:
    """Where a run keeps its last state."""
    return setting.folder / run / "checkpoints" / "last.ckpt"


def state(setting: Setting, run: str) -> dict[str, Any]:
    """The last state of a run without the time of day."""
    from dft_lightning.checkpointing import read

    found: dict[str, Any] = read(last_checkpoint(setting, run))
    found["dft_lightning"].pop("saved_at", None)
    return found


def differing(ours: Any, truth: Any) -> int:
    """How many leaves of two nested values are not the same to the bit."""
    return sum(not _same(*pair) for pair in _leaves(ours, truth))


def leaves(value: Any) -> int:
    """How many leaves a nested value has."""
    return sum(1 for _ in _leaves(value, value))


def _leaves(ours: Any, truth: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(truth, dict) and isinstance(ours, dict):
        for key in truth.keys() | ours.keys():
            yield from _leaves(ours.get(key, _MISSING), truth.get(key, _MISSING))
    elif isinstance(truth, list | tuple) and isinstance(ours, list | tuple) and len(ours) == len(truth):
        for pair in zip(ours, truth, strict=True):
            yield from _leaves(*pair)
    else:
        yield ours, truth


_MISSING = object()


def _same(ours: Any, truth: Any) -> bool:
    if isinstance(ours, torch.Tensor) and isinstance(truth, torch.Tensor):
        return ours.dtype == truth.dtype and torch.equal(ours, truth)
    return bool(ours == truth or (ours != ours and truth != truth))
