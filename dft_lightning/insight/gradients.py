"""The gradient of an optimizer step by all trained parameters, under one weighting after another.

Held at a time: plain SFT's gradient, and the one in the making.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dft_lightning.insight.sample import Sample, micro_batches
from dft_lightning.insight.subject import Subject
from dft_lightning.logprob import ReferenceHead
from dft_lightning.normalizer import token_factor
from dft_lightning.weighting import TokenWeighting, Uniform
from dft_lightning.weighting.base import REF_DISTRIBUTION, checked_weights

if TYPE_CHECKING:
    from dft_lightning.data.batch import Batch


@dataclass(frozen=True)
class Direction:
    """Where a step goes.

    Args:
        norm: of the gradient, before clipping.
        ratio: the same as a multiple of SFT's; None where SFT's is zero.
        cosine: with SFT's gradient; None where one of the two is zero.
    """

    norm: float
    ratio: float | None
    cosine: float | None


def compare(
    subject: Subject, sample: Sample, rows: list[int], weightings: Mapping[str, TokenWeighting]
) -> dict[str, Direction]:
    """The gradient of each weighting in a step over some rows of the sample.

    Args:
        rows: which, as indices of the sample's rows; they are a step of their own, normalised as the run's are.
        weightings: by name.
    """
    batches = list(micro_batches(subject, sample.rows.select(rows)))
    network = subject.network.train()
    try:
        plain = _step(subject, sample, batches, Uniform())
        size = _norm(plain)
        found = {name: _direction(plain, size, subject, sample, batches, each) for name, each in weightings.items()}
    finally:
        network.eval()
        network.zero_grad(set_to_none=True)
    return found


def _direction(
    plain: list[Tensor | None],
    size: float,
    subject: Subject,
    sample: Sample,
    batches: "list[Batch]",
    weighting: TokenWeighting,
) -> Direction:
    gradient = plain if weighting == Uniform() else _step(subject, sample, batches, weighting)
    norm = _norm(gradient)
    if not size or not norm:
        return Direction(norm, norm / size if size else None, None)
    return Direction(norm, norm / size, max(-1.0, min(1.0, _dot(gradient, plain) / norm / size)))


def _step(subject: Subject, sample: Sample, batches: "list[Batch]", weighting: TokenWeighting) -> list[Tensor | None]:
    """The normalised gradient of each trained parameter; dropout is the same in every call."""
    network, normalize = subject.network, subject.module.normalize
    network.zero_grad(set_to_none=True)
    weights = _weights(sample, batches, weighting)
    factors = [token_factor(normalize, batch) for batch in batches]
    with torch.random.fork_rng(devices=[subject.device] if subject.device.type == "cuda" else []):
        torch.manual_seed(subject.module.seed)
        for batch, weight, factor in zip(batches, weights, factors, strict=True):
            weight = weight.to(subject.device)
            with subject.arithmetic():
                reference = _reference(subject, batch, weighting)
                loss, _ = network(
                    batch, weighting, weight=weight, factor=factor, reference=reference, **subject.head_options
                )
            loss.backward()
    share = 1.0 / (_divisor(weighting, weights, factors) or 1.0)  # where nothing counts, there is no gradient either
    return [_scaled(parameter, share) for parameter in network.parameters() if parameter.requires_grad]


def _reference(subject: Subject, batch: "Batch", weighting: TokenWeighting) -> ReferenceHead | None:
    """The model's own distributions, where the weighting compares with those of the initial model."""
    return subject.network.reference(batch, adapter=True) if REF_DISTRIBUTION in weighting.needs else None


def _scaled(parameter: nn.Parameter, share: float) -> Tensor | None:
    """The parameter's gradient, which it then no longer holds."""
    gradient, parameter.grad = parameter.grad, None
    return None if gradient is None else gradient.mul_(share)


def _weights(sample: Sample, batches: "list[Batch]", weighting: TokenWeighting) -> list[Tensor]:
    """The weight of each batch's tokens, (N_i,), by the statistics that the sample's one pass has found."""
    order = [torch.cat([sample.places[row] for row in batch.row.tolist()]) for batch in batches]
    tokens = replace(sample.tokens, weight=None)[torch.cat(order)]
    return list(torch.split(checked_weights(weighting, tokens), [len(part) for part in order]))


def _divisor(weighting: TokenWeighting, weights: list[Tensor], factors: list[Tensor | None]) -> float:
    """By what the step is divided: Σ n_t, where tokens count by what the weighting says."""
    total = 0.0
    for weight, factor in zip(weights, factors, strict=True):
        by = {"tokens": torch.ones_like(weight), "weights": weight, "selected": (weight != 0).to(weight)}
        total += float((by[weighting.divisor].double() * (1.0 if factor is None else factor.cpu())).sum())
    return total


def _norm(gradient: list[Tensor | None]) -> float:
    parts = [part for part in gradient if part is not None]
    wide = [torch.promote_types(part.dtype, torch.float32) for part in parts]
    each = (torch.linalg.vector_norm(part, dtype=dtype) for part, dtype in zip(parts, wide, strict=True))
    return math.sqrt(sum(float(norm) ** 2 for norm in each))


def _dot(one: list[Tensor | None], other: list[Tensor | None]) -> float:
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return sum(float(torch.dot(a.flatten().float(), b.flatten().float())) for a, b in pairs)
