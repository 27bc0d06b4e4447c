"""The errors of the Triton row kernel against plain torch in float64, as shares of their bounds: 1 is the bound itself.

The bounds are those of the kernel's tests (`tests/logprob/kernel_truth.py`), derived from the number of roundings in
float32 behind each statistic and each entry of the gradient; a narrower gradient adds half a unit in its last place.
Each line is the largest share over all rows and all statistics (log p, log-sum-exp, entropy, top-k entropy, collision,
rank, p of the likeliest token), the weight and the gradient.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from kernel_truth import BUILT_IN, NAMES, TRANSFORMS, Bounds, Mine, Problem, excess, fused_errors, plain, problem
from kernel_truth import score_errors as scores

from dft_lightning.logprob import kernel
from dft_lightning.weighting import DFT, ImportanceWeighted, TokenStats, TokenWeighting
from dft_lightning.weighting.base import checked_weights
from gpu.part import Measurement, Setting, SkippedError, attempt

HALF = torch.bfloat16
#: R, V, block: one logit; fewer logits than a block; vocabularies that are no multiples of it.
SHAPES = [(3, 1, 1), (5, 7, 4), (3, 1000, 256), (2, 4099, 512), (3, 300, 4096)]
#: Rows and vocabulary of a real chunk; 151,937 is odd.
REAL = [(512, 151936), (64, 151937)]


@dataclass(frozen=True)
class Case:
    """One problem for the kernel."""

    shape: tuple[int, int, int]
    transform: str
    weighting: TokenWeighting
    products: torch.dtype
    gradient: torch.dtype

    def __str__(self) -> str:
        rows, vocabulary, block = self.shape
        dtypes = " → ".join(str(dtype).removeprefix("torch.") for dtype in (self.products, self.gradient))
        return f"{self.weighting!r}, {rows} × {vocabulary} in blocks of {block}, {self.transform}, {dtypes}"


def cases() -> list[Case]:
    """Every weighting, transform, shape and pair of dtypes, not all combinations of them: a compilation each."""
    pairs = [(torch.float32, torch.float32), (torch.float32, HALF), (HALF, HALF), (torch.float16, torch.float16)]
    found = [Case((4, 333, 64), name, DFT(), *pairs[0]) for name in TRANSFORMS]
    found += [Case((4, 333, 64), "all", weighting, *pair) for weighting in BUILT_IN for pair in pairs[:3]]
    found += [Case(shape, "plain", DFT(), *pair) for shape in SHAPES for pair in pairs[1:3]]
    return [*dict.fromkeys([*found, Case((4, 1000, 256), "bias", DFT(), *pairs[3])])]


def run(setting: Setting) -> Iterator[Measurement]:
    """All cases; those of a real size on a GPU only."""
    device = torch.device(setting.device)
    if reason := kernel.unsuitable(device):
        raise SkippedError(reason) if setting.dry else RuntimeError(reason)
    for case in cases():
        yield from attempt(f"fused: {case}", fused, case, device)
    for weighting in (Mine(), DFT()):
        yield from attempt(f"two calls: {weighting!r}", two_calls, weighting, device)
    yield from attempt("no rows", no_rows, device)
    yield from attempt("twice the same", twice, device)
    if not setting.dry:
        for rows, vocabulary in REAL:
            for weighting in (DFT(), ImportanceWeighted(level="token")):
                for products in (torch.float32, HALF):
                    real = Case((rows, vocabulary, kernel.BLOCK), "softcap", weighting, products, HALF)
                    yield from attempt(f"fused: {real}", fused, real, device)
        yield from attempt("the host does not wait", no_wait, device)


def _problem(case: Case, device: torch.device) -> Problem:
    return problem(device, *case.shape, case.transform, case.products)


def fused(case: Case, device: torch.device) -> Iterator[Measurement]:
    """Statistics, weight and gradient of one call."""
    errors = fused_errors(_problem(case, device), case.weighting, case.gradient)
    worst = max(errors, key=errors.__getitem__)
    yield Measurement(f"fused: {case}", errors[worst], 1.0, note=f"largest: {worst}")


def two_calls(weighting: TokenWeighting, device: torch.device) -> Iterator[Measurement]:
    """Statistics, then a weight from Python, then the gradient."""
    given = problem(device, 4, 333, 64, "all")
    before = replace(given, logits=given.logits.clone())
    truth = plain(given.wide(), weighting)
    found = given.score()
    tokens = TokenStats(logp=found["logp"], target=given.target, sequence=given.target, ref_logp=given.ref_logp)
    gradient = given.gradient_(found, checked_weights(weighting, tokens) * given.factor)
    errors = scores(before, found, truth)
    errors["gradient"] = excess(gradient, truth.grad, Bounds(before, truth).grad(truth, torch.float32))
    yield Measurement(
        f"two calls: {weighting!r}", max(errors.values()), 1.0, note=f"largest: {max(errors, key=errors.get)}"
    )


def no_rows(device: torch.device) -> Iterator[Measurement]:
    """A chunk may be empty."""
    given = problem(device, 0, 40, 16)
    found, gradient = given.fused_(DFT(), NAMES, HALF)
    wrong = sum(len(value) for value in found.values()) + (tuple(gradient.shape) != (0, 40))
    yield Measurement("no rows: results that are not empty", float(wrong), 0.0)


def twice(device: torch.device) -> Iterator[Measurement]:
    """Nothing is added up in an order that changes."""
    found = []
    for _ in range(2):
        statistics, gradient = problem(device, 64, 4099, 512).fused_(DFT())
        found.append([*statistics.values(), gradient])
    differing = sum(not torch.equal(*pair) for pair in zip(*found, strict=True))
    yield Measurement("twice the same: results that differ in a bit", float(differing), 0.0)


def no_wait(device: torch.device) -> Iterator[Measurement]:
    """torch raises an error where the host would wait for the GPU."""
    given = problem(device, 64, 151936, kernel.BLOCK)
    names = [name for name in NAMES if name != "topk_entropy"]

    def everything() -> None:
        given.gradient_(given.score(names), given.factor)
        given.fused_(DFT(), names, HALF)

    everything()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    yield Measurement("the host waits for the GPU, times", 0.0, 0.0)
