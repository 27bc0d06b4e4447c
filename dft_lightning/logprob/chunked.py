"""The weighted sum of negative log-likelihoods, and its gradients, without ever holding all logits.

Since a weight is detached and, for most weightings, a function of its own token's statistics, the gradient by the
logits, w·n·(softmax − onehot), is known as soon as the logits of a chunk are: one pass over chunks of rows makes value
and gradients with three matrix products (logits, dX, dW). A weighting that looks at whole sequences gets a first pass
that keeps log p and the statistics only, and a second one that makes the gradients.

Shapes: N supervised tokens, R rows of a chunk, H hidden size, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dft_lightning.logprob.head import LogitTransform
from dft_lightning.logprob.passes import Gradients, run_pass
from dft_lightning.logprob.products import Factor, Precision, default_rows, fast_products
from dft_lightning.logprob.rows import Job
from dft_lightning.logprob.targets import ReferenceHead
from dft_lightning.weighting.base import (
    BROUGHT_ALONG,
    DISTRIBUTION_STATISTICS,
    REF_DISTRIBUTION,
    TokenStats,
    TokenWeighting,
    checked_weights,
)


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
    lengths: Sequence[int] | None = None,
    logits: torch.dtype | None = None,
    reference: ReferenceHead | None = None,
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
        wanted: further statistics of the distribution to compute, of `DISTRIBUTION_STATISTICS`.
        weight: (N,) weights that are known already, as those of `step` scope are; the weighting is then not asked.
        chunk_rows: rows whose logits are held at a time; by default as many as fit 200 MiB (CPU) or 2 GiB (GPU).
        lengths: tokens of each sequence, where all of one lie together: a weighting of sequence scope then needs one
            pass, as long as none is longer than a chunk, or the rows of a longer one can be kept in 512 MiB (CPU),
            4 GiB (GPU). On the CPU it is found out.
        logits: precision of the logits between the product and the softmax, which is computed in float32 either way; by
            default float32. bfloat16, for inputs in bfloat16, halves their memory and is faster where such products
            return bfloat16, as a CPU's do; gradients then are as exact as those of a plain bfloat16 computation.
        reference: where the reference's distribution comes from, for a weighting whose `targets` want it.
        **brought: what else a token brings along, (N,) each: position, ref_logp, old_logp, reward, data_weight, stop.

    Returns:
        The loss, a scalar of at least float32, differentiable once in hidden, head_weight and bias (zero, with a
        graph, for N = 0); and the `TokenStats` of all N tokens with `weight` filled in, at least float32.

    Raises:
        ValueError: a shape does not fit, a target is missing, the weighting's scope is "step" and no `weight` is given,
            or something that the weighting needs was not given.
    """
    _check(hidden, head_weight, targets, weighting, brought, weight)
    _check_reference(hidden, head_weight, weighting, reference)
    if lengths is not None and sum(lengths) != len(targets):
        raise ValueError(f"lengths add up to {sum(lengths)}; expected {len(targets)}, the number of targets")
    compute, product = torch.float64 if hidden.dtype == torch.float64 else torch.float32, _product_dtype(hidden)
    if logits not in (None, compute, product):
        raise ValueError(f"logits are to be in {logits}; expected {compute}, or {product}, the products' precision")
    precision = Precision(compute, product, compute if logits is None else logits)
    device, vocabulary, size = hidden.device, head_weight.shape[0], precision.logits.itemsize
    if weight is None and weighting.scope == "sequence" and precision.logits != compute:
        size += compute.itemsize  # all rows of a chunk wait for their weights, in the compute precision
    if weighting.vocabulary:
        size *= 2 if reference is None else 3  # a gradient, and the reference's logits, of a chunk may lie beside
    transform = transform or LogitTransform()
    asked = weight is None or weighting.vocabulary  # its targets are, though its weights may be known
    job = Job(
        weighting=weighting,
        target=targets,
        sequence=torch.zeros_like(targets) if sequence is None else sequence,
        brought={name: value.to(compute) if value.is_floating_point() else value for name, value in brought.items()},
        progress=progress,
        factor=None if factor is None else factor.to(compute),
        transform=transform,
        known=None if weight is None else weight.detach().to(compute),
        names=frozenset((set(weighting.needs if asked else ()) | set(wanted)) & DISTRIBUTION_STATISTICS),
        chunk_rows=chunk_rows or default_rows(device, vocabulary, size=size),
        kept_rows=chunk_rows or default_rows(device, vocabulary, size=size, kept=True),
        precision=precision,
        differentiate=torch.is_grad_enabled(),
        head=head_weight,
        reference=reference if weighting.vocabulary else None,
    )
    loss: Tensor = _WeightedNLL.apply(hidden, head_weight, transform.bias, job, lengths)  # type: ignore[no-untyped-call]
    return loss, job.result


