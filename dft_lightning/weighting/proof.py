"""A weighting's declared scope is proved on a sample before a run trusts it.

The loss head calls a `token` weighting on chunks of arbitrary size and a `sequence` weighting on whole sequences. One
that secretly looks further (a `.mean()` over its input, say) would make the gradient depend on the chunk size.
"""

import hashlib
from dataclasses import replace
from typing import Any, get_args

import torch

from dft_lightning.weighting.base import (
    BROUGHT_ALONG,
    DISTRIBUTION_STATISTICS,
    REF_DISTRIBUTION,
    Divisor,
    Scope,
    TokenStats,
    TokenTarget,
    TokenWeighting,
    checked_targets,
    checked_weights,
)
from dft_lightning.weighting.composition import Modifier, held

_SEQUENCES, _TOKENS_EACH, _VOCABULARY = 7, 9, 33
#: Shares of training done at which a weighting, which may follow a schedule, is looked at.
_HALFWAY, _ELSEWHERE = 0.5, (0.0, 0.1, 0.25, 0.75, 1.0)


def prove(weighting: TokenWeighting) -> None:
    """Refuse a weighting whose weights are not finite, change their input, or look further than its `scope`.

    Raises:
        ValueError: names the weighting (or the one within it), what was seen and the scope to declare.
    """
    name = type(weighting).__name__
    known = DISTRIBUTION_STATISTICS | BROUGHT_ALONG | {REF_DISTRIBUTION}
    if unknown := set(weighting.needs) - known:
        raise ValueError(f"{name}.needs names {sorted(unknown)}; what a token can come with is {sorted(known)}")
    if weighting.divisor not in get_args(Divisor):
        raise ValueError(f"{name}.divisor is {weighting.divisor!r}; expected one of {', '.join(get_args(Divisor))}")
    _prove_parts(weighting)
    for progress in (_HALFWAY, *_ELSEWHERE):
        _prove_weights(weighting, progress)
        if weighting.vocabulary:
            _prove_targets(weighting, progress)
    _prove_scopes(weighting)


def _prove_parts(weighting: TokenWeighting) -> None:
    """Refuse targets that would never be asked for, and parts whose targets or divisor would be dropped."""
    name = type(weighting).__name__
    if type(weighting).targets is not TokenWeighting.targets and not isinstance(weighting, TokenTarget | Modifier):
        raise ValueError(f"{name} defines `targets`, which only a TokenTarget or a Modifier is asked for: subclass one")
    for part in held(weighting):
        inner = type(part).__name__
        if not isinstance(weighting, Modifier) and (part.vocabulary or part.divisor != "tokens"):
            raise ValueError(
                f"{inner} inside {name} would lose its {'targets' if part.vocabulary else 'divisor'}: make {name} a "
                "Modifier (dft_lightning.weighting.composition), and take `unit_weights` of its parts"
            )
        _prove_parts(part)


def _prove_weights(weighting: TokenWeighting, progress: float) -> None:
    """Refuse weights that are not finite, or that change their input."""
    name, tokens = type(weighting).__name__, _sample(weighting, progress)
    before = {key: value.clone() for key, value in tokens.tensors().items()}
    whole = checked_weights(weighting, tokens)
    if any(not torch.equal(before[key], value) for key, value in tokens.tensors().items()):
        raise ValueError(f"{name}.weights changes the tensors it is given: use operations that make new ones")
    if not torch.isfinite(whole).all():
        worst = tokens.logp[~torch.isfinite(whole)][0].item()
        raise ValueError(f"{name}.weights is not finite at log p = {worst:.1f}: clamp it, or use torch.where")
    if weighting.divisor == "weights" and bool((whole < 0).any()):
        worst = tokens.logp[whole < 0][0].item()
        raise ValueError(
            f"{name} divides by the sum of its weights, and one is negative at log p = {worst:.1f}: clamp it, or "
            "divide by the tokens"
        )


def _prove_scopes(weighting: TokenWeighting) -> None:
    """Refuse a weighting that looks further than it declares; its parts first, to name the one to mend."""
    for part in weighting.parts if isinstance(weighting, Modifier) else ():
        _prove_scopes(part)
    name, order = type(weighting).__name__, get_args(Scope)
    if weighting.scope not in order:
        raise ValueError(f"{name}.scope is {weighting.scope!r}; expected one of {list(order)}")
    for progress in (_HALFWAY, *_ELSEWHERE):
        seen = _scope_seen(weighting, _sample(weighting, progress))
        if order.index(seen) > order.index(weighting.scope):
            raise ValueError(
                f"{name} declares scope {weighting.scope!r}, but its weight of a token changes with the other tokens "
                f"it is given: declare `scope = {seen!r}`, or make it depend on the token alone"
            )


