"""`--trainer.strategy fsdp2` on one rank (NCCL on a GPU): the same gradients as without sharding, step by step.

In float32 and with SGD. Sums may be in another order, so the bound is that of `make exactness`: 1e-5, relative L2.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gpu import models
from gpu.bounds import GRADIENT
from gpu.part import Measurement, Setting, attempt

CASES: dict[str, dict[str, Any]] = {
    "packed": {"data": {"packing": True, "micro_batch_size": 2}},
    "packed, layers computed again": {
        "data": {"packing": True, "micro_batch_size": 2},
        "module": {"activation_checkpointing": "full"},
    },
}


def run(setting: Setting) -> Iterator[Measurement]:
    """Each case, sharded and not."""
    model = models.save(setting.folder / "model", models.TINY)
    rows = models.save_rows(setting.folder / "rows.jsonl")
    for name in CASES:
        yield from attempt(name, sharded, setting, model, rows, name)


def gradients(setting: Setting, model: Path, rows: Path, **options: Any) -> list[torch.Tensor]:
    """Of three steps."""
    from harness import fit

    options["module"] = {"chat_template": "chatml"} | options.get("module", {})
    options["data"] = {"max_length": 256, "cache_dir": str(setting.folder / "cache")} | options.get("data", {})
    return fit(model, rows, accelerator=setting.accelerator, max_steps=3, **options)[1].gradients


def sharded(setting: Setting, model: Path, rows: Path, name: str) -> Iterator[Measurement]:
    """The largest distance of three gradients."""
    truth = gradients(setting, model, rows, **CASES[name])
    ours = gradients(setting, model, rows, strategy="fsdp2", **CASES[name])
    backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else "ended"
    worst = max(float((one - true).norm() / true.norm()) for one, true in zip(ours, truth, strict=True))
    note = f"{len(ours)} steps; process group: {backend}"
    yield Measurement(f"{name}: distance of the gradients", worst, GRADIENT, note=note)
