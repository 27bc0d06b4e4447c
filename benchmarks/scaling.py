"""Whether time and memory grow in line with the work: loss head, packing plan and tokenising, by powers of two.

    python benchmarks/scaling.py [--only head-rows packing … --path ROWS.parquet --repeat 3 --fewer 2]

Each measurement has a process of its own; time is the least CPU-seconds of --repeat runs in it (what others on the
machine do counts less), memory the peak beyond what the process held before, both after a small run that loads
libraries. The exponent is the slope of log time over log size, by least squares: 1 is linear, and up to 1.1 is called
so here, as caches spill once on the way up. That of the largest three shows what a constant cost at small sizes would
hide. --fewer leaves out so many of the largest sizes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.meter import forget_peak, peak

from dft_lightning.data import NuminaMathDataModule
from dft_lightning.data.packing import Packed
from dft_lightning.data.steps import Geometry, StepSampler
from dft_lightning.embedded import NAME
from dft_lightning.loading import ModelSource, load_tokenizer
from dft_lightning.logprob import weighted_nll
from dft_lightning.weighting import DFT

WIDTH = 576  # hidden size of SmolLM2-135M
LINEAR = 1.1
CAPACITY = 2048  # tokens of a packed row

Run = Callable[[], Any]


def head(tokens: int, vocabulary: int) -> Run:
    """Loss and gradients, forward and backward."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, requires_grad=True)
    weight = (0.05 * torch.randn(vocabulary, WIDTH)).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,))

    def run() -> None:
        hidden.grad = weight.grad = None
        weighted_nll(hidden, weight, targets, DFT())[0].backward()

    return run


def some_lengths(rows: int) -> np.ndarray:
    """(rows,) tokens of each: log-normal as NuminaMath's are, a median of 350, cut at a row's capacity."""
    drawn = np.random.default_rng(0).lognormal(np.log(350), 0.7, rows)
    return np.clip(drawn, 16, CAPACITY).astype(np.int32)


def plan(rows: int, step: int, seed: int | None = 0) -> Run:
    """The sampler of a run of one epoch and all micro-batches that it deals out, packed."""
    lengths = some_lengths(rows)

    def run() -> int:
        sampler = StepSampler(lengths, Geometry(step, 1), seed, Packed(CAPACITY))
        return sum(1 for _ in sampler)

    return run


def tokenising(rows: int, path: str | None, model: str = NAME) -> Run:
    """Reading, rendering, tokenising, storing and opening so many rows, with an empty cache."""
    tokenizer = load_tokenizer(ModelSource(model))
    folder = tempfile.TemporaryDirectory()
    source = write_rows(rows, path, Path(folder.name))
    tries = iter(range(1000))

    def run() -> int:
        cache = Path(folder.name) / f"cache-{next(tries)}"
        data = NuminaMathDataModule(str(source), max_length=CAPACITY, cache_dir=str(cache), tokenize_workers=0)
        data.tokenizer = tokenizer
        data.prepare_data()
        data.setup("fit")
        return len(data.train_rows or ())

    run.folder = folder  # type: ignore[attr-defined]  # removed with the last reference
    return run


def write_rows(rows: int, path: str | None, folder: Path) -> Path:
    """A parquet file of so many rows: those of `path`, over and over, or sums."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path is None:
        numbers = range(rows)
        problems = [f"What is {one} + {one % 97}?" for one in numbers]
        answers = [" ".join([f"We add {one % 97} to {one}."] * (1 + one % 20)) for one in numbers]
        table = pa.table({"problem": problems, "solution": answers})
    else:
        found = pq.read_table(path, columns=["problem", "solution"])
        table = found.take(pa.array(np.arange(rows) % len(found)))
    pq.write_table(table, folder / "rows.parquet")
    return folder / "rows.parquet"


@dataclass(frozen=True)
class Kind:
    """What is measured: its name in the table, the first and last power of two, and how to make a run of a size."""

    title: str
    first: int
    last: int
    make: Callable[[int, argparse.Namespace], Run]


KINDS = {
    "head-rows": Kind("loss head, tokens (vocabulary 16,384)", 9, 14, lambda size, _: head(size, 1 << 14)),
    "head-vocabulary": Kind("loss head, vocabulary (1,024 tokens)", 12, 17, lambda size, _: head(1024, size)),
    "packing": Kind("packing plan of an epoch, rows (steps of 256)", 12, 20, lambda size, _: plan(size, 256)),
    "packing-one-step": Kind("packing plan, rows of a single step", 12, 20, lambda size, _: plan(size, size)),
    "tokenising": Kind("tokenising, rows", 11, 15, lambda size, options: tokenising(size, options.path)),
}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log value over log size, by least squares."""
    x, y = np.log(np.asarray(sizes, float)), np.log(np.asarray(values, float))
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())


def measure(run: Run, repeat: int, warm: Run) -> dict[str, float]:
    """Least CPU-seconds of some runs, and the peak of memory of all, in bytes; `warm` has libraries loaded first."""
    seconds = []
    warm()
    before = forget_peak()
    for _ in range(repeat):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    return {"seconds": min(seconds), "bytes": max(peak() - before, 1)}


def in_a_process(name: str, size: int, options: argparse.Namespace) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--only", name, "--in-this-process", str(size)]
    command += ["--repeat", str(options.repeat), *(["--path", options.path] if options.path else [])]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # all of this runs on the CPU
    done = subprocess.run(command, capture_output=True, text=True, env=hidden)
    if done.returncode:
        sys.exit(f"{name} of {size} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def table_row(title: str, sizes: Sequence[int], found: Sequence[dict[str, float]]) -> str:
    """Time and memory at both ends, the exponents of both, and whether time is linear."""
    seconds = [one["seconds"] for one in found]
    slope, last = exponent(sizes, seconds), exponent(sizes[-3:], seconds[-3:])
    ends = [f"{one['seconds']:.3g} s, {one['bytes'] / 2**20:.0f} MiB" for one in (found[0], found[-1])]
    memory = exponent(sizes, [one["bytes"] for one in found])
    verdict = "linear" if slope <= LINEAR else "NOT linear"
    cells = [title, f"{sizes[0]:,} … {sizes[-1]:,}", *ends, *(f"{one:.2f}" for one in (slope, last, memory)), verdict]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--path", help="rows to tokenise, in NuminaMath-CoT's schema; made up without it")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--fewer", type=int, default=0, help="leave out so many of the largest sizes")
    parser.add_argument("--in-this-process", type=int, metavar="SIZE")
    options = parser.parse_args()
    if options.in_this_process:
        kind = KINDS[options.only[0]]
        warm, run = (kind.make(size, options) for size in (1 << kind.first - 3, options.in_this_process))
        print(json.dumps(measure(run, options.repeat, warm)))
        return
    print("| | sizes | at the smallest | at the largest | exponent of time | largest three | exponent of memory | |")
    print("|---" * 8 + "|", flush=True)
    for name in options.only:
        kind = KINDS[name]
        sizes = [1 << power for power in range(kind.first, kind.last + 1 - options.fewer)]
        print(table_row(kind.title, sizes, [in_a_process(name, size, options) for size in sizes]), flush=True)


if __name__ == "__main__":
    main()
