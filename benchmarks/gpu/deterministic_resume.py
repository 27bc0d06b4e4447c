"""`--trainer.deterministic true`: 2N steps against N steps, a new start, and N more, in mid-epoch.

Weights, optimizer and logged losses have to be the same to the bit, with a dropout in the adapters, too.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu import models
from gpu.fits import differing, fit, leaves, losses, state
from gpu.part import Measurement, Setting, attempt

STEPS = 3
CASES: dict[str, tuple[Any, ...]] = {
    "bf16-mixed, sdpa": ("--trainer.precision", "bf16-mixed"),
    "bf16-true, varlen": ("--trainer.precision", "bf16-true", "--model.attn_implementation", "varlen"),
    "bf16-mixed, LoRA with dropout": ("--trainer.precision", "bf16-mixed", "--model.lora.rank", 4,
                                      "--model.lora.dropout", 0.1),
}  # fmt: skip


def run(setting: Setting) -> Iterator[Measurement]:
    """Each case; on a CPU the last alone, which has everything."""
    model = models.save(setting.folder / "model", models.TINY)
    for name in [*CASES][-1 if setting.dry else 0 :]:
        yield from attempt(name, resumed, setting, model, name)


def resumed(setting: Setting, model: Path, name: str) -> Iterator[Measurement]:
    """The same run in one piece and in two."""
    options = (*CASES[name], "--trainer.deterministic", "true")
    place = str([*CASES].index(name))
    whole = fit(setting, model, f"whole {place}", 2 * STEPS, *options)
    fit(setting, model, f"parts {place}", STEPS, *options)
    rest = fit(setting, model, f"parts {place}", 2 * STEPS, *options)
    ours, truth = state(setting, f"parts {place}"), state(setting, f"whole {place}")
    for part in ("state_dict", "optimizer_states"):
        what = f"{name}: {part}, values that differ in a bit, of {leaves(truth[part])}"
        yield Measurement(what, float(differing(ours[part], truth[part])), 0.0)
    apart = differing(losses(rest), losses(whole)[STEPS:])
    yield Measurement(f"{name}: losses after the resume that differ, of {STEPS}", float(apart), 0.0)
