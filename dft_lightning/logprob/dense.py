"""The oracle: the weighted loss written down plainly in float64 with all logits, for tests and small models."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dft_lightning.logprob.head import LogitTransform, statistics
from dft_lightning.logprob.targets import ReferenceHead
from dft_lightning.weighting.base import (
    DISTRIBUTION_STATISTICS,
    TokenStats,
    TokenWeighting,
    checked_targets,
    checked_weights,
)


def dense_weighted_nll(
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
    reference: ReferenceHead | None = None,
    **brought: Any,
) -> tuple[Tensor, TokenStats]:
    """What `weighted_nll` computes, by autograd through the full (N, V) logits in float64.

    Arguments and results are those of `weighted_nll`; the loss is float64.
    """
    logits = _logits(hidden, head_weight, transform or LogitTransform())
    whole = logits.log_softmax(1)  # (N, V)
    logp = whole.gather(1, targets[:, None])[:, 0]  # (N,)
    with torch.no_grad():
        names = (set(weighting.needs) | set(wanted)) & DISTRIBUTION_STATISTICS
        target_logit = logits.gather(1, targets[:, None])[:, 0]
        tokens = TokenStats(
            logp=logp.detach(),
            target=targets,
            sequence=torch.zeros_like(targets) if sequence is None else sequence,
            progress=progress,
            **statistics(names, logits, logits.logsumexp(1), target_logit),
            **brought,
        )
        weight = checked_weights(weighting, tokens)
        q = _targets(weighting, replace(tokens, weight=weight), whole.detach(), reference)
    each = weight * -logp if q is None else weight * -logp - (q * whole).sum(1)
    total = weight if q is None else weight + q.gather(1, targets[:, None])[:, 0]
    return (each if factor is None else each * factor.double()).sum(), replace(tokens, weight=total)


def _logits(hidden: Tensor, head_weight: Tensor, transform: LogitTransform) -> Tensor:
    """(N, V) in float64."""
    logits = hidden.double() @ head_weight.double().T
    if transform.bias is not None:
        logits = logits + transform.bias.double()
    logits = logits * transform.scale
    return logits if transform.softcap is None else transform.softcap * torch.tanh(logits / transform.softcap)


def _targets(
    weighting: TokenWeighting, tokens: TokenStats, logp: Tensor, reference: ReferenceHead | None
) -> Tensor | None:
    """(N, V), where the weighting has them."""
    if not weighting.vocabulary:
        return None
    ref_logp = None
    if reference is not None:
        ref_logp = _logits(reference.hidden, reference.weight, reference.transform).log_softmax(1)
    return checked_targets(weighting, tokens, logp, ref_logp)
