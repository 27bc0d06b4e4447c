"""Which sequences make up each optimizer step, and how a step is dealt out to ranks and micro-batches.

A step's *set* of sequences depends on the seed, the epoch and `global_batch_size` alone. Micro-batch size, ranks and
grouping only lay that set out: a rank with less to do gets empty micro-batches, and the last, smaller step of an epoch
has as many micro-batches as every other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

Grouping = Literal["length", "plain"]


@dataclass(frozen=True)
class Geometry:
    """How a step is cut up.

    Args:
        global_batch_size: sequences of an optimizer step, over all ranks.
        micro_batch_size: most sequences that one rank holds at a time.
        ranks: data-parallel ranks.
        rank: this one.
    """

    global_batch_size: int
    micro_batch_size: int
    ranks: int = 1
    rank: int = 0

    @property
    def micro_batches(self) -> int:
        """Micro-batches a rank has in each step."""
        return -(-self.global_batch_size // (self.micro_batch_size * self.ranks))


@dataclass
class StepSampler:
    """A batch sampler without hidden state: the same seed and epoch give the same steps, from any starting point.

    Args:
        lengths: (rows,) tokens of each row.
        geometry: how a step is cut up.
        seed: of the shuffle; None keeps the rows in order.
        grouping: "length" puts sequences of similar length of a step into one micro-batch; "plain" keeps their order.
        drop_last: leave out the last step of an epoch where it has fewer than `global_batch_size` sequences.
        start: micro-batches of the first epoch to pass over (after a resume).
    """

    lengths: np.ndarray
    geometry: Geometry
    seed: int | None = None
    grouping: Grouping = "length"
    drop_last: bool = False
    epoch: int = 0
    start: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps an epoch."""
        full, rest = divmod(len(self.lengths), self.geometry.global_batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def __len__(self) -> int:
        """Micro-batches an epoch on this rank, those passed over included."""
        return self.steps * self.geometry.micro_batches

    @property
    def sampler(self) -> "StepSampler":
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's permutation."""
        self.epoch = epoch

    def order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch in the order in which the steps take them."""
        if self.seed is None:
            return np.arange(len(self.lengths))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))

    def rows_of_steps(self, steps: int) -> np.ndarray:
        """Sorted rows that the first `steps` optimizer steps of a run use."""
        size, epochs = self.geometry.global_batch_size, range(-(-steps // max(self.steps, 1)))
        used = [self.order(epoch)[: min(steps - epoch * self.steps, self.steps) * size] for epoch in epochs]
        return np.unique(np.concatenate([np.zeros(0, np.int64), *used]))

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, 0
        order, size = self.order(self.epoch), self.geometry.global_batch_size
        for number in range(start // self.geometry.micro_batches, self.steps):
            dealt = self.deal(order[number * size : (number + 1) * size])
            skip = start % self.geometry.micro_batches if number == start // self.geometry.micro_batches else 0
            yield from dealt[skip:]

    def deal(self, rows: np.ndarray) -> list[list[int]]:
        """This rank's micro-batches of a step; together the ranks have each row once.

        Micro-batches are as equal in size as can be. Grouped by length, the longest come first, so that a step that
        does not fit the memory fails at once, and neighbours go to different ranks, which then have about the same to
        do.
        """
        shape = self.geometry
        if self.grouping == "length":
            rows = rows[np.argsort(-self.lengths[rows], kind="stable")]
        cut = np.array_split(rows, shape.micro_batches * shape.ranks)
        return [part.tolist() for part in cut[shape.rank :: shape.ranks]]
