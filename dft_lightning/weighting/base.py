"""The one extension point: what each supervised token is worth.

Shapes: N supervised tokens of a micro-batch (or of a chunk of it, for a weighting of `token` scope).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

Scope = Literal["token", "sequence", "step"]
Divisor = Literal["tokens", "weights", "selected"]

#: Statistics of the whole distribution that the loss head can compute beside log p.
DISTRIBUTION_STATISTICS = frozenset({"entropy", "topk_entropy", "collision", "rank", "top_p"})
#: What a token may bring along from the data or from an earlier policy.
BROUGHT_ALONG = frozenset({"position", "ref_logp", "old_logp", "reward", "data_weight", "stop"})
#: What `TokenWeighting.targets` may want beside: the reference's log-probabilities over the whole vocabulary.
REF_DISTRIBUTION = "ref_distribution"


@dataclass(frozen=True, kw_only=True)
class TokenStats:
    """Detached facts about N supervised tokens; masked tokens never come this far.

    Tensors are (N,), at least float32 where they are log-probabilities, statistics or weights. What a weighting
    does not name in `needs`, and no callback asked for, is None.
    """

    logp: Tensor
    """log π(y_t | y_<t), in nats."""
    target: Tensor
    """y_t, the token's id."""
    sequence: Tensor
    """Which sequence the token belongs to: any integer, equal within a sequence."""
    position: Tensor | None = None
    """Index within its response, 0 for the first supervised token."""
    entropy: Tensor | None = None
    """−Σ_v p_v log p_v over the vocabulary, in nats."""
    topk_entropy: Tensor | None = None
    """Entropy of the softmax over the 20 largest logits, in nats."""
    collision: Tensor | None = None
    """Σ_v p_v²."""
    rank: Tensor | None = None
    """How many tokens of the vocabulary are likelier than the target: 0 means the target is the top-1."""
    top_p: Tensor | None = None
    """Probability of the likeliest token of the vocabulary."""
    ref_logp: Tensor | None = None
    """log-probability under the frozen initial model."""
    old_logp: Tensor | None = None
    """log-probability under the policy that sampled the token."""
    reward: Tensor | None = None
    """Reward or advantage of the token's sequence."""
    data_weight: Tensor | None = None
    """Weight that the data gives the token."""
    factor: Tensor | None = None
    """n_t, by what the token counts in the step's divisor; 1 if None. Known where whole steps are weighed together."""
    stop: Tensor | None = None
    """Whether the token ends its turn: the stop token of the chat template, bool."""
    weight: Tensor | None = None
    """What the weighting made of it, its target for the given word included; filled in by the loss."""
    progress: float = 0.0
    """Share of training done, 0 to 1."""

    @property
    def p(self) -> Tensor:
        """Probability of the target, exp(logp)."""
        return self.logp.exp()

    def __len__(self) -> int:
        return self.logp.shape[0]

    def __getitem__(self, index: slice | Tensor) -> "TokenStats":
        """The same facts about some of the tokens."""
        picked: dict[str, Any] = {name: value[index] for name, value in self.tensors().items()}
        return replace(self, **picked)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are present."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def need(self, name: str) -> Tensor:
        """The statistic `name`, or an error that says how to get it."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"TokenStats has no {name!r} here: name it in the weighting's `needs`")
        assert isinstance(value, Tensor)
        return value

    def sequence_sum(self, values: Tensor) -> Tensor:
        """Σ of `values` (N,) over each token's sequence, repeated for each of its tokens (N,)."""
        group = _groups(self.sequence)
        return torch.zeros_like(values).index_add_(0, group, values)[group]

    def sequence_mean(self, values: Tensor) -> Tensor:
        """Mean of `values` (N,) over each token's sequence, repeated for each of its tokens (N,)."""
        return self.sequence_sum(values) / self.sequence_sum(torch.ones_like(values))

    @staticmethod
    def concatenate(parts: Iterable["TokenStats"]) -> "TokenStats":
        """The tokens of several micro-batches or chunks in one."""
        parts = list(parts)
        names = parts[0].tensors()
        joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return replace(parts[0], **joined)


def _groups(ids: Tensor) -> Tensor:
    """Numbers (N,) from 0 for the different values in `ids` (N,); unlike `unique` without waiting for the device."""
    order = ids.argsort(stable=True)
    inner = ids[order]
    numbers = torch.zeros_like(order)
    numbers[1:] = (inner[1:] != inner[:-1]).cumsum(0)
    return torch.empty_like(order).scatter_(0, order, numbers)


