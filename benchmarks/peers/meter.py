"""Time, memory and losses of a training run, measured alike for every trainer. Imports torch only.

Memory is the peak above what the process held when its model was loaded and nothing else of the run had begun: on a
CPU of resident memory (Linux: the peak that loading left behind is forgotten first), on a GPU of allocated memory; hide
a GPU from processes that do not use it.
"""

import ctypes
import gc
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


class Meter:
    """Watches one run.

    Args:
        warmup: steps before the clock starts.
    """

    def __init__(self, warmup: int) -> None:
        self.warmup, self.steps = warmup, 0
        self.losses: list[float] = []
        self.began = self.ended = (0.0, 0.0)  # of the clock, and of the cores
        self.before = self.highest = 0

    def loaded(self, model: Any) -> None:
        """The model is in memory, and training has not begun."""
        for parameter in model.parameters():  # pages of a mapped file count from their first reading
            parameter.detach().sum()
        gc.collect()
        self.before = forget_peak()
        if torch.cuda.is_available():  # a trainer may not have moved the model there yet
            self.before = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

    def step_done(self) -> None:
        """An optimizer step has ended."""
        self.steps += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ended, self.highest = (time.perf_counter(), time.process_time()), peak()
        if self.steps == self.warmup:
            self.began = self.ended

    def write(self, path: Path, tokens_of_steps: Sequence[int]) -> None:
        """What was found, as JSON; `tokens_of_steps` are those that the model had to read, without padding."""
        if not self.warmup <= self.steps - 1 or self.steps != len(tokens_of_steps):
            raise ValueError(f"{self.steps} steps were done, {len(tokens_of_steps)} expected; warm-up {self.warmup}")
        seconds, cores = (end - start for start, end in zip(self.began, self.ended, strict=True))
        tokens = sum(tokens_of_steps[self.warmup :])
        found = {
            "losses": self.losses,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "tokens_per_cpu_s": tokens / max(cores, 1e-9),
            "model_bytes": self.before,
            "bytes": self.highest - self.before,
            "versions": {"torch": torch.__version__, "threads": torch.get_num_threads()},
        }
        path.write_text(json.dumps(found))


def peak() -> int:
    """Most bytes held since the peak was last forgotten."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes, and never forgets


def forget_peak() -> int:
    """Bytes held now; the peak starts again from here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if sys.platform != "linux":
        return peak()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc: give back what is free
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    """A figure of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status says nothing of {name}")
