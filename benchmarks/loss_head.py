"""The loss head against its limit and its rivals: time, CPU-seconds and peak memory, each in a process of its own.

    python benchmarks/loss_head.py [--shape smollm2-135m --tokens 4096 --dtype float32 --repeat 3] [--only NAME …]

The limit (floor) is the three matrix products of the loss, logits, dX and dW, in chunks, measured in the same process
around every run; figures are ratios to it. With --dtype bfloat16, products have bfloat16 factors, and float32 logits
but where it says otherwise: there, and for the rivals, the floor's logits are bfloat16 too.
Memory is the peak beyond hidden states, head and targets. A rival that cannot run here is named with its reason.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dft_lightning.logprob import weighted_nll
from dft_lightning.logprob.products import Factor, Precision, default_rows, fast_products, product_
from dft_lightning.weighting import DFT, TokenStats, TokenWeighting, Uniform

SHAPES = {
    "smollm2-135m": (576, 49152),
    "qwen2.5-0.5b": (896, 151936),
    "qwen2.5-1.5b": (1536, 151936),
    "llama-3.2-1b": (2048, 128256),
    "qwen2.5-7b": (3584, 152064),
    "llama-3.1-8b": (4096, 128256),
}
SEQUENCE = 128  # tokens of a sequence here


@dataclass(frozen=True)
class Sentence(TokenWeighting):
    """The geometric mean of p over the response."""

    scope = "sequence"

    def weights(self, tokens: TokenStats) -> Tensor:
        return tokens.sequence_mean(tokens.logp).exp()


@dataclass(frozen=True)
class Own(TokenWeighting):
    """A user's, of the target's probability alone."""

    def weights(self, tokens: TokenStats) -> Tensor:
        return tokens.p**0.5 * (1 - tokens.p)


def ours(weighting: TokenWeighting, wanted: tuple[str, ...] = (), **more: Any) -> Callable[..., Tensor]:
    def loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        sequence = torch.arange(len(targets), device=targets.device) // SEQUENCE
        return weighted_nll(hidden, head, targets, weighting, sequence=sequence, wanted=wanted, **more)[0]

    return loss


def dense(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """What trainers do that hold all logits: log-softmax in float32, weight, sum."""
    logp = (hidden @ head.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return -(logp.detach().exp() * logp).sum()


def compiled(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    global _COMPILED
    _COMPILED = _COMPILED or torch.compile(dense)
    return _COMPILED(hidden, head, targets)


_COMPILED: Any = None


def linear_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """torch's own, which takes a weight a token only by `reduction="none"`."""
    nll = F.linear_cross_entropy(hidden, head, targets, reduction="none")
    return (torch.exp(-nll.detach()) * nll).sum()


def liger(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, head, targets, reduction="sum", use_token_scaling=True)


def cut_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cce

    nll = cce(hidden, head, targets, reduction="none")
    return (torch.exp(-nll.detach()) * nll).sum()


CANDIDATES: dict[str, Callable[..., Tensor]] = {
    "ours, SFT": ours(Uniform()),
    "ours, DFT": ours(DFT()),
    "ours, a user's": ours(Own()),
    "ours, DFT, entropy": ours(DFT(), ("entropy",)),
    "ours, DFT, all statistics": ours(DFT(), ("entropy", "topk_entropy", "collision", "rank", "top_p")),
    "ours, sequence, one pass": ours(Sentence()),
    "ours, sequence, two passes": ours(Sentence(), chunk_rows=SEQUENCE - 1),
    "ours, DFT, bfloat16 logits": ours(DFT(), logits=torch.bfloat16),
    "ours, sequence, bfloat16 logits": ours(Sentence(), logits=torch.bfloat16),
    "dense, DFT": dense,
    "torch.compile of dense, DFT": compiled,
    "F.linear_cross_entropy, DFT": linear_cross_entropy,
    "Liger, DFT": liger,
    "cut-cross-entropy, DFT": cut_cross_entropy,
}


