"""The weighted sum of negative log-likelihoods, and its gradients, without ever holding all logits.

Since a weight is detached and, for most weightings, a function of its own token's statistics, the gradient by the
logits, w·n·(softmax − onehot), is known as soon as the logits of a chunk are: one pass over chunks of rows makes value
and gradients with three matrix products (logits, dX, dW). A weighting that looks at whole sequences gets a first pass
that keeps log p and the statistics only, and a second one that makes the gradients.

Shapes: N supervised tokens, R rows of a chunk, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dft_lightning.logprob.head import LogitTransform, statistics
from dft_lightning.weighting.base import (
    BROUGHT_ALONG,
    DISTRIBUTION_STATISTICS,
    TokenStats,
    TokenWeighting,
    checked_weights,
)

#: Bytes that the logits of one chunk may take, in float32.
_CHUNK_BYTES = {"cpu": 100 * 2**20, "cuda": 2 * 2**30}


def weighted_nll(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    weighting: TokenWeighting,
    *,
    sequence: Tensor | None = None,
    factor: Tensor | None = None,
    transform: LogitTransform | None = None,
    progress: float = 0.0,
    wanted: Iterable[str] = (),
    weight: Tensor | None = None,
    chunk_rows: int | None = None,
    **brought: Tensor,
) -> tuple[Tensor, TokenStats]:
    """Σ_t sg(w_t)·n_t·(−log π(y_t)) over N supervised positions, and the statistics of each.

    The weights are those of Wu et al., arXiv 2508.05629, for `DFT`; any `TokenWeighting` costs the same.

    Args:
        hidden: (N, H) last hidden states at the positions whose next token is supervised.
        head_weight: (V, H) weight of the output embedding; tied or not.
        targets: (N,) ids of the next tokens, each in [0, V).
        weighting: what each token is worth; its scope is "token" or "sequence", unless `weight` is given.
        sequence: (N,) which sequence a token belongs to; all of one sequence if not given.
        factor: (N,) n_t, the normaliser's factor a token; 1 if not given. It is no part of the reported weight.
        transform: the model family's bias, scale and soft-cap.
        progress: share of training done, for scheduled weightings.
        wanted: further statistics of the distribution to compute: "entropy", "topk_entropy", "collision", "rank".
        weight: (N,) weights that are known already, as those of `step` scope are; the weighting is then not asked.
        chunk_rows: rows whose logits are held at a time; by default as many as fit 100 MiB (CPU) or 2 GiB (GPU).
        **brought: what else a token brings along, (N,) each: position, ref_logp, old_logp, reward, data_weight.

    Returns:
        The loss, a scalar of at least float32, differentiable once in hidden, head_weight and bias (zero, with a
        graph, for N = 0); and the `TokenStats` of all N tokens with `weight` filled in, at least float32.

    Raises:
        ValueError: a shape does not fit, a target is missing, the weighting's scope is "step" and no `weight` is given,
            or something that the weighting needs was not given.
    """
    _check(hidden, head_weight, targets, weighting, brought, weight)
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    transform = transform or LogitTransform()
    job = _Job(
        weighting=weighting,
        target=targets,
        sequence=torch.zeros_like(targets) if sequence is None else sequence,
        brought={name: value.to(compute) if value.is_floating_point() else value for name, value in brought.items()},
        progress=progress,
        factor=None if factor is None else factor.to(compute),
        transform=transform,
        known=None if weight is None else weight.detach().to(compute),
        names=frozenset((set(weighting.needs if weight is None else ()) | set(wanted)) & DISTRIBUTION_STATISTICS),
        chunk_rows=chunk_rows or _default_rows(hidden.device, head_weight.shape[0]),
        compute=compute,
        product=_product_dtype(hidden),
        differentiate=torch.is_grad_enabled(),
    )
    loss: Tensor = _WeightedNLL.apply(hidden, head_weight, transform.bias, job)  # type: ignore[no-untyped-call]
    return loss, job.result


@dataclass
class _Job:
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

    def chunks(self) -> Iterator[slice]:
        """Slices of rows; one empty slice where there are no rows, so that N = 0 needs no code of its own."""
        for start in range(0, max(len(self.target), 1), self.chunk_rows):
            yield slice(start, start + self.chunk_rows)

    def coefficient(self, weight: Tensor, rows: slice) -> Tensor:
        """sg(w)·n of some rows."""
        return weight if self.factor is None else weight * self.factor[rows]


@dataclass
class _Gradients:
    """Accumulators (N, H), (V, H), (V,); None where no gradient is asked for: a frozen head costs no dW."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    def wanted(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)


