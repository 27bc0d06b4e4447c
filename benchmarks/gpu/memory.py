"""What `dft plan` says of a fit's memory, and the most that was allocated while it ran.

The plan counts tensors; what it assumes on top (a CUDA context, the allocator's gaps) is not allocated memory and is
left out. The promise is that a fit takes no more than is planned: allocated over planned tensors is at most 1, apart
from blocks of 512 bytes and cuBLAS' workspace (32 MiB on the newest GPUs, 2 of them), which are part of what the plan
assumes: 64 MiB are taken off. On a CPU resident memory is counted, which has libraries in it and is reported only.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu import models
from gpu.fits import dft, fit, options_of
from gpu.part import Measurement, Setting, attempt

MIB = 2**20
WORKSPACE = 64 * MIB
_FUSED = ("--model.optimizer.fused", "true")
CASES: dict[str, tuple[Any, ...]] = {
    "float32, sdpa": ("--trainer.precision", "32-true"),
    "bf16-true, varlen, fused AdamW": ("--trainer.precision", "bf16-true", "--model.attn_implementation", "varlen",
                                       *_FUSED),
    "bf16-mixed, layers computed again": ("--trainer.precision", "bf16-mixed", "--model.activation_checkpointing",
                                          "full"),
    "bf16-true, LoRA": ("--trainer.precision", "bf16-true", "--model.lora.rank", 16),
}  # fmt: skip


def run(setting: Setting) -> Iterator[Measurement]:
    """A plan and a fit for each case; on a CPU one case."""
    model = models.save(setting.folder / "model", models.TINY if setting.dry else models.REAL)
    rows = (2, 256) if setting.dry else (4, 2048)
    for name in [*CASES][: 1 if setting.dry else None]:
        yield from attempt(name, compared, setting, model, rows, name)


def compared(setting: Setting, model: Path, rows: tuple[int, int], name: str) -> Iterator[Measurement]:
    """Planned and real peak of one case."""
    shape = ["--data.micro_batch_size", rows[0], "--data.global_batch_size", 96, "--data.pack_length", rows[1]]
    options = [*CASES[name], *shape]
    planned = planned_bytes(setting, model, options)
    forget = resident_forgotten() if setting.dry else 0
    record = fit(setting, model, name.replace(" ", "-"), 2, *options)
    real = record["peak"] if record["peak"] is not None else resident_peak() - forget
    yield Measurement(f"{name}: planned", planned / MIB, unit="MiB")
    yield Measurement(f"{name}: measured", real / MIB, unit="MiB")
    bound = None if setting.dry else 1.0
    yield Measurement(f"{name}: measured over planned", (real - WORKSPACE * (not setting.dry)) / planned, bound)


def planned_bytes(setting: Setting, model: Path, options: list[Any]) -> int:
    """The plan's peak without what it assumes."""
    printed = dft("plan", *options_of(setting, model, *options, "--trainer.max_steps", 2), "--json")
    plan = json.loads(printed[printed.index("{\n") :])
    return int(plan["peak_memory"] - sum(size for part, size in plan["memory"].items() if "assumed" in part))


def resident_forgotten() -> int:
    """Resident memory now, from which on the peak counts."""
    from peers.meter import forget_peak

    return int(forget_peak())


def resident_peak() -> int:
    """Most resident memory since then."""
    from peers.meter import peak

    return int(peak())
