"""What a weighting makes of a token as its probability goes from 0 to 1, everything else held.

Shapes: G points of p, M other tokens of the step, V words.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dft_lightning.weighting import TokenStats, TokenWeighting
from dft_lightning.weighting.base import REF_DISTRIBUTION, checked_targets, checked_weights

#: What is held, by statistic: how it is written, and three values of it.
_LEVELS: dict[str, tuple[str, tuple[float, float, float]]] = {
    "ref_logp": ("p_ref", (0.1, 0.5, 0.9)),
    "old_logp": ("p_old", (0.1, 0.5, 0.9)),
    "entropy": ("entropy", (0.3, 1.5, 4.0)),
    "topk_entropy": ("entropy of the top 20", (0.3, 1.0, 2.5)),
    "collision": ("Σp²", (0.1, 0.5, 0.9)),
    "rank": ("rank", (0, 3, 100)),
    "reward": ("reward", (-1.0, 0.5, 1.0)),
    "data_weight": ("weight of the data", (0.5, 1.0, 2.0)),
}
_PROBABILITIES = ("ref_logp", "old_logp")
_OTHER_P = (0.1, 0.5, 0.9)
_OWN, _RESPONSES, _LENGTH, _WORDS = 9, 15, 10, 50


@dataclass(frozen=True)
class Setting:
    """What is held while p runs: `levels` by statistic, the p around which the other tokens are, share of training."""

    label: str
    levels: dict[str, float] = field(default_factory=dict)
    others: float = 0.5
    progress: float = 0.5


@dataclass(frozen=True)
class Curve:
    """Over the points (G,): the weight, and −∂L/∂z of the target's logit z, which is w·(1 − p) without a target q."""

    label: str
    weight: Tensor
    push: Tensor


def curves(weighting: TokenWeighting, points: Tensor) -> list[Curve]:
    """One curve a setting, at the probabilities `points` (G,)."""
    return [_curve(weighting, points, setting) for setting in settings(weighting)]


def settings(weighting: TokenWeighting) -> list[Setting]:
    """Three where the weight depends on more than the token's p, else one."""
    needs = set(weighting.needs) | ({"ref_logp"} if REF_DISTRIBUTION in weighting.needs else set())
    if wanted := [name for name in _LEVELS if name in needs]:
        return [_of_levels({name: _LEVELS[name][1][at] for name in wanted}) for at in range(3)]
    if weighting.scope != "token":
        return [Setting(f"p of the others ≈ {p:g}", others=p) for p in _OTHER_P]
    if _scheduled(weighting):
        return [Setting(f"{share:.0%} of the training done", progress=share) for share in (0.0, 0.5, 1.0)]
    return [Setting("")]


def held(weighting: TokenWeighting) -> str:
    """In words what the curves assume of other tokens; nothing where they do not matter."""
    if weighting.scope == "token":
        return ""
    tokens = f"{_OWN} other tokens in the response"
    if weighting.scope == "step":
        tokens += f", and {_RESPONSES} responses of {_LENGTH} tokens beside it, from likelier to less likely ones"
    return f"Held: {tokens}, p around {'the given value' if settings(weighting)[0].levels == {} else 0.5}."


def _of_levels(levels: dict[str, float]) -> Setting:
    return Setting(", ".join(f"{_LEVELS[name][0]} = {level:g}" for name, level in levels.items()), levels)


def _scheduled(weighting: TokenWeighting) -> bool:
    """Whether the weights change with the share of the training that is done."""
    points = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    first, last = (checked_weights(weighting, _tokens(points, Setting("", progress=share))) for share in (0.0, 1.0))
    return not torch.equal(first, last)


def _curve(weighting: TokenWeighting, points: Tensor, setting: Setting) -> Curve:
    tokens = _tokens(points, setting)
    if weighting.scope == "token":
        weight = checked_weights(weighting, tokens)
    else:
        weight = torch.cat([checked_weights(weighting, joined)[:1] for joined in _among_others(tokens, setting)])
    push = weight * (1.0 - points)
    if weighting.vocabulary:
        push = push + _push_of_targets(weighting, tokens, setting)
    return Curve(setting.label, weight, push)


def _tokens(points: Tensor, setting: Setting) -> TokenStats:
    """Tokens of these probabilities (G,), in a response of their own each."""
    levels = {name: torch.full_like(points, level) for name, level in setting.levels.items()}
    return TokenStats(
        logp=points.log(),
        target=torch.zeros(len(points), dtype=torch.long),
        sequence=torch.arange(len(points)),
        position=torch.zeros(len(points), dtype=torch.long),
        stop=torch.zeros(len(points), dtype=torch.bool),
        progress=setting.progress,
        **{name: level.log() if name in _PROBABILITIES else level for name, level in levels.items()},
    )


def _among_others(tokens: TokenStats, setting: Setting) -> Iterator[TokenStats]:
    """Each token with the rest of its response, and with other responses."""
    nll = -math.log(setting.others)
    spread = torch.linspace(0.25, 1.75, _RESPONSES, dtype=torch.float64).repeat_interleave(_LENGTH)
    logp = -nll * torch.cat([torch.ones(_OWN, dtype=torch.float64), spread])  # (M,)
    apart = torch.cat([torch.zeros(_OWN, dtype=torch.float64), torch.linspace(-1, 1, len(spread), dtype=torch.float64)])
    others = _tokens(logp.exp(), setting)
    compared = {name: logp + apart for name in _PROBABILITIES if name in setting.levels}
    sequence = torch.cat([torch.full((_OWN,), -1), torch.arange(_RESPONSES).repeat_interleave(_LENGTH)])
    changed: dict[str, Any] = compared | {"sequence": sequence}
    others = replace(others, **changed)
    for at in range(len(tokens)):
        alone = replace(tokens[at : at + 1], sequence=torch.full((1,), -1))
        yield TokenStats.concatenate([alone, others])


def _push_of_targets(weighting: TokenWeighting, tokens: TokenStats, setting: Setting) -> Tensor:
    """q_y − p·Σq (G,), where the other words share what the target leaves in proportion to 1/rank."""
    logp = _distribution(tokens.p)
    reference = None
    if REF_DISTRIBUTION in weighting.needs:
        reference = _distribution(torch.full_like(tokens.p, setting.levels["ref_logp"]))
    q = checked_targets(weighting, tokens, logp, reference)
    return q[:, 0] - tokens.p * q.sum(1)


def _distribution(p: Tensor) -> Tensor:
    """log-probabilities (G, V) in which the first word has p."""
    rest = 1.0 / torch.arange(1, _WORDS, dtype=p.dtype)
    others = (1.0 - p)[:, None] * (rest / rest.sum())
    return torch.cat([p[:, None], others.clamp(min=1e-30)], 1).log()
