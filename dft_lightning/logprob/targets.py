"""The row step for weightings with a target over the vocabulary: `TokenWeighting.targets`.

A chunk's logits become the gradient in the same memory; what is as large as the vocabulary beside them is held for a
block of rows at a time. In plain torch on every device.

Shapes: N supervised tokens, R rows of a chunk, b rows of a block, H hidden size, V vocabulary.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dft_lightning.logprob.head import LogitTransform, statistics
from dft_lightning.logprob.products import Factor, Precision, product_
from dft_lightning.logprob.rows import Found, Job, Weigh, block_rows, slices
from dft_lightning.weighting.base import checked_targets

#: Bytes of a block on a GPU; some ten tensors of this size are held at a time.
GPU_BLOCK_BYTES = 64 * 2**20


@dataclass
class ReferenceHead:
    """Where the log-probabilities of a reference over the whole vocabulary come from.

    Args:
        hidden: (N, H') its last hidden states at the supervised positions.
        weight: (V, H') its output embedding.
        transform: what it does to its logits.
    """

    hidden: Tensor
    weight: Tensor
    transform: LogitTransform = field(default_factory=LogitTransform)

    def rounded(self, own: Tensor, factor: Factor, precision: Precision) -> Factor:
        """The head as the products want it; that of the model itself is not held twice."""
        return factor if self.weight is own else Factor.of(self.weight.detach(), precision)


@dataclass
class TargetRows:
    """See `PlainRows`; the gradient may be None where only the loss is wanted.

    Args:
        logits: (R, V) the memory of a chunk's logits.
        gradient: dtype of the gradient by the raw products; None where none is wanted.
        weigh: see `Found.weigh`.
        head: the reference's head, where there is a reference.
    """

    job: Job
    found: Found
    logits: Tensor
    gradient: torch.dtype | None
    weigh: Weigh | None
    head: Factor | None

    def __post_init__(self) -> None:
        vocabulary = self.logits.shape[1]
        on_cpu = self.logits.device.type == "cpu"
        size = self.job.precision.compute.itemsize * vocabulary
        self.size = block_rows(vocabulary, self.job.precision.compute) if on_cpu else max(1, GPU_BLOCK_BYTES // size)
        other = self.gradient not in (None, self.logits.dtype)
        self.out = torch.empty_like(self.logits, dtype=self.gradient) if other else self.logits
        self.reference = None if self.head is None else torch.empty_like(self.logits)
        # One tensor each for all blocks: small ones between large ones would keep their memory from being used again.
        self.top, self.log_total = self.logits.new_empty((2, len(self.logits)), dtype=self.job.precision.compute)

    def __call__(self, chunk: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Overwrites raw products (R, V); Σ sg(w)·n·log π + Σ n·q·log π of the rows, and their gradient (R, V)."""
        parts = list(slices(len(logits), self.size))
        for part in parts:
            self._score(chunk, part, logits[part])
        coefficient = self.job.coefficient(self.found.weigh(chunk, self.weigh), chunk)
        reference, total = self._reference(chunk), torch.zeros_like(coefficient.sum())
        for part in parts:
            total += self._finish(chunk, part, logits[part], coefficient[part], _some(reference, part))
        return total, self.out[: len(logits)]

    def _logits(self, raw: Tensor) -> Tensor:
        """Logits (b, V) of raw products, in the compute precision, beside them."""
        return self.job.transform.forward_(raw.to(self.job.precision.compute, copy=True))

    def _score(self, chunk: slice, part: slice, raw: Tensor) -> None:
        """Note log p, the statistics of a block, and what its log-softmax takes."""
        rows, z = _rows(chunk, part), self._logits(raw)
        top, log_total = self.top[part], self.log_total[part]
        torch.amax(z, 1, out=top)
        torch.log((z - top[:, None]).exp_().sum(1), out=log_total)
        target_logit = z.gather(1, self.job.target[rows, None])[:, 0]
        self.found.put(rows, logp=(target_logit - top) - log_total)
        if self.job.names:
            self.found.put(rows, **statistics(self.job.names, z, top + log_total, target_logit))

    def _reference(self, chunk: slice) -> Tensor | None:
        """The reference's raw products (R, V) of a chunk."""
        given = self.job.reference
        if given is None or self.reference is None or self.head is None:
            return None
        states = Factor.of(given.hidden[chunk], self.job.precision)
        out = self.reference[: chunk.stop - chunk.start]
        product_(out, states.forward, self.head.forward.T)
        return out

    def _finish(self, chunk: slice, part: slice, raw: Tensor, coefficient: Tensor, reference: Tensor | None) -> Tensor:
        """Find a block's targets, put its gradient where it goes, and return its share of the weighted sum, ()."""
        job, rows = self.job, _rows(chunk, part)
        z = self._logits(raw)
        logp = (z - self.top[part, None]) - self.log_total[part, None]
        ref_logp = None
        if reference is not None and job.reference is not None:
            wide = reference.to(job.precision.compute, copy=True)
            ref_logp = _log_softmax(job.reference.transform.forward_(wide))
        q = checked_targets(job.weighting, self.found.stats(rows), logp, ref_logp)
        weight = self.found.values["weight"][rows]
        weight += q.gather(1, job.target[rows, None])[:, 0]  # all that the given word is worth
        if job.factor is not None:
            q = q * job.factor[rows, None]
        own = self.found.values["logp"][rows]
        total = (coefficient * own).sum() + torch.where(q == 0.0, 0.0, q * logp).sum()
        if self.gradient is not None:
            grad = target_gradient(logp.exp_(), q, coefficient, own, job.target[rows, None])
            job.transform.backward_(grad, z)
            self.out[part] = grad.mul_(job.precision.lift)
        return total


def target_gradient(p: Tensor, q: Tensor, coefficient: Tensor, logp: Tensor, target: Tensor) -> Tensor:
    """(c + Σq)·p − c·onehot − q, (b, V); the given token's c·(p − 1) without cancellation."""
    grad = torch.addcmul(q.neg(), p, q.sum(1, keepdim=True))
    at_target = grad.gather(1, target) + (coefficient * torch.expm1(logp))[:, None]
    return grad.addcmul_(p, coefficient[:, None]).scatter_(1, target, at_target)


def _log_softmax(z: Tensor) -> Tensor:
    """As that of the model itself: for equal logits equal to the bit."""
    top = z.amax(1, keepdim=True)
    return (z - top) - (z - top).exp_().sum(1, keepdim=True).log_()


def _rows(chunk: slice, part: slice) -> slice:
    return slice(chunk.start + part.start, chunk.start + part.stop)


def _some(values: Tensor | None, part: slice) -> Tensor | None:
    return None if values is None else values[part]
