"""One pass over the chunks of the loss head: logits, the row step in place, and the products of the gradients.

The row step turns a block of logits into statistics, weights and, in the same memory, the gradient by the logits. On
the CPU a block is some rows that stay in cache, on a GPU a whole chunk.

Shapes: N supervised tokens, R rows of a chunk, b rows of a block, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from dft_lightning.logprob.head import LogitTransform, statistics
from dft_lightning.weighting.base import TokenStats, TokenWeighting

#: Bytes of logits that stay in a core's cache between the steps over them (a block), on the CPU.
_BLOCK_BYTES = 3 * 2**20
#: Bytes that the logits of one chunk may take.
_CHUNK_BYTES = {"cpu": 100 * 2**20, "cuda": 2 * 2**30}

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
    compute: torch.dtype  # of logits, statistics and weights
    product: torch.dtype  # of the factors of the matrix products
    differentiate: bool
    result: TokenStats = field(init=False)

    def coefficient(self, weight: Tensor, rows: slice) -> Tensor:
        """sg(w)·n of some rows."""
        return weight if self.factor is None else weight * self.factor[rows]


@dataclass
class Gradients:
    """Accumulators (N, H), (V, H), (V,); None where no gradient is asked for: a frozen head costs no dW."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    def wanted(self) -> bool:
        """Whether there is anything to differentiate."""
        return not (self.hidden is None and self.weight is None and self.bias is None)


@dataclass
class _Block:
    """Some rows after the row step has begun: `exp` (b, V) is exp(logits − top), and lies where the logits were."""

    rows: slice
    exp: Tensor
    total: Tensor  # (b,) the sum of exp
    capped: Tensor | None  # (b, V) the logits, where the soft-cap's derivative needs them


class _Found:
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


