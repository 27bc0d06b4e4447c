"""Where the gradient of a weighting would go: its shares by groups of tokens.

Shapes: N supervised tokens of the sample.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dft_lightning.callbacks.token_probabilities import P_EDGES, P_LABELS
from dft_lightning.insight.gradients import Direction
from dft_lightning.insight.sample import Sample
from dft_lightning.token_classes import CLASSES
from dft_lightning.weighting import TokenWeighting

#: Positions in a response at which a group begins: the first tokens decide the form of the answer.
POSITIONS = (0, 1, 4, 16, 64, 256, 1024)
_MOST_SOURCES = 8


@dataclass(frozen=True)
class Groups:
    """A way to sort tokens.

    Args:
        title: what they are sorted by.
        labels: of the groups.
        of: (N,) the number of each token's group.
        ordered: whether the groups follow upon each other, as positions do.
    """

    title: str
    labels: tuple[str, ...]
    of: Tensor
    ordered: bool

    def shares(self, mass: Tensor) -> list[float]:
        """The share of each group in the sum of `mass` (N,); zeros where that is zero."""
        sums = torch.zeros(len(self.labels), dtype=torch.float64).index_add_(0, self.of, mass.double())
        return (sums / mass.double().sum().clamp(min=1e-300)).tolist()


@dataclass(frozen=True)
class Flow:
    """A weighting's step, as far as one pass and a few gradients tell.

    Args:
        mean: of the weights.
        effective: (Σw)²/(N·Σw²), the share of the tokens that an equally weighted sample of the same variance has.
        shares: of the gradient's mass, by the groups' title.
        direction: against SFT's gradient; None where it was not asked for.
    """

    mean: float
    effective: float
    shares: dict[str, list[float]]
    direction: Direction | None


def flow_of(sample: Sample, weighting: TokenWeighting, groups: list[Groups], direction: Direction | None) -> Flow:
    """What becomes of the sample under a weighting."""
    weight = sample.weights(weighting)
    mass = sample.mass(weighting)
    return Flow(
        mean=float(weight.mean()),
        effective=float(weight.sum() ** 2 / (len(weight) * weight.square().sum()).clamp(min=1e-300)),
        shares={group.title: group.shares(mass) for group in groups},
        direction=direction,
    )


def groups_of(sample: Sample) -> list[Groups]:
    """By probability, class, position in the response, and source."""
    p = sample.tokens.p.double()
    bins = torch.bucketize(p, torch.tensor(P_EDGES[1:-1], dtype=p.dtype), right=True)
    position = sample.tokens.need("position").long()
    places = torch.bucketize(position, torch.tensor(POSITIONS[1:]), right=True)
    return [
        Groups("p", P_LABELS, bins, ordered=True),
        _present("token class", list(CLASSES), sample.classes),
        Groups("position in the response", _position_labels()[: int(places.max()) + 1], places, ordered=True),
        _by_source(sample),
    ]


def _position_labels() -> tuple[str, ...]:
    spans = [f"{low}–{high - 1}" if high - low > 1 else f"{low}" for low, high in pairwise(POSITIONS)]
    return (*spans, f"{POSITIONS[-1]}+")


def _present(title: str, labels: list[str], of: Tensor) -> Groups:
    """Without the groups that no token is in."""
    kept = torch.unique(of).tolist()
    number = torch.zeros(len(labels), dtype=torch.long)
    number[kept] = torch.arange(len(kept))
    return Groups(title, tuple(labels[index] for index in kept), number[of], ordered=False)


def _by_source(sample: Sample) -> Groups:
    """The sources with most tokens, and the others together."""
    counts = torch.bincount(sample.source, minlength=len(sample.sources))
    if len(counts) <= _MOST_SOURCES:
        return Groups("source", tuple(sample.sources), sample.source, ordered=False)
    largest = counts.argsort(descending=True, stable=True)[: _MOST_SOURCES - 1]
    number = torch.full_like(counts, len(largest))
    number[largest] = torch.arange(len(largest))
    labels = (*(sample.sources[index] for index in largest.tolist()), "(others)")
    return Groups("source", labels, number[sample.source], ordered=False)
