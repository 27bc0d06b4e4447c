"""A weighting's declared scope is proved on a sample before a run trusts it.

The loss head calls a `token` weighting on chunks of arbitrary size and a `sequence` weighting on whole sequences. One
that secretly looks further (a `.mean()` over its input, say) would make the gradient depend on the chunk size.
"""

import hashlib
from dataclasses import replace
from typing import Any

import torch

from dft_lightning.weighting.base import (
    BROUGHT_ALONG,
    DISTRIBUTION_STATISTICS,
    Scope,
    TokenStats,
    TokenWeighting,
    checked_weights,
)

_SEQUENCES, _TOKENS_EACH = 7, 9


def prove(weighting: TokenWeighting) -> None:
    """Refuse a weighting whose weights are not finite, change its input, or look further than its `scope`.

    Raises:
        ValueError: names the weighting, what was seen and the scope to declare.
    """
    name = type(weighting).__name__
    known = DISTRIBUTION_STATISTICS | BROUGHT_ALONG
    if unknown := set(weighting.needs) - known:
        raise ValueError(f"{name}.needs names {sorted(unknown)}; what a token can come with is {sorted(known)}")
    tokens = _sample(weighting)
    before = {key: value.clone() for key, value in tokens.tensors().items()}
    whole = checked_weights(weighting, tokens)
    if any(not torch.equal(before[key], value) for key, value in tokens.tensors().items()):
        raise ValueError(f"{name}.weights changes the tensors it is given: use operations that make new ones")
    if not torch.isfinite(whole).all():
        worst = tokens.logp[~torch.isfinite(whole)][0].item()
        raise ValueError(f"{name}.weights is not finite at log p = {worst:.1f}: clamp it, or use torch.where")
    seen = _scope_seen(weighting, tokens, whole)
    order: list[Scope] = ["token", "sequence", "step"]
    if weighting.scope not in order:
        raise ValueError(f"{name}.scope is {weighting.scope!r}; expected one of {order}")
    if order.index(seen) > order.index(weighting.scope):
        raise ValueError(
            f"{name} declares scope {weighting.scope!r}, but its weight of a token changes with the other tokens it is "
            f"given: declare `scope = {seen!r}`, or make it depend on the token alone"
        )


def fingerprint(weighting: TokenWeighting) -> str:
    """sha256 of the weights of the sample to six digits: another formula has another one, whatever its name."""
    weights = checked_weights(weighting, _sample(weighting))
    return hashlib.sha256(" ".join(f"{weight:.5e}" for weight in weights.tolist()).encode()).hexdigest()


def _scope_seen(weighting: TokenWeighting, tokens: TokenStats, whole: torch.Tensor) -> Scope:
    """The narrowest scope under which splitting and permuting the sample leaves every weight as it was."""
    generator = torch.Generator().manual_seed(1)
    shuffled = torch.randperm(len(tokens), generator=generator)
    if _same(weighting, tokens, whole, list(torch.split(shuffled, 5))):
        return "token"
    sequences = [torch.nonzero(tokens.sequence == s).flatten() for s in torch.randperm(_SEQUENCES, generator=generator)]
    return "sequence" if _same(weighting, tokens, whole, sequences) else "step"


def _same(weighting: TokenWeighting, tokens: TokenStats, whole: torch.Tensor, parts: list[torch.Tensor]) -> bool:
    """Whether the weights of each part on its own are those within the whole (float64: rounding stays below 1e-9)."""
    return all(
        torch.allclose(checked_weights(weighting, tokens[part]), whole[part], rtol=1e-9, atol=1e-12) for part in parts
    )


def _sample(weighting: TokenWeighting) -> TokenStats:
    """Random tokens with p from 1e-30 to 1, and everything a weighting may ask for, in float64."""
    generator = torch.Generator().manual_seed(0)
    count = _SEQUENCES * _TOKENS_EACH

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)

    logp = -(uniform(0.0, 8.0) ** 2)
    logp[:2] = torch.tensor([-69.0, 0.0])
    tokens = TokenStats(
        logp=logp,
        target=torch.randint(0, 1000, (count,), generator=generator),
        sequence=torch.arange(_SEQUENCES).repeat_interleave(_TOKENS_EACH),
        position=torch.arange(_TOKENS_EACH).repeat(_SEQUENCES),
        entropy=uniform(0.0, 5.0),
        topk_entropy=uniform(0.0, 2.9),
        collision=uniform(0.01, 1.0),
        rank=torch.randint(0, 1000, (count,), generator=generator),
        ref_logp=logp + uniform(-1.0, 1.0),
        old_logp=logp + uniform(-1.0, 1.0),
        reward=uniform(-1.0, 1.0),
        data_weight=uniform(0.0, 2.0),
        progress=0.5,
    )
    optional = (DISTRIBUTION_STATISTICS | BROUGHT_ALONG) - {"position"}
    absent: dict[str, Any] = dict.fromkeys(optional - set(weighting.needs))
    return replace(tokens, **absent)