def fingerprint(weighting: TokenWeighting) -> str:
    """sha256 of the weights of the sample to six digits: another formula has another one, whatever its name.

    Halfway through the training, and, of a weighting that changes over it, at some other points.
    """
    values, *others = (_values(weighting, progress) for progress in (_HALFWAY, *_ELSEWHERE))
    if any(other != values for other in others):
        values = [value for some in (values, *others) for value in some]
    facts = [weighting.divisor] * (weighting.divisor != "tokens") + values
    return hashlib.sha256(" ".join(facts).encode()).hexdigest()


def _values(weighting: TokenWeighting, progress: float) -> list[str]:
    values = checked_weights(weighting, _sample(weighting, progress))
    if weighting.vocabulary:
        values = torch.cat([values, checked_targets(weighting, *_target_sample(weighting, progress)).flatten()])
    return [f"{value:.5e}" for value in values.tolist()]


def _prove_targets(weighting: TokenWeighting, progress: float) -> None:
    """Refuse targets that are not finite, change their input, or depend on which rows are asked for together."""
    name = type(weighting).__name__
    tokens, logp, ref_logp = _target_sample(weighting, progress)
    given = [*tokens.tensors().values(), logp, *([] if ref_logp is None else [ref_logp])]
    before = [tensor.clone() for tensor in given]
    whole = checked_targets(weighting, tokens, logp, ref_logp)
    if not all(map(torch.equal, before, given)):
        raise ValueError(f"{name}.targets changes the tensors it is given: use operations that make new ones")
    if not torch.isfinite(whole).all():
        raise ValueError(f"{name}.targets is not finite: clamp it, or use torch.where")
    for rows in torch.split(torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1)), 5):
        part = checked_targets(weighting, tokens[rows], logp[rows], None if ref_logp is None else ref_logp[rows])
        if not torch.allclose(part, whole[rows], rtol=1e-9, atol=1e-12):
            raise ValueError(f"{name}.targets of a token change with the other tokens it is given; they must not")


def _target_sample(weighting: TokenWeighting, progress: float) -> tuple[TokenStats, torch.Tensor, torch.Tensor | None]:
    """Tokens with a distribution over a small vocabulary each, from nearly certain to nearly even, in float64."""
    tokens = _sample(weighting, progress)
    generator = torch.Generator().manual_seed(2)
    shape = (len(tokens), _VOCABULARY)
    spread = torch.logspace(-2, 1.5, len(tokens), dtype=torch.float64)[:, None]
    logp, ref_logp = (
        (spread * torch.randn(shape, generator=generator, dtype=torch.float64)).log_softmax(1) for _ in range(2)
    )
    target = tokens.target % _VOCABULARY
    tokens = replace(tokens, target=target, logp=logp.gather(1, target[:, None])[:, 0])
    return tokens, logp, ref_logp if REF_DISTRIBUTION in weighting.needs else None


def _scope_seen(weighting: TokenWeighting, tokens: TokenStats) -> Scope:
    """The narrowest scope under which splitting and permuting the sample leaves every weight as it was."""
    whole = checked_weights(weighting, tokens)
    generator = torch.Generator().manual_seed(1)
    shuffled = torch.randperm(len(tokens), generator=generator)
    if _same(weighting, tokens, whole, list(torch.split(shuffled, 5))):
        return "token"
    sequences = [torch.nonzero(tokens.sequence == s).flatten() for s in torch.randperm(_SEQUENCES, generator=generator)]
    return "sequence" if _same(weighting, tokens, whole, sequences) else "step"


def _same(weighting: TokenWeighting, tokens: TokenStats, whole: torch.Tensor, parts: list[torch.Tensor]) -> bool:
    """Whether the weights of each part on its own are those within the whole (float64: rounding stays below 1e-9)."""
    weighed = ((checked_weights(weighting, tokens[part]), whole[part]) for part in parts)
    return all(torch.allclose(own, within, rtol=1e-9, atol=1e-12, equal_nan=True) for own, within in weighed)


def _sample(weighting: TokenWeighting, progress: float) -> TokenStats:
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
        top_p=uniform(0.01, 1.0),  # drawn last: the fingerprints of others stay
        stop=torch.arange(count) % _TOKENS_EACH == _TOKENS_EACH - 1,
        progress=progress,
    )
    optional = (DISTRIBUTION_STATISTICS | BROUGHT_ALONG) - {"position"}
    absent: dict[str, Any] = dict.fromkeys(optional - set(weighting.needs))
    return replace(tokens, **absent)