def default_rows(device: torch.device, vocabulary: int) -> int:
    """How many rows' logits to hold at a time."""
    allowed = _CHUNK_BYTES["cuda"]
    if device.type == "cpu":
        allowed = _CHUNK_BYTES["cpu"]
    elif device.type == "cuda":
        allowed = min(allowed, torch.cuda.mem_get_info(device)[0] // 4)
    rows = allowed // (4 * vocabulary)
    step = 16 if device.type == "cpu" else 128
    return max(step, rows // step * step)


def run_pass(
    job: Job, hidden: Tensor, weight: "Factor", gradients: Gradients, weigh: Weigh, borders: list[int] | None = None
) -> Tensor:
    """Go once over the chunks: statistics, weights, the weighted sum (), and the gradients that are wanted.

    Args:
        borders: ends of chunks, all rows of which are weighed together; by default `chunk_rows` apart, and weighed in
            blocks.
    """
    loss, found = hidden.new_zeros((), dtype=job.compute), _Found(job)
    chunks = list(_slices(len(job.target), job.chunk_rows) if borders is None else _between(borders))
    most = max(chunk.stop - chunk.start for chunk in chunks)
    logits = hidden.new_empty((most, weight.forward.shape[0]), dtype=job.compute)
    size = _block_rows(logits)
    for chunk in chunks:
        states, z = Factor.of(hidden[chunk], job), logits[: chunk.stop - chunk.start]
        product_(z, states.forward, weight.forward.T)
        blocks = (_score(job, chunk, part, z[part], gradients, found) for part in _slices(len(z), size))
        for together in ([block] for block in blocks) if borders is None else [list(blocks)]:
            loss -= _weigh_blocks(job, together, weigh, gradients, found)
        if gradients.wanted():
            _add_products(job, z, states, weight, chunk, gradients)
    job.result = found.stats()
    return loss


def _score(job: Job, chunk: slice, part: slice, logits: Tensor, gradients: Gradients, found: _Found) -> _Block:
    """The statistics of a block, a part of a chunk; overwrites the raw products (b, V)."""
    rows = slice(chunk.start + part.start, chunk.start + part.stop)
    z = job.transform.forward_(logits)
    target_logit = z.gather(1, job.target[rows, None])[:, 0]
    top = z.amax(1)
    capped = z.clone() if job.transform.softcap is not None and gradients.wanted() else None
    kept = z.clone() if job.names and capped is None else capped
    exp = z.sub_(top[:, None]).exp_()
    total = exp.sum(1)
    log_total = total.log()
    found.put(rows, logp=(target_logit - top) - log_total)
    if kept is not None:
        found.put(rows, **statistics(job.names, kept, top + log_total, target_logit))
    return _Block(rows, exp, total, capped)


def _weigh_blocks(job: Job, blocks: list[_Block], weigh: Weigh, gradients: Gradients, found: _Found) -> Tensor:
    """Weigh some blocks together, finish their row step, and return Σ sg(w)·n·log π."""
    rows = slice(blocks[0].rows.start, blocks[-1].rows.stop)
    stats = found.stats(rows)
    weights = weigh(replace(stats, weight=None), rows)
    found.put(rows, weight=weights)
    coefficient = job.coefficient(weights, rows)
    if gradients.wanted():
        at_target = coefficient * torch.expm1(stats.logp)  # w·n·(p − 1), without cancellation
        for block in blocks:
            own = slice(block.rows.start - rows.start, block.rows.stop - rows.start)
            grad = block.exp.mul_((coefficient[own] / block.total)[:, None])
            grad.scatter_(1, stats.target[own, None], at_target[own, None])
            job.transform.backward_(grad, block.capped)
    return (coefficient * stats.logp).sum()


def _add_products(
    job: Job, grad: Tensor, states: "Factor", weight: "Factor", rows: slice, gradients: Gradients
) -> None:
    """Add a chunk's gradient (R, V), times its factors, to the accumulators."""
    if gradients.bias is not None:
        gradients.bias += grad.sum(0)
    rounded = grad.to(weight.backward.dtype)
    if gradients.hidden is not None:
        product_(gradients.hidden[rows], rounded, weight.backward)
    if gradients.weight is not None:
        product_(gradients.weight, rounded.T, states.backward, add=True)


@dataclass
class Factor:
    """A factor of the products, rounded to their dtype, as each product wants it held."""

    forward: Tensor
    backward: Tensor

    @staticmethod
    def of(tensor: Tensor, job: Job) -> "Factor":
        """On a GPU in the products' dtype.

        On a CPU the logits are to be float32, and its bfloat16 products return bfloat16: so the factors are held in
        float32, and oneDNN multiplies them as bfloat16 where the processor has tiles for that (see `fast_products`).
        Without tiles that is no faster than float32; then the gradients, which end in bfloat16, use bfloat16 products.
        """
        rounded = tensor.to(job.product)
        if tensor.device.type != "cpu":
            return Factor(rounded, rounded)
        wide = rounded.to(job.compute)
        return Factor(wide, rounded if job.product == torch.bfloat16 and only_native_bfloat16() else wide)


@cache
def only_native_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 fast, but not in tiles."""
    fast, tiles = (getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("avx512_bf16", "amx_tile"))
    return bool(fast()) and not tiles()


def product_(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """a @ b, or that added, into `out`, accumulated in its precision."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=float(add), out=out)
        return
    made = torch.mm(a, b) if a.device.type == "cpu" else torch.mm(a, b, out_dtype=out.dtype)
    if add:
        out += made
    else:
        out.copy_(made)


@contextmanager
def fast_products(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """On the CPU, multiply float32 tensors as bfloat16, at its speed, where the products are to be in bfloat16.

    oneDNN rounds its inputs to bfloat16, sums in float32 and returns float32.
    """
    backend = torch.backends.mkldnn.matmul if hasattr(torch.backends.mkldnn, "matmul") else None
    if device.type != "cpu" or dtype != torch.bfloat16 or backend is None:
        yield
        return
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


def _block_rows(logits: Tensor) -> int:
    if logits.device.type != "cpu":
        return max(len(logits), 1)
    return max(1, _BLOCK_BYTES // (logits.shape[1] * logits.element_size()))


def _slices(count: int, size: int) -> Iterator[slice]:
    """One empty slice where there are no rows, so that N = 0 needs no code of its own."""
    for start in range(0, max(count, 1), size):
        yield slice(start, min(start + size, count))


def _between(borders: list[int]) -> Iterator[slice]:
    start = 0
    for border in borders:
        yield slice(start, border)
        start = border
