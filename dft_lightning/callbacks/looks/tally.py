"""Counts and sums over tokens, small enough to be added up over micro-batches and ranks.

Shapes: N supervised tokens, V vocabulary.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dft_lightning.token_classes import CLASSES

if TYPE_CHECKING:
    from dft_lightning.weighting import TokenStats

#: Bins of arXiv 2508.05629, figure 2.
P_EDGES = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
P_LABELS = ("<1e-4", "<1e-3", "<.01", *(f"<.{tenth}" for tenth in range(1, 10)), "≤1")
#: Weights of all published weightings lie here; what is larger counts to the last bin.
WEIGHT_EDGES = (*P_EDGES[:-1], 1.0, 1.1, 1.5, 2.0, 4.0, 8.0, 16.0)
#: Nats; a uniform distribution over 150,000 tokens has 11.9.
ENTROPY_EDGES = tuple(0.5 * step for step in range(25))
#: Of the target among all tokens, 0 being the likeliest.
RANK_EDGES = (0.0, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0, 1000.0, 1e6)
#: Of a token in its response.
POSITION_EDGES = (0.0, 1.0, *(2.0**power for power in range(1, 12)), float("inf"))
POSITION_LABELS = ("0", "1", *(f"{2**power}–{2 ** (power + 1) - 1}" for power in range(1, 11)), "≥2048")
#: Equal bins of the probability of the likeliest token.
CONFIDENCE_EDGES = tuple(tenth / 10 for tenth in range(11))

_SUMS = ("tokens", "nll", "p", "top1", "weight", "weight_squared", "entropy", "stop_p", "stops")


def bin_of(values: Tensor, edges: tuple[float, ...]) -> Tensor:
    """Which bin, [edge, next edge), each of `values` (N,) is in; those outside are in the outermost bins."""
    wide = values if values.is_floating_point() else values.double()
    inner = torch.tensor(edges[1:-1], dtype=wide.dtype, device=values.device)
    return torch.bucketize(wide, inner, right=True)


def histogram(values: Tensor, edges: tuple[float, ...]) -> Tensor:
    """Counts (bins,) in float64 of `values` (N,); see `bin_of`."""
    return torch.bincount(bin_of(values, edges), minlength=len(edges) - 1).to(torch.float64)


def sums_by(bins: Tensor, count: int, *columns: Tensor) -> Tensor:
    """Sums (count, columns) in float64 of each of the `columns` (N,) over the tokens of each of the `bins` (N,)."""
    values = torch.stack([column.double() for column in columns], 1)
    return values.new_zeros(count, len(columns)).index_add_(0, bins, values)


def sums_by_position(position: Tensor, logp: Tensor) -> Tensor:
    """Tokens, Σ −log p and Σ p (bins, 3) by the bin of the position (N,) in the response."""
    logp = logp.double()
    bins = bin_of(position, POSITION_EDGES)
    return sums_by(bins, len(POSITION_LABELS), torch.ones_like(logp), -logp, logp.exp())


def is_stop(tokens: "TokenStats", special: Tensor) -> Tensor:
    """(N,) whether a token ends its response: the last supervised one of its sequence, and a special token."""
    last = torch.ones_like(tokens.sequence, dtype=torch.bool)
    last[:-1] = tokens.sequence[1:] != tokens.sequence[:-1]
    return last & torch.isin(tokens.target, special)


@dataclass
class Tally:
    """Counts and sums over tokens that add up over micro-batches and ranks, all float64.

    Where a weight may be negative, its share of the total goes by |w|.
    """

    p: Tensor
    """(13,) tokens by p."""
    weight: Tensor
    """(19,) tokens by weight."""
    entropy: Tensor
    """(24,) tokens by entropy."""
    rank: Tensor
    """(9,) tokens by rank of the target."""
    sums: Tensor
    """(9,) over all tokens."""
    density: Tensor
    """(19, 13) tokens by weight and p."""
    weight_by_p: Tensor
    """(13,) Σ|w| by p."""
    by_class: Tensor
    """(9, 3) by token class: tokens, Σ|w|, Σp."""
    by_position: Tensor
    """(13, 3) by position: see `sums_by_position`."""
    calibration: Tensor
    """(10, 3) by the probability of the likeliest token: tokens, its sum, and how often that token is the target."""

    @staticmethod
    def of(tokens: "TokenStats", special: Tensor, classes: Tensor | None = None) -> "Tally":
        """From the tokens of one micro-batch; what was not computed of them is not counted.

        Args:
            special: ids of the special tokens.
            classes: (V,) number in `CLASSES` of each id, on the tokens' device.
        """
        weight, p = tokens.need("weight").double(), tokens.p.double()
        p_bin, weight_bin = bin_of(p, P_EDGES), bin_of(weight, WEIGHT_EDGES)
        one, nothing = torch.ones_like(p), p[:0]
        size = (len(WEIGHT_EDGES) - 1, len(P_LABELS))
        density = torch.bincount(weight_bin * size[1] + p_bin, minlength=size[0] * size[1]).double().view(size)
        classes = None if classes is None else classes[tokens.target].long()
        by_class = p.new_zeros(len(CLASSES), 3)
        by_position = p.new_zeros(len(POSITION_LABELS), 3)
        return Tally(
            p=density.sum(0),
            weight=density.sum(1),
            entropy=histogram(nothing if tokens.entropy is None else tokens.entropy.double(), ENTROPY_EDGES),
            rank=histogram(nothing if tokens.rank is None else tokens.rank, RANK_EDGES),
            sums=_sums(tokens, p, weight, special),
            density=density,
            weight_by_p=sums_by(p_bin, len(P_LABELS), weight.abs())[:, 0],
            by_class=by_class if classes is None else sums_by(classes, len(CLASSES), one, weight.abs(), p),
            by_position=by_position if tokens.position is None else sums_by_position(tokens.position, tokens.logp),
            calibration=_calibration(tokens, p),
        )

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(mine + theirs for mine, theirs in zip(self.tensors(), other.tensors(), strict=True)))

    def tensors(self) -> list[Tensor]:
        """All of it, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    def scalars(self) -> dict[str, float]:
        """Means over the tokens."""
        total = dict(zip(_SUMS, self.sums.tolist(), strict=True))
        count = max(total["tokens"], 1.0)
        means = {f"{name}_mean": total[name] / count for name in ("p", "weight", "entropy")}
        means |= {"nll": total["nll"] / count, "top1": total["top1"] / count}
        means["effective_sample_size"] = total["weight"] ** 2 / max(count * total["weight_squared"], 1e-300)
        if total["stops"]:
            means["p_stop"] = total["stop_p"] / total["stops"]
        if self.rank.sum() > 0:
            means["top5"] = float(self.rank[: RANK_EDGES.index(5.0)].sum() / self.rank.sum())
        if self.calibration.sum() > 0:
            means["calibration_error"] = calibration_error(self.calibration)
        return means

    def shares(self) -> list[float]:
        """Per cent of the tokens in each bin of p."""
        return percent(self.p)