class _WeightedNLL(torch.autograd.Function):
    """Gradients are made in the forward; the backward only multiplies them by the upstream scalar."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job, lengths: Any) -> Tensor:
        asked = [job.differentiate and needed for needed in ctx.needs_input_grad[:3]]
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.lift = job.precision.lift
        ctx.made = _room((hidden, weight, bias), asked, job)
        gradients = Gradients(*ctx.made) if len(hidden) else Gradients()
        with torch.autocast(hidden.device.type, enabled=False), fast_products(job.precision.product, hidden.device):
            return _run(job, hidden, Factor.of(weight, job.precision), gradients, _borders(job, lengths))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or ctx.made is None:
            raise RuntimeError(
                "weighted_nll can be differentiated once: call backward a single time, without create_graph=True"
            )
        made, ctx.made = ctx.made, None  # scaled where they lie
        upstream = upstream / ctx.lift
        scaled = [None if g is None else g.mul_(upstream).to(dtype) for g, dtype in zip(made, ctx.dtypes, strict=True)]
        return (*scaled, None, None)


def _room(
    of: tuple[Tensor | None, ...], asked: list[bool], job: Job
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Room for the gradients, as `Gradients` wants it; of an empty micro-batch they are zeros, and cost little."""
    hidden, weight, bias = (x if ask else None for x, ask in zip(of, asked, strict=True))
    some, dtype = len(job.target) > 0, job.precision.compute
    return (
        None if hidden is None else torch.zeros_like(hidden, dtype=dtype),
        None if weight is None else torch.empty_like(weight, dtype=dtype) if some else torch.zeros_like(weight),
        None if bias is None else torch.zeros_like(bias, dtype=dtype),
    )


def _run(job: Job, hidden: Tensor, weight: Factor, gradients: Gradients, borders: list[int] | None) -> Tensor:
    """Fill `gradients` and `job.result`; return the loss, (), in the compute precision."""
    if job.known is not None:
        given = job.known
        return run_pass(job, hidden, weight, gradients, lambda _stats, rows: given[rows])
    if job.weighting.scope == "token" or borders is not None:
        return run_pass(job, hidden, weight, gradients, borders=borders)
    run_pass(job, hidden, weight, Gradients(), lambda stats, _rows: torch.ones_like(stats.logp), targets=False)
    known = checked_weights(job.weighting, replace(job.result, weight=None))
    if gradients.wanted() or job.weighting.vocabulary:
        first = job.result
        job.names = job.names if job.weighting.vocabulary else frozenset()  # they are known, but targets want them, too
        loss = run_pass(job, hidden, weight, gradients, lambda _stats, rows: known[rows])
        job.result = replace(first, weight=job.result.weight)
        return loss
    job.result = replace(job.result, weight=known)
    return -(job.coefficient(known, slice(None)) * job.result.logp).sum()


def _borders(job: Job, lengths: Sequence[int] | None) -> list[int] | None:
    """Ends of chunks that fall between sequences; None where two passes are needed.

    A sequence that is longer than a chunk, or sequences that do not lie together, are kept whole where that is allowed.
    """
    if job.weighting.scope != "sequence" or job.known is not None:
        return None
    lengths = _lengths(job.sequence) if lengths is None else lengths
    if lengths is None:
        lengths = [len(job.target)]
    longest = max(lengths, default=0)
    if longest > job.kept_rows:
        return None
    most, ends, start = max(job.chunk_rows, longest), [0], 0
    for length in lengths:
        if ends[-1] + length - start > most:
            start = ends[-1]
            ends.append(start)
        ends[-1] += length
    return ends


def _check_reference(hidden: Tensor, head: Tensor, weighting: TokenWeighting, reference: ReferenceHead | None) -> None:
    """Refuse targets without the reference that they want, or with one over other words."""
    name = type(weighting).__name__
    if reference is None:
        if weighting.vocabulary and REF_DISTRIBUTION in weighting.needs:
            raise ValueError(f"{name} needs the reference's distribution: give `reference`, its hidden states and head")
        return
    states, words = tuple(reference.hidden.shape), tuple(reference.weight.shape)
    if len(words) != 2 or states != (len(hidden), words[1]) or words[0] != len(head):
        raise ValueError(
            f"the reference's hidden states are {states} and its head {words}; expected ({len(hidden)}, H) and "
            f"({len(head)}, H)"
        )


def _lengths(sequence: Tensor) -> list[int] | None:
    """Tokens of each sequence; None where one is in several places, or a GPU would have to be waited for."""
    if sequence.device.type != "cpu":
        return None
    runs, counts = torch.unique_consecutive(sequence, return_counts=True)
    together = len(runs) == len(runs.unique())
    return counts.tolist() if together else None


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The precision of the products: that of autocast where it is on, else that of the hidden states."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype == torch.float32:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


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
    given = DISTRIBUTION_STATISTICS | {REF_DISTRIBUTION} | set(brought)
    if (weight is None or weighting.vocabulary) and (missing := set(weighting.needs) - given):
        raise ValueError(f"{name} needs {sorted(missing)}, which were not given")
    if wrong := {key: tuple(value.shape) for key, value in brought.items() if value.shape != targets.shape}:
        raise ValueError(f"got {wrong}; expected {tuple(targets.shape)}, one value a target")
