"""A sharded checkpoint that is written while training goes on: written, resumed from, exported.

Kernels are deterministic, so a run of four steps and one of two steps that is resumed for two more have to end in the
same state, and the exported weights have to be those of the checkpoint: no tensor may differ in a single bit.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from gpu import models
from gpu.fits import dft, differing, fit, last_checkpoint, leaves, state
from gpu.part import Measurement, Setting, attempt

OPTIONS = ("--trainer.strategy", "fsdp2", "--checkpoints.sharded", "true", "--checkpoints.asynchronous", "true",
           "--checkpoints.every_n_steps", 1, "--trainer.deterministic", "true")  # fmt: skip


def run(setting: Setting) -> Iterator[Measurement]:
    """One after another, since each needs what the one before has left."""
    model = models.save(setting.folder / "model", models.TINY)
    yield from attempt("resumed", resumed, setting, model)
    yield from attempt("exported", exported, setting)


def resumed(setting: Setting, model: Path) -> Iterator[Measurement]:
    """2 + 2 steps against 4."""
    fit(setting, model, "uninterrupted", 4, *OPTIONS)
    fit(setting, model, "resumed", 2, *OPTIONS)
    yield Measurement("the checkpoint is a folder", float(last_checkpoint(setting, "resumed").is_dir()), 1.0, ">=")
    record = fit(setting, model, "resumed", 4, *OPTIONS)
    yield Measurement("steps after resuming, more or fewer than 2", float(abs(len(record["steps"]) - 2)), 0.0)
    ours, truth = state(setting, "resumed"), state(setting, "uninterrupted")
    for part in ("state_dict", "optimizer_states"):
        name = f"{part}: values that differ in a bit, of {leaves(truth[part])}"
        yield Measurement(name, float(differing(ours[part], truth[part])), 0.0)


def exported(setting: Setting) -> Iterator[Measurement]:
    """`dft export` of the last checkpoint, loaded by transformers."""
    from transformers import AutoModelForCausalLM

    folder = setting.folder / "exported"
    dft("export", last_checkpoint(setting, "resumed"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = {f"network.model.{name}": value for name, value in model.state_dict().items()}
    kept = state(setting, "resumed")["state_dict"]
    shared = weights.keys() & kept.keys()
    wrong = sum(not torch.equal(weights[name], kept[name].float()) for name in shared)
    yield Measurement("exported tensors", float(len(shared)), float(len(kept)), ">=", note="all of the checkpoint's")
    yield Measurement("exported tensors that differ in a bit", float(wrong), 0.0)
