"""The row step of the loss head: a chunk's logits become statistics, weights and, in the same memory, their gradient.

In plain torch, block by block so that a block stays in a CPU's cache between the steps over it; or by a kernel.

Shapes: N supervised tokens, R rows of a chunk, b rows of a block, V vocabulary.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dft_lightning.logprob import kernel
from dft_lightning.logprob.head import LogitTransform, statistics
from dft_lightning.logprob.products import Precision
from dft_lightning.weighting.base import TokenStats, TokenWeighting, checked_weights

if TYPE_CHECKING:
    from dft_lightning.logprob.targets import ReferenceHead

#: Bytes of logits that stay in a core's cache between the steps over them (a block), on the CPU.
_BLOCK_BYTES = 3 * 2**20

Weigh = Callable[[TokenStats, slice], Tensor]
"""From the statistics of some rows, and which rows these are, to their weights."""


@dataclass
class Job:
    """One call's facts, and (in `result`) what it found out about the tokens."""

    weighting: TokenWeighting
    target: Tensor
    sequence: Tensor
    brought: dict[str, Tensor]
    progress: float
    factor: Tensor | None
    transform: LogitTransform
    known: Tensor | None
    names: frozenset[str]
    chunk_rows: int
    kept_rows: int  # of a chunk that spares a second pass
    precision: Precision
    differentiate: bool
    head: Tensor  # as it was given
    reference: "ReferenceHead | None" = None
    result: TokenStats = field(init=False)

    def coefficient(self, weight: Tensor, rows: slice) -> Tensor:
        """sg(w)·n of some rows."""
        return weight if self.factor is None else weight * self.factor[rows]


class Found:
    """What a pass finds out about the N tokens, each in one tensor from the start.

    A small tensor a block would lie between the large ones, and keep their memory from being used again.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.values: dict[str, Tensor] = {}

    def put(self, rows: slice, **values: Tensor) -> None:
        """Note values (b,) of some rows."""
        for name, value in values.items():
            if name not in self.values:
                self.values[name] = value.new_empty(len(self.job.target))
            self.values[name][rows] = value

    def stats(self, rows: slice = slice(None)) -> TokenStats:
        """All that is known of some rows."""
        job = self.job
        known = {**job.brought, **self.values}
        return TokenStats(
            target=job.target[rows],
            sequence=job.sequence[rows],
            progress=job.progress,
            **{name: value[rows] for name, value in known.items()},
        )

    def weigh(self, rows: slice, weigh: Weigh | None) -> Tensor:
        """The weights (b,) of some rows, noted; by the weighting itself if nothing else is given."""
        stats = replace(self.stats(rows), weight=None)
        weights = checked_weights(self.job.weighting, stats) if weigh is None else weigh(stats, rows)
        self.put(rows, weight=weights)
        return weights


@dataclass
class _Block:
    """Some rows after the row step has begun: `exp` (b, V) is exp(logits − top), and lies where the logits were."""

    rows: slice
    part: slice  # of the chunk
    exp: Tensor
    total: Tensor  # (b,) the sum of exp
    capped: Tensor | None  # (b, V) the logits, where the soft-cap's derivative needs them


@dataclass
class PlainRows:
    """The row step in plain torch.

    Args:
        logits: (R, V) the memory of a chunk's logits.
        gradient: dtype of the gradient by the raw products; None where none is wanted.
        weigh: see `Found.weigh`.
        together: whether all rows of a chunk are weighed together, or each block by itself.
    """

    job: Job
    found: Found
    logits: Tensor
    gradient: torch.dtype | None
    weigh: Weigh | None
    together: bool

    def __post_init__(self) -> None:
        compute, rows = self.job.precision.compute, len(self.logits)
        cached = self.logits.device.type == "cpu"
        self.size = block_rows(self.logits.shape[1], compute) if cached else max(rows, 1)
        held = rows if self.together else min(self.size, rows)
        self.in_place = self.logits.dtype == compute
        shape = self.logits.shape[1:]
        self.work = self.logits if self.in_place else self.logits.new_empty((held, *shape), dtype=compute)
        self.out = self.logits  # where the gradient goes
        if self.gradient not in (None, self.logits.dtype):
            self.out = self.logits.new_empty((rows, *shape), dtype=self.gradient)

    def __call__(self, chunk: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Overwrites raw products (R, V); Σ sg(w)·n·log π of the rows, and their gradient (R, V)."""
        blocks = (self._score(chunk, part, logits) for part in slices(len(logits), self.size))
        groups = [list(blocks)] if self.together else ([block] for block in blocks)
        total = torch.stack([self._weigh(group) for group in groups]).sum()
        return total, self.out[: len(logits)]

    def _score(self, chunk: slice, part: slice, logits: Tensor) -> _Block:
        """The statistics of a block."""
        job, rows = self.job, slice(chunk.start + part.start, chunk.start + part.stop)
        z = logits[part]
        if not self.in_place:
            z = self.work[part if self.together else slice(0, len(z))].copy_(z)
        z = job.transform.forward_(z)
        target_logit = z.gather(1, job.target[rows, None])[:, 0]
        top = z.amax(1)
        capped = z.clone() if job.transform.softcap is not None and self.gradient is not None else None
        kept = z.clone() if job.names and capped is None else capped
        exp = z.sub_(top[:, None]).exp_()
        total = exp.sum(1)
        log_total = total.log()
        self.found.put(rows, logp=(target_logit - top) - log_total)
        if kept is not None:
            self.found.put(rows, **statistics(job.names, kept, top + log_total, target_logit))
        return _Block(rows, part, exp, total, capped)

    def _weigh(self, blocks: list[_Block]) -> Tensor:
        """Weigh some blocks together, finish their row step, and return Σ sg(w)·n·log π."""
        rows = slice(blocks[0].rows.start, blocks[-1].rows.stop)
        coefficient = self.job.coefficient(self.found.weigh(rows, self.weigh), rows)
        logp, target = self.found.values["logp"][rows], self.job.target[rows]
        lifted = coefficient * self.job.precision.lift
        at_target = lifted * torch.expm1(logp)  # w·n·(p − 1), without cancellation
        for block in blocks if self.gradient is not None else ():
            own = slice(block.rows.start - rows.start, block.rows.stop - rows.start)
            grad = block.exp.mul_((lifted[own] / block.total)[:, None])
            grad.scatter_(1, target[own, None], at_target[own, None])
            self.job.transform.backward_(grad, block.capped)
            if self.out is not self.work:
                self.out[block.part] = grad
        return (coefficient * logp).sum()