def percent(counts: Tensor) -> list[float]:
    """Each of `counts` as per cent of their sum; zeros where that is zero."""
    total = counts.sum()
    return (100.0 * counts / total).tolist() if total > 0 else [0.0] * len(counts)


def calibration_error(calibration: Tensor) -> float:
    """How far the likeliest token's probability is from how often it is right: Σ_b n_b/N·|accuracy_b − confidence_b|.

    The expected calibration error of Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599, eq. 3,
    of the model's top-1 prediction in ten equal bins; right is what the data says.

    Args:
        calibration: (10, 3) as in `Tally`.
    """
    tokens, confidence, right = calibration.unbind(1)
    return float((right - confidence).abs().sum() / tokens.sum())


def _sums(tokens: "TokenStats", p: Tensor, weight: Tensor, special: Tensor) -> Tensor:
    """Over all tokens, in the order of `_SUMS`."""
    stop, zero = is_stop(tokens, special), torch.zeros_like(p)
    entropy = zero if tokens.entropy is None else tokens.entropy.double()
    top1 = zero if tokens.rank is None else (tokens.rank == 0).double()
    columns = [
        torch.ones_like(p),
        -tokens.logp.double(),
        p,
        top1,
        weight,
        weight.square(),
        entropy,
        p * stop,
        stop.double(),
    ]
    return torch.stack([column.sum() for column in columns])


def _calibration(tokens: "TokenStats", p: Tensor) -> Tensor:
    bins = len(CONFIDENCE_EDGES) - 1
    if tokens.top_p is None or tokens.rank is None:
        return p.new_zeros(bins, 3)
    confidence = tokens.top_p.double()
    right = (tokens.rank == 0).double()
    return sums_by(bin_of(confidence, CONFIDENCE_EDGES), bins, torch.ones_like(confidence), confidence, right)