@dataclass(frozen=True)
class Source:
    """Where a weighting was published.

    Args:
        authors: as they are cited, "Wu et al.".
        title: of the paper.
        link: an arXiv number or the name of a repository.
        place: equation, section or file.
        note: where paper, authors' code and other implementations differ, which one this is, and how to get another.
        third: known from somebody else's implementation only.
    """

    authors: str
    title: str
    link: str
    place: str = ""
    note: str = ""
    third: bool = False


class TokenWeighting(ABC):
    """What each supervised token is worth: loss = −Σ sg(w_t)·log π(y_t).

    Subclasses are frozen dataclasses whose fields are the configuration, and define `weights`. Statistics beyond
    `logp` are to be named in `needs`; a weighting that looks at other tokens says how far in `scope`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """Statistics beyond log p: `DISTRIBUTION_STATISTICS`, and what the data brings: "ref_logp", "old_logp", …"""

    scope: ClassVar[Scope] = "token"
    """How far a token's weight looks at others: "token", "sequence" or "step" (all tokens of the optimizer step)."""

    divisor: ClassVar[Divisor] = "tokens"
    """By what an optimizer step's sum is divided, over all its micro-batches and ranks.

    "tokens": all supervised tokens. "weights": the sum of their weights, so that the mean weight is 1. "selected": the
    tokens whose weight is not zero.
    """

    vocabulary: ClassVar[bool] = False
    """Whether there is a target over the vocabulary beside the token's own weight: see `TokenTarget`."""

    monitor: ClassVar[tuple[str, Literal["min", "max"]]] = ("val/nll", "min")
    """What training by this weighting truly descends (or climbs): the metric by which the best checkpoint is chosen."""

    formula: ClassVar[str] = ""
    """The weight in one line, as `dft weightings` shows it."""

    source: ClassVar[Source | None] = None
    """Where the formula comes from; None for one of your own."""

    @abstractmethod
    def weights(self, tokens: TokenStats) -> Tensor:
        """The weight of each token, (N,), from the (N,) tensors in `tokens`; no gradient flows through it."""

    def targets(self, tokens: TokenStats, logp: Tensor, ref_logp: Tensor | None) -> Tensor | None:
        """Weights over the vocabulary beside the token's own, (R, V); None where `vocabulary` is false."""
        return None


class TokenTarget(TokenWeighting):
    """A weight on the likelihood of every word of the vocabulary, not of the given one alone.

    loss = −Σ_t (sg(w_t)·log π(y_t) + Σ_v sg(q_tv)·log π(v)), whose gradient by the logits is
    (w + Σ_v q_v)·π − w·onehot(y) − q. A divergence from another distribution, or an entropy, has this form, too: any
    gradient g by the logits that sums to zero over the vocabulary is that of q = −g.

    `targets` is called on a few rows at a time, and sees no other tokens: the scope is "token".
    """

    vocabulary: ClassVar[bool] = True

    def weights(self, tokens: TokenStats) -> Tensor:
        """The own token's weight beside `targets`, (N,): none, if a subclass does not say otherwise."""
        return torch.zeros_like(tokens.logp)

    @abstractmethod
    def targets(self, tokens: TokenStats, logp: Tensor, ref_logp: Tensor | None) -> Tensor:
        """q (R, V), which may be negative; no gradient flows through it.

        Args:
            tokens: the R tokens; their `logp` is of the given token alone.
            logp: (R, V) log π of the whole vocabulary, in nats, at least float32.
            ref_logp: (R, V) the same under the frozen initial model, where `needs` names "ref_distribution".
        """


def checked_weights(weighting: TokenWeighting, tokens: TokenStats) -> Tensor:
    """`weighting.weights(tokens)`, detached, in the statistics' precision; refused where the shape is not (N,)."""
    if len(tokens) == 0:
        return torch.empty_like(tokens.logp)
    with torch.no_grad():
        weights = weighting.weights(tokens)
    got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
    if got != tuple(tokens.logp.shape):
        expected = tuple(tokens.logp.shape)
        raise ValueError(f"{type(weighting).__name__}.weights returned {got}; expected one weight a token, {expected}")
    return weights.to(tokens.logp.dtype)


def checked_targets(
    weighting: TokenWeighting, tokens: TokenStats, logp: Tensor, ref_logp: Tensor | None = None
) -> Tensor:
    """`weighting.targets(…)` of R rows, (R, V), detached, in the precision of `logp`; refused in another shape."""
    with torch.no_grad():
        targets = weighting.targets(tokens, logp, ref_logp)
    got = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
    if not isinstance(targets, Tensor) or targets.shape != logp.shape:
        expected = tuple(logp.shape)
        raise ValueError(f"{type(weighting).__name__}.targets returned {got}; expected a weight a word, {expected}")
    return targets.to(logp.dtype)
