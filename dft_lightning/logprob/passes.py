"""One pass over the chunks of the loss head: logits, the row step, and the products of the gradients.

Shapes: N supervised tokens, R rows of a chunk, k of them that count, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from dft_lightning.logprob.products import Factor, product_
from dft_lightning.logprob.rows import Found, Job, KernelRows, PlainRows, Weigh, kernel_serves, slices
from dft_lightning.logprob.targets import TargetRows

#: Rows of weight 0 are left out of the gradients' products where no more than this share counts: picking costs, too.
_WORTH_PICKING = 0.75


@dataclass
class Gradients:
    """Accumulators (N, H), (V, H), (V,); None where no gradient is asked for: a frozen head costs no dW.

    `weight` holds nothing before the first chunk is written there, `begun`.
    """

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    begun: bool = False

    def wanted(self) -> bool:
        """Whether there is anything to differentiate."""
        return not (self.hidden is None and self.weight is None and self.bias is None)


def run_pass(
    job: Job,
    hidden: Tensor,
    weight: Factor,
    gradients: Gradients,
    weigh: Weigh | None = None,
    borders: list[int] | None = None,
    *,
    targets: bool = True,
) -> Tensor:
    """Go once over the chunks: statistics, weights, the weighted sum (), and the gradients that are wanted.

    Args:
        weigh: where weights come from; by default from the weighting.
        borders: ends of chunks, all rows of which are weighed together; by default `chunk_rows` apart, and weighed in
            blocks.
        targets: whether the weighting's targets over the vocabulary are wanted; a first pass is for weights only.
    """
    loss, found = hidden.new_zeros((), dtype=job.precision.compute), Found(job)
    chunks = list(slices(len(job.target), job.chunk_rows) if borders is None else _between(borders))
    most = max(chunk.stop - chunk.start for chunk in chunks)
    logits = hidden.new_empty((most, weight.forward.shape[0]), dtype=job.precision.logits)
    dtype = weight.backward.dtype if gradients.wanted() else None
    step: Callable[[slice, Tensor], tuple[Tensor, Tensor]]
    if job.weighting.vocabulary and targets:
        reference = job.reference
        head = None if reference is None else reference.rounded(job.head, weight, job.precision)
        step = TargetRows(job, found, logits, dtype, weigh, head)
    elif kernel_serves(logits):
        step = KernelRows(job, found, dtype, weigh)
    else:
        step = PlainRows(job, found, logits, dtype, weigh, borders is not None)
    for chunk in chunks:
        states, z = Factor.of(hidden[chunk], job.precision), logits[: chunk.stop - chunk.start]
        product_(z, states.forward, weight.forward.T)
        total, grad = step(chunk, z)
        loss -= total
        if gradients.wanted():
            _add_products(grad, states, weight, chunk, gradients, _counting(job, found, chunk))
    job.result = found.stats()
    return loss


def _add_products(
    grad: Tensor, states: Factor, weight: Factor, rows: slice, gradients: Gradients, counting: Tensor | None
) -> None:
    """Add a chunk's gradient (R, V), times its factors, to the accumulators."""
    inputs = states.backward
    if counting is not None:
        grad, inputs = grad[counting], inputs[counting]  # (k, V), (k, H)
    if gradients.bias is not None:
        gradients.bias += grad.sum(0, dtype=gradients.bias.dtype)
    if gradients.hidden is not None:
        made = gradients.hidden[rows] if counting is None else gradients.hidden.new_empty(inputs.shape)
        product_(made, grad, weight.backward)
        if counting is not None:
            gradients.hidden[rows].index_copy_(0, counting, made)
    if gradients.weight is not None:
        product_(gradients.weight, grad.T, inputs, add=gradients.begun)
        gradients.begun = True


def _counting(job: Job, found: Found, rows: slice) -> Tensor | None:
    """Which rows (k,) of a chunk have a weight, where leaving the others out pays; on the CPU, as a GPU would wait."""
    if job.target.device.type != "cpu" or rows.stop == rows.start or job.weighting.vocabulary:
        return None
    some = job.coefficient(found.values["weight"][rows], rows).nonzero()[:, 0]
    return some if len(some) <= _WORTH_PICKING * (rows.stop - rows.start) else None


def _between(borders: list[int]) -> Iterator[slice]:
    start = 0
    for border in borders:
        yield slice(start, border)
        start = border
