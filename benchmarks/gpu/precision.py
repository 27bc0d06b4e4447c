"""Short fits by the command line in bf16-mixed, bf16-true and 16-mixed, and the steps that a loss scaler skips.

The NLL of the last three steps has to be below that of the first three, every logged number finite, and every statistic
of the tokens at least float32. With a scale that overflows float16 at first, each fall of the scale has to be a skipped
step, and each skipped step a fall of the scale.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from gpu import models
from gpu.fits import fit, losses
from gpu.part import Measurement, Setting, SkippedError, attempt

STEPS = 10


def run(setting: Setting) -> Iterator[Measurement]:
    """A fit a precision."""
    model = models.save(setting.folder / "model", models.TINY if setting.dry else models.SMALL)
    for precision in ("bf16-mixed", "bf16-true", "16-mixed"):
        yield from attempt(precision, short_fit, setting, model, precision)
    yield from attempt("16-mixed, a scale that overflows", scaled, setting, model)


def short_fit(setting: Setting, model: Path, precision: str, *more: Any) -> Iterator[Measurement]:
    """What a short fit has logged."""
    if setting.dry and precision == "16-mixed":
        raise SkippedError("Lightning takes bf16-mixed in place of 16-mixed on a CPU")
    record = fit(setting, model, precision, STEPS, "--trainer.precision", precision, *more)
    yield from judged(precision, record)


def judged(name: str, record: dict[str, Any]) -> Iterator[Measurement]:
    """The loss falls, all is finite, statistics are float32."""
    every = [step for step in losses(record) if step == step]
    kept = f"weights in {', '.join(record['weights'])}"
    yield Measurement(
        f"{name}: NLL of the last three steps over the first three", sum(every[-3:]) / sum(every[:3]), 1.0, note=kept
    )
    skipped = record["steps"][-1]["skipped"]
    wrong = sum(not torch.tensor(value).isfinite() for step in record["steps"] for value in step["logged"].values())
    yield Measurement(f"{name}: logged numbers that are not finite", float(wrong), 0.0)
    yield Measurement(
        f"{name}: statistics narrower than float32", float(sum(step["narrow"] for step in record["steps"])), 0.0
    )
    yield Measurement(f"{name}: skipped steps", float(skipped), None if "16-mixed" in name else 0.0)


def scaled(setting: Setting, model: Path) -> Iterator[Measurement]:
    """A scaler that begins with 2³² times the loss, which float16 cannot hold."""
    if setting.dry:
        raise SkippedError("Lightning has no loss scaler for a CPU")
    import lightning.pytorch as pl
    from harness import fit as fit_in_python
    from lightning.pytorch.plugins import MixedPrecision

    from gpu.recorder import Recorder

    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**32, growth_interval=1000)
    recorder = Recorder()
    rows = models.save_rows(setting.folder / "rows.jsonl")
    plugins: list[pl.plugins.Precision] = [MixedPrecision("16-mixed", "cuda", scaler)]
    own = {"accelerator": "gpu", "plugins": plugins, "callbacks": [recorder], "recorder": False, "max_steps": 40}
    module = {"chat_template": "chatml", "max_skipped_steps": 40}
    fit_in_python(model, rows, module=module, max_epochs=100, default_root_dir=setting.folder / "scaled", **own)
    scales = [recorder.initial_scale, *(step["scale"] for step in recorder.steps)]
    falls = sum(now < then for then, now in pairwise(scales))
    skipped = recorder.steps[-1]["skipped"]
    yield Measurement("16-mixed, a scale that overflows: falls of the scale", float(falls), 1.0, ">=")
    yield Measurement(
        "16-mixed, a scale that overflows: falls without a skipped step", float(abs(falls - skipped)), 0.0
    )
    yield Measurement(
        "16-mixed, a scale that overflows: steps that were taken", float(len(scales) - 1 - falls), 1.0, ">="
    )
