"""`benchmarks/loss_head.py` in bfloat16 at the head of Qwen2.5 0.5B and 1.5B: time and memory, ours and others'.

Times are ratios to the three matrix products of the loss, measured around every run; memory is the peak beyond hidden
states, head and targets. Reported only. A peer that is not installed is skipped.
"""

import argparse
from collections.abc import Iterator

import loss_head
import torch

from gpu.part import Measurement, Setting, SkippedError, attempt

OURS = ["ours, DFT", "ours, DFT, bfloat16 logits", "ours, SFT", "ours, a user's", "ours, sequence, one pass",
        "ours, DFT, all statistics"]  # fmt: skip
PEERS = [name for name in loss_head.CANDIDATES if not name.startswith("ours")]
Found = dict[str, dict[str, float]]


def run(setting: Setting) -> Iterator[Measurement]:
    """Each shape, with each candidate."""
    if setting.dry:
        loss_head.SHAPES["tiny"] = (64, 512)
    for shape in ["tiny"] if setting.dry else ["qwen2.5-0.5b", "qwen2.5-1.5b"]:
        options = argparse.Namespace(
            shape=shape, tokens=256 if setting.dry else 8192, dtype="bfloat16", device=setting.device, repeat=3
        )
        found: Found = {}
        for name in OURS[:1] + PEERS + OURS[1:]:
            yield from attempt(f"{shape}: {name}", timed, name, options, found)
        yield from ratios(shape, found)


def timed(name: str, options: argparse.Namespace, found: Found) -> Iterator[Measurement]:
    """One candidate."""
    if options.device == "cuda":
        torch.cuda.empty_cache()
    try:
        one = found[name] = loss_head.measure(name, options)
    except (ImportError, AttributeError) as error:
        raise SkippedError(f"not here: {error}") from error
    except torch.OutOfMemoryError as error:
        raise SkippedError("the GPU has not enough memory") from error
    unit = f"{one['own_s'] * 1e3:.2f} ms"
    memory = f", {one['bytes'] / 2**20:,.0f} MiB" if options.device == "cuda" else ""
    yield Measurement(f"{options.shape}: {name}, time over that of its products", one["time"], note=unit + memory)


def ratios(shape: str, found: Found) -> Iterator[Measurement]:
    """Of ours to each peer's."""
    for name in PEERS:
        for ours in OURS[:2]:
            if ours in found and name in found:
                mine, theirs = found[ours], found[name]
                memory = f"memory {mine['bytes'] / max(theirs['bytes'], 1):.2f}" if torch.cuda.is_available() else ""
                yield Measurement(f"{shape}: time of {ours} over {name}", mine["own_s"] / theirs["own_s"], note=memory)
