"""Peak memory of the loss head beyond its inputs: ours against all logits at once, each in a process of its own.

python benchmarks/loss_memory.py [--tokens 4096 --vocabulary 49152 --hidden 576 --dtype float32]
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from dft_lightning.logprob import weighted_nll
from dft_lightning.weighting import DFT


def dense(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What trainers do that hold all logits: log-softmax in float32, weight, sum."""
    logp = (hidden @ head.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return -(logp.detach().exp() * logp).sum()


def chunked(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Ours."""
    return weighted_nll(hidden, head, targets, DFT())[0]


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(options: argparse.Namespace) -> None:
    """One forward and backward, in this process."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    hidden = torch.randn(options.tokens, options.hidden, dtype=dtype).requires_grad_()
    head = (0.02 * torch.randn(options.vocabulary, options.hidden)).to(dtype).requires_grad_()
    targets = torch.randint(0, options.vocabulary, (options.tokens,))
    {"dense": dense, "chunked": chunked}[options.only](hidden[:8], head, targets[:8]).backward()  # libraries are loaded
    hidden.grad = head.grad = None
    before, began = peak_bytes(), time.perf_counter()
    loss = {"dense": dense, "chunked": chunked}[options.only](hidden, head, targets)
    loss.backward()
    print(json.dumps({"bytes": peak_bytes() - before, "s": time.perf_counter() - began, "loss": loss.item()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", choices=["dense", "chunked"])
    options = parser.parse_args()
    if options.only:
        measure(options)
        return
    found = {}
    for only in ("dense", "chunked"):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", only]
        found[only] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{options.tokens} tokens, vocabulary {options.vocabulary}, hidden {options.hidden}, {options.dtype}; CPU")
    for only, values in found.items():
        print(f"{only:8} {values['bytes'] / 2**20:8.0f} MiB  {values['s']:6.2f} s  loss {values['loss']:.6g}")
    print(
        f"memory {found['chunked']['bytes'] / found['dense']['bytes']:.3f}, "
        f"time {found['chunked']['s'] / found['dense']['s']:.2f} of the dense computation's"
    )


if __name__ == "__main__":
    main()
