"""`benchmarks/gpu_step.py`: tokens per second, share of the device's peak (MFU) and memory of whole optimizer steps.

Qwen2.5 0.5B and 1.5B with random weights in bfloat16: packed rows of 4,096 tokens, varlen attention, DFT, fused AdamW.
Reported only.
"""

import argparse
import gc
from collections.abc import Iterator
from typing import Any

import gpu_step
import torch

from gpu.part import Measurement, Setting, SkippedError, attempt

#: Changes of the script's defaults.
CASES: dict[str, dict[str, Any]] = {
    "0.5B, compiled": {"shape": "qwen2.5-0.5b", "compile": True},
    "1.5B, compiled": {"shape": "qwen2.5-1.5b", "compile": True},
    "1.5B, compiled, bfloat16 logits": {"shape": "qwen2.5-1.5b", "compile": True, "logits": "bfloat16"},
    "0.5B, plain layers": {"shape": "qwen2.5-0.5b"},
    "1.5B, plain layers": {"shape": "qwen2.5-1.5b"},
    "1.5B, compiled, layers computed again": {"shape": "qwen2.5-1.5b", "compile": True, "recompute": "full"},
}
_TINY = {"shape": "tiny", "width": 256, "rows": 2, "document": 60, "steps": 2, "warmup": 1}


def run(setting: Setting) -> Iterator[Measurement]:
    """Each case; on a CPU a tiny one."""
    cases = {"tiny, plain layers": _TINY} if setting.dry else CASES
    for name, changes in cases.items():
        defaults = vars(gpu_step.parser().parse_args([]))
        options = argparse.Namespace(**(defaults | {"device": setting.device} | changes))
        yield from attempt(name, timed, name, options)


def timed(name: str, options: argparse.Namespace) -> Iterator[Measurement]:
    """One case."""
    torch.compiler.reset()  # what is compiled holds the former model
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        found = gpu_step.measured(options)
    except torch.OutOfMemoryError as error:
        raise SkippedError("the GPU has not enough memory") from error
    yield Measurement(f"{name}: tokens per second", found["tokens_per_s"])
    if found["mfu"] is not None:
        yield Measurement(f"{name}: MFU", 100 * found["mfu"], unit="%")
    if found["bytes"] is not None:
        yield Measurement(f"{name}: peak memory", found["bytes"] / 2**30, unit="GiB")