@dataclass
class _Chunk:
    """Some rows on their way through the head."""

    rows: slice
    hidden: Tensor  # (R, H), in the products' dtype
    logits: Tensor  # (R, V), in the compute dtype
    lse: Tensor  # (R,)
    stats: TokenStats


class _WeightedNLL(torch.autograd.Function):
    """Gradients are made in the forward; the backward only multiplies them by the upstream scalar."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> Tensor:
        asked = [job.differentiate and needed for needed in ctx.needs_input_grad[:3]]
        shapes = (hidden.shape, weight.shape, weight.shape[:1])
        made = [
            hidden.new_zeros(shape, dtype=job.compute) if ask else None
            for shape, ask in zip(shapes, asked, strict=True)
        ]
        ctx.made, ctx.dtypes = made, [None if x is None else x.dtype for x in (hidden, weight, bias)]
        with torch.autocast(hidden.device.type, enabled=False), _fast_products(job.product, hidden.device):
            return _run(job, hidden, _factor(weight, job), _Gradients(*made))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("weighted_nll can be differentiated once: call backward without create_graph=True")
        scaled = [
            None if g is None else (g * upstream).to(dtype) for g, dtype in zip(ctx.made, ctx.dtypes, strict=True)
        ]
        return (*scaled, None)


def _run(job: _Job, hidden: Tensor, weight: Tensor, gradients: _Gradients) -> Tensor:
    """Fill `gradients` and `job.result`; return the loss, (), in the compute precision."""
    if job.known is not None:
        given = job.known
        return _pass(job, hidden, weight, gradients, lambda _stats, rows: given[rows])
    if job.weighting.scope == "token":
        return _pass(job, hidden, weight, gradients, lambda stats, _rows: checked_weights(job.weighting, stats))
    _pass(job, hidden, weight, _Gradients(), lambda stats, _rows: torch.ones_like(stats.logp))
    known = checked_weights(job.weighting, replace(job.result, weight=None))
    if gradients.wanted():
        return _pass(job, hidden, weight, gradients, lambda _stats, rows: known[rows])
    job.result = replace(job.result, weight=known)
    return -(job.coefficient(known, slice(None)) * job.result.logp).sum()


def _pass(
    job: _Job, hidden: Tensor, weight: Tensor, gradients: _Gradients, weigh: Callable[[TokenStats, slice], Tensor]
) -> Tensor:
    """Go once over the chunks: statistics, weights, the weighted sum, and the gradients that are wanted."""
    loss = hidden.new_zeros((), dtype=job.compute)
    parts = []
    for rows in job.chunks():
        chunk = _score(job, rows, hidden[rows], weight)
        w = weigh(chunk.stats, rows)
        parts.append(replace(chunk.stats, weight=w))
        coefficient = job.coefficient(w, rows)
        loss -= (coefficient * chunk.stats.logp).sum()
        if gradients.wanted():
            _add_gradients(job, chunk, weight, coefficient, gradients)
    job.result = TokenStats.concatenate(parts)
    return loss


def _score(job: _Job, rows: slice, hidden: Tensor, weight: Tensor) -> _Chunk:
    """Logits and statistics of some rows."""
    hidden = _factor(hidden, job)
    logits = job.transform.forward_(_matmul(hidden, weight.T, job.compute))  # (R, V)
    lse = logits.logsumexp(1)
    target_logit = logits.gather(1, job.target[rows, None])[:, 0]
    stats = TokenStats(
        logp=target_logit - lse,
        target=job.target[rows],
        sequence=job.sequence[rows],
        progress=job.progress,
        **{name: value[rows] for name, value in job.brought.items()},
        **statistics(job.names, logits, lse, target_logit),
    )
    return _Chunk(rows, hidden, logits, lse, stats)


def _add_gradients(job: _Job, chunk: _Chunk, weight: Tensor, coefficient: Tensor, gradients: _Gradients) -> None:
    """Add w·n·(softmax − onehot) times its factors to the accumulators; overwrites the chunk's logits."""
    capped = chunk.logits.clone() if job.transform.softcap is not None else None
    grad = chunk.logits.sub_(chunk.lse[:, None]).exp_()  # (R, V), the softmax
    grad.scatter_add_(1, chunk.stats.target[:, None], grad.new_full((len(grad), 1), -1.0))
    grad *= coefficient[:, None]
    job.transform.backward_(grad, capped)
    if gradients.bias is not None:
        gradients.bias += grad.sum(0)
    factor = _factor(grad, job)
    if gradients.hidden is not None:
        gradients.hidden[chunk.rows] = _matmul(factor, weight, job.compute)
    if gradients.weight is not None:
        gradients.weight += _matmul(factor.T, chunk.hidden, job.compute)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The precision of the products: that of autocast where it is on, else that of the hidden states."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype == torch.float32:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _factor(tensor: Tensor, job: _Job) -> Tensor:
    """A factor of a product, rounded to the products' dtype; on the CPU held in the compute dtype after that."""
    rounded = tensor.to(job.product)
    return rounded.to(job.compute) if tensor.device.type == "cpu" else rounded