def floor(hidden: Tensor, head: Tensor, rows: int, logits_dtype: torch.dtype) -> None:
    """Logits, dX and dW by the products that the loss uses, and nothing else."""
    precision = Precision(torch.float32, hidden.dtype, logits_dtype)
    weight: Factor = Factor.of(head.detach(), precision)
    logits = torch.empty(rows, len(head), device=hidden.device, dtype=logits_dtype)
    dx, dw = torch.empty(hidden.shape, device=hidden.device), torch.zeros(head.shape, device=hidden.device)
    grad = torch.empty_like(logits, dtype=weight.backward.dtype)
    with fast_products(hidden.dtype, hidden.device):
        for start in range(0, len(hidden), rows):
            states = Factor.of(hidden.detach()[start : start + rows], precision)
            size = len(states.forward)
            product_(logits[:size], states.forward, weight.forward.T)
            product_(dx[start : start + rows], grad[:size], weight.backward)
            product_(dw, grad[:size].T, states.backward, add=True)


def timed(run: Callable[[], Any], device: str) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    wait()
    return time.perf_counter() - wall, time.process_time() - cpu


def peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """One candidate, in this process: ratios to the floor measured beside it, and its own peak of memory."""
    torch.manual_seed(0)
    width, vocabulary = SHAPES[options.shape]
    dtype, device = getattr(torch, options.dtype), options.device
    hidden = torch.randn(options.tokens, width, device=device).to(dtype).requires_grad_()
    head = (0.05 * torch.randn(vocabulary, width, device=device)).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (options.tokens,), device=device)

    def run() -> None:
        hidden.grad = head.grad = None
        CANDIDATES[name](hidden, head, targets).backward()

    small = head.detach()[:SEQUENCE].clone().requires_grad_()
    CANDIDATES[name](hidden[:SEQUENCE], small, targets[:SEQUENCE] % SEQUENCE).backward()  # libraries are loaded
    if device == "cuda":  # the head was made in float32, and other candidates may have run before
        torch.cuda.reset_peak_memory_stats()
    before = peak(device)
    first = timed(run, device)
    memory = peak(device) - before
    rows = min(options.tokens, default_rows(hidden.device, vocabulary))
    narrow = dtype == torch.bfloat16 and ("bfloat16 logits" in name or not name.startswith("ours"))
    limit_of = lambda: floor(hidden, head, rows, torch.bfloat16 if narrow else torch.float32)  # noqa: E731
    limit_of()
    pairs = []
    for _ in range(options.repeat):
        limit, spent = timed(limit_of, device), timed(run, device)
        pairs.append((spent[0] / limit[0], spent[1] / max(limit[1], 1e-9), limit[0], spent[0]))
    time_ratio, cpu_ratio, limit_s, own_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {"time": time_ratio, "cpu": cpu_ratio, "floor_s": limit_s, "own_s": own_s, "first_s": first[0],
            "bytes": memory}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(CANDIDATES))
    parser.add_argument("--in-this-process", action="store_true")
    options = parser.parse_args()
    if options.in_this_process:
        print(json.dumps(measure(options.only[0], options)))
        return
    width, vocabulary = SHAPES[options.shape]
    print(f"{options.shape}: {options.tokens} tokens × {width} × {vocabulary}, {options.dtype}, {options.device}\n")
    print("| | time / floor | CPU-seconds / floor's | peak memory | time | floor |\n|---|---|---|---|---|---|")
    shared = list(sys.argv[1:])
    if "--only" in shared:
        shared = shared[: shared.index("--only")]
    for name in options.only:
        command = [sys.executable, __file__, *shared, "--in-this-process", "--only", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"| {name} | – {done.stderr.strip().splitlines()[-1][:90]} | | | | |", flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        cells = (
            f"{found['time']:.2f}",
            f"{found['cpu']:.2f}",
            f"{found['bytes'] / 2**20:.0f} MiB",
            f"{found['own_s']:.2f} s",
            f"{found['floor_s']:.2f} s",
        )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