@dataclass
class KernelRows:
    """The same by kernels, a chunk at a time: one for the weightings that they know, else two with Python between."""

    job: Job
    found: Found
    gradient: torch.dtype | None
    weigh: Weigh | None

    def __call__(self, chunk: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See `PlainRows`."""
        job, grad = self.job, logits
        target, transform = job.target[chunk], job.transform
        if self.gradient is not None and self.weigh is None and kernel.fuses(job.weighting):
            factor = None if job.factor is None else job.factor[chunk]
            if job.precision.lift != 1.0:
                factor = torch.full_like(logits[:, 0], 1.0, dtype=torch.float32) if factor is None else factor
                factor = factor * job.precision.lift
            ref_logp = job.brought["ref_logp"][chunk] if "ref_logp" in job.brought else None
            stats, grad = kernel.fused_(
                logits, target, job.weighting, factor, ref_logp, transform, job.names, self.gradient
            )
            del stats["lse"]
            self.found.put(chunk, **stats)
            return (job.coefficient(stats["weight"], chunk) * stats["logp"]).sum(), grad
        stats = kernel.score(logits, target, transform, job.names)
        lse = stats.pop("lse")
        self.found.put(chunk, **stats)
        coefficient = job.coefficient(self.found.weigh(chunk, self.weigh), chunk)
        if self.gradient is not None:
            lifted = coefficient * job.precision.lift
            grad = kernel.gradient_(logits, target, stats["logp"], lse, lifted, transform, self.gradient)
        return (coefficient * stats["logp"]).sum(), grad


def block_rows(vocabulary: int, compute: torch.dtype) -> int:
    """Rows of a block on a CPU."""
    return max(1, _BLOCK_BYTES // (vocabulary * compute.itemsize))


def kernel_serves(logits: Tensor) -> bool:
    """Whether the kernel can be used on these logits; on a GPU, the reason why not is said once."""
    if logits.dtype == torch.float64:
        return False
    reason = kernel.unsuitable(logits.device)
    if reason is not None and logits.device.type != "cpu":
        _say_once(reason)
    return reason is None


@cache
def _say_once(reason: str) -> None:
    warnings.warn(f"the loss head takes its plain path, which is slower than its kernel: {reason}", stacklevel=2)


def slices(count: int, size: int) -> Iterator[slice]:
    """One empty slice where there are no rows, so that N = 0 needs no code of its own."""
    for start in range(0, max(count, 1), size):
        yield slice(start, min(start + size, count))
