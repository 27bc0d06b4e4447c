"""The last step of a causal language model: from hidden states to logits, and statistics of their softmax.

Shapes: R rows (supervised positions) of a chunk, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

#: EAFT's entropy looks at this many of the largest logits (arXiv 2601.02151).
TOP_K = 20
#: Rows of a head that `log_distribution` holds in float32 at a time.
_HEAD_ROWS = 16384


@dataclass(frozen=True)
class LogitTransform:
    """What a model family does to `hidden @ weight.T`: logits = softcap·tanh(scale·(x + bias)/softcap).

    Without a soft-cap: logits = scale·(x + bias).

    Args:
        bias: (V,) head bias, differentiable.
        scale: Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`.
        softcap: Gemma-2's `final_logit_softcapping`.
    """

    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def forward_(self, logits: Tensor) -> Tensor:
        """Turn raw products (R, V) into logits, in place."""
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def backward_(self, grad: Tensor, logits: Tensor | None) -> Tensor:
        """Turn the gradient by logits (R, V) into that by raw products, in place; the soft-cap needs the logits."""
        if self.softcap is not None:
            assert logits is not None
            grad *= 1.0 - (logits / self.softcap).square()
        if self.scale != 1.0:
            grad *= self.scale
        return grad


def _entropy(logits: Tensor, lse: Tensor, _target_logit: Tensor) -> Tensor:
    logp = logits - lse[:, None]
    return -torch.where(logp > -torch.inf, logp.exp() * logp, 0.0).sum(1)


def _topk_entropy(logits: Tensor, _lse: Tensor, _target_logit: Tensor) -> Tensor:
    top = logits.topk(min(TOP_K, logits.shape[1]), dim=1).values
    return _entropy(top, top.logsumexp(1), top[:, 0])


def _collision(logits: Tensor, lse: Tensor, _target_logit: Tensor) -> Tensor:
    return (2.0 * (logits - lse[:, None])).exp().sum(1)


def _rank(logits: Tensor, _lse: Tensor, target_logit: Tensor) -> Tensor:
    return (logits > target_logit[:, None]).sum(1)


def _top_p(logits: Tensor, lse: Tensor, _target_logit: Tensor) -> Tensor:
    return (logits.amax(1) - lse).exp()


_STATISTICS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "entropy": _entropy,
    "topk_entropy": _topk_entropy,
    "collision": _collision,
    "rank": _rank,
    "top_p": _top_p,
}


def statistics(names: Iterable[str], logits: Tensor, lse: Tensor, target_logit: Tensor) -> dict[str, Tensor]:
    """Statistics by name from logits (R, V), their log-sum-exp (R,) and the target's logit (R,): each (R,)."""
    return {name: _STATISTICS[name](logits, lse, target_logit) for name in names}


@torch.no_grad()
def log_distribution(hidden: Tensor, weight: Tensor, transform: LogitTransform) -> Tensor:
    """log π (R, V) of the whole vocabulary after hidden states (R, H), in at least float32, products included.

    For a few rows: the products of half-precision states would be rounded by more than what a KL divergence shows.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        parts = [hidden.to(wide) @ rows.to(wide).T for rows in torch.split(weight, _HEAD_ROWS)]
    return transform.forward_(torch.cat(parts, 1)).log_softmax(1)
