"""The oracle: the weighted loss written down plainly in float64 with all logits, for tests and small models."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dft_lightning.logprob.head import LogitTransform, statistics
from dft_lightning.weighting.base import DISTRIBUTION_STATISTICS, TokenStats, TokenWeighting, checked_weights


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
    **brought: Any,
) -> tuple[Tensor, TokenStats]:
    """What `weighted_nll` computes, by autograd through the full (N, V) logits in float64.

    Arguments and results are those of `weighted_nll`; the loss is float64.
    """
    transform = transform or LogitTransform()
    logits = hidden.double() @ head_weight.double().T  # (N, V)
    if transform.bias is not None:
        logits = logits + transform.bias.double()
    logits = logits * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    logp = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]  # (N,)
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
    coefficient = weight if factor is None else weight * factor.double()
    return (coefficient * -logp).sum(), replace(tokens, weight=weight)
