"""How the sequences of an optimizer step are laid into rows: one a row, or several packed into one.

A *row* is a line of the tensor that the model reads; the sequences in it stay whole, in this order.
"""

from collections import defaultdict
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Literal, Protocol

import numpy as np

Grouping = Literal["length", "plain"]
Row = list[int]


class Layout(Protocol):
    """A way to lay sequences into rows."""

    @property
    def width(self) -> int | None:
        """Positions of every row; None where each micro-batch is as wide as its longest row."""

    def rows(self, sequences: np.ndarray, lengths: np.ndarray) -> list[Row]:
        """The rows of a step; `lengths` (sequences,) in tokens."""


@dataclass(frozen=True)
class Padded:
    """One sequence a row, filled up to the longest of its micro-batch.

    Args:
        grouping: "length" puts sequences of similar length next to each other, the longest first; "plain" keeps order.
    """

    grouping: Grouping = "length"

    width = None

    def rows(self, sequences: np.ndarray, lengths: np.ndarray) -> list[Row]:
        """See `Layout`."""
        if self.grouping == "length":
            sequences = sequences[np.argsort(-lengths, kind="stable")]
        return [[sequence] for sequence in sequences.tolist()]


@dataclass(frozen=True)
class Packed:
    """Several whole sequences a row, by best-fit decreasing.

    Args:
        capacity: most tokens of a row; no sequence may be longer.
        fill: whether every row is `capacity` positions wide; otherwise only as wide as its tokens (padding-free).
    """

    capacity: int
    fill: bool = True

    @property
    def width(self) -> int | None:
        """See `Layout`."""
        return self.capacity if self.fill else None

    def rows(self, sequences: np.ndarray, lengths: np.ndarray) -> list[Row]:
        """See `Layout`; the fullest rows come first."""
        order = np.argsort(-lengths, kind="stable")
        packed = best_fit_decreasing(lengths[order], self.capacity)
        filled = sorted(packed, key=lambda row: -int(lengths[order[row]].sum()))
        return [sequences[order[row]].tolist() for row in filled]


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Indices of `lengths` (descending, each at most `capacity`) in bins whose sums are at most `capacity`.

    Each goes where it leaves the least room (of several such bins, into the first), or opens a new bin. Equal input
    gives equal bins. The search costs the same however many bins there are.
    """
    bins: list[list[int]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # tokens left → heap of bins
    rooms = 0  # bit r is set where some bin has room for exactly r tokens
    for index, length in enumerate(lengths.tolist()):
        if fitting := rooms >> length:
            left = length + (fitting & -fitting).bit_length() - 1  # the lowest bit: the least room that is enough
            number = heappop(with_room[left])
            rooms ^= 0 if with_room[left] else 1 << left
        else:
            left, number = capacity, len(bins)
            bins.append([])
        assert length <= left, f"a sequence of {length} tokens in rows of {capacity}"
        bins[number].append(index)
        heappush(with_room[left - length], number)
        rooms |= 1 << (left - length)
    return bins