def _matmul(a: Tensor, b: Tensor, compute: torch.dtype) -> Tensor:
    """a @ b, accumulated and returned in the compute dtype."""
    if a.dtype == compute:
        return a @ b
    return torch.mm(a, b, out_dtype=compute)


@contextmanager
def _fast_products(product: torch.dtype, device: torch.device) -> Iterator[None]:
    """On the CPU, multiply float32 tensors that hold bfloat16 values at bfloat16's speed.

    oneDNN then rounds its inputs to bfloat16, which changes no factor that is already rounded, and returns float32.
    """
    backend = torch.backends.mkldnn.matmul if hasattr(torch.backends.mkldnn, "matmul") else None
    if device.type != "cpu" or product != torch.bfloat16 or backend is None:
        yield
        return
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


def _default_rows(device: torch.device, vocabulary: int) -> int:
    rows = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cuda"]) // (4 * vocabulary)
    return max(16, rows // 16 * 16)


def _check(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weighting: TokenWeighting,
    brought: dict[str, Tensor],
    weight: Tensor | None,
) -> None:
    """Refuse what would be computed wrongly, without waiting for a GPU."""
    name = type(weighting).__name__
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1] or targets.shape != hidden.shape[:1]:
        shapes = f"hidden {tuple(hidden.shape)}, head_weight {tuple(head.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"weighted_nll got {shapes}; expected (N, H), (V, H) and (N,)")
    if targets.device.type == "cpu" and len(targets) and not 0 <= targets.min() <= targets.max() < len(head):
        span = f"{targets.min().item()} to {targets.max().item()}"
        raise ValueError(f"targets are {span}; expected ids in [0, {len(head)}): leave masked positions out")
    if weight is None and weighting.scope == "step":
        raise ValueError(
            f"{name} looks at the whole optimizer step; weighted_nll sees one micro-batch only: give it the `weight`s"
        )
    if weight is not None and weight.shape != targets.shape:
        raise ValueError(f"weight is {tuple(weight.shape)}; expected {tuple(targets.shape)}, one value a target")
    if unknown := set(brought) - BROUGHT_ALONG:
        raise ValueError(f"unknown keyword {sorted(unknown)}; a token can bring along {sorted(BROUGHT_ALONG)}")
    if weight is None and (missing := set(weighting.needs) - DISTRIBUTION_STATISTICS - set(brought)):
        raise ValueError(f"{name} needs {sorted(missing)}, which were not given")
    if wrong := {key: tuple(value.shape) for key, value in brought.items() if value.shape != targets.shape}:
        raise ValueError(f"got {wrong}; expected {tuple(targets.shape)}, one value a target")
