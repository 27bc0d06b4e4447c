"""Which sequences make up each optimizer step, and how a step is dealt out to ranks and micro-batches.

A step's *set* of sequences depends on the seed, the epoch and `global_batch_size` alone. Micro-batch size, ranks,
grouping and packing only lay that set out: a rank with less to do gets empty micro-batches, and every step of a run
has equally many.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from dft_lightning.data.packing import Layout, Padded, Row


@dataclass(frozen=True)
class Geometry:
    """How a step is cut up.

    Args:
        global_batch_size: sequences of an optimizer step, over all ranks.
        micro_batch_size: most rows that one rank holds at a time.
        ranks: data-parallel ranks.
        rank: this one.
    """

    global_batch_size: int
    micro_batch_size: int
    ranks: int = 1
    rank: int = 0

    def rounds(self, rows: int) -> int:
        """Micro-batches that each rank needs for so many rows."""
        return -(-rows // (self.micro_batch_size * self.ranks))


def steps_an_epoch(sequences: int, global_batch_size: int, drop_last: bool) -> int:
    """Optimizer steps over so many sequences; the last may be smaller."""
    full, rest = divmod(sequences, global_batch_size)
    return full + (1 if rest and not drop_last else 0)


@dataclass
class StepSampler:
    """A batch sampler without hidden state: the same seed and epoch give the same steps, from any starting point.

    A micro-batch is a list of rows, and a row a list of sequences.

    Args:
        lengths: (sequences,) tokens of each.
        geometry: how a step is cut up.
        seed: of the shuffle; None keeps the order.
        layout: how sequences are laid into rows.
        drop_last: leave out the last step of an epoch where it has fewer than `global_batch_size` sequences.
        epochs: for so many epochs the number of micro-batches a step is to suffice.
        start: micro-batches of the first epoch to pass over (after a resume).
    """

    lengths: np.ndarray
    geometry: Geometry
    seed: int | None = None
    layout: Layout = field(default_factory=Padded)
    drop_last: bool = False
    epochs: int = 1
    epoch: int = 0
    start: int = 0

    def __post_init__(self) -> None:
        counted = list(self._rows_of_steps())
        self.micro_batches = max([1, *(self.geometry.rounds(rows) for rows, _ in counted)])
        """Micro-batches a rank has in each step: as many as the step with the most rows needs."""
        self.height = max([1, *(-(-rows // self._parts(rows)) for rows, _ in counted)])
        """Rows of the micro-batch that has most."""
        self.fullest = max((most for _, most in counted), default=1)
        """Sequences of the row that has most."""

    def _parts(self, rows: int) -> int:
        """Into how many micro-batches, of all ranks, so many rows of a step are cut."""
        return max(self.geometry.rounds(rows), 1) * self.geometry.ranks

    def _rows_of_steps(self) -> Iterator[tuple[int, int]]:
        """How many rows each step of the run has, and the most sequences of one; or bounds where they are known."""
        if isinstance(self.layout, Padded):
            yield min(self.geometry.global_batch_size, len(self.lengths)), 1
            return
        for epoch in range(self.epochs):
            for number in range(self.steps):
                rows = self.rows(epoch, number)
                yield len(rows), max(map(len, rows))

    @property
    def steps(self) -> int:
        """Optimizer steps an epoch."""
        return steps_an_epoch(len(self.lengths), self.geometry.global_batch_size, self.drop_last)

    def __len__(self) -> int:
        """Micro-batches an epoch on this rank, those passed over included."""
        return self.steps * self.micro_batches

    @property
    def sampler(self) -> "StepSampler":
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's permutation; `start` is of the epoch before."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def order(self, epoch: int) -> np.ndarray:
        """The sequences of an epoch in the order in which the steps take them."""
        if self.seed is None:
            return np.arange(len(self.lengths))
        if getattr(self, "_order", (None, None))[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))
        return self._order[1]

    def sequences_of_steps(self, steps: int) -> np.ndarray:
        """Sorted sequences that the first `steps` optimizer steps of a run use."""
        size, epochs = self.geometry.global_batch_size, range(-(-steps // max(self.steps, 1)))
        used = [self.order(epoch)[: min(steps - epoch * self.steps, self.steps) * size] for epoch in epochs]
        return np.unique(np.concatenate([np.zeros(0, np.int64), *used]))

    def __iter__(self) -> Iterator[list[Row]]:
        start, self.start = self.start, 0
        for number in range(start // self.micro_batches, self.steps):
            skip = start % self.micro_batches if number == start // self.micro_batches else 0
            yield from self.step(self.epoch, number)[skip:]

    def rows(self, epoch: int, number: int) -> list[Row]:
        """A step's sequences laid into rows, for all ranks."""
        size = self.geometry.global_batch_size
        sequences = self.order(epoch)[number * size : (number + 1) * size]
        return self.layout.rows(sequences, self.lengths[sequences])

    def step(self, epoch: int, number: int) -> list[list[Row]]:
        """This rank's micro-batches of a step; together the ranks have each sequence once.

        Micro-batches are as equal in size as can be, and neighbours go to different ranks, which then have about the
        same to do; the longest come first, so that a step that does not fit the memory fails at once.
        """
        shape = self.geometry
        mine = self.parts(epoch, number)[shape.rank :: shape.ranks]
        assert len(mine) <= self.micro_batches, f"epoch {epoch} was not planned for"
        return mine + [[]] * (self.micro_batches - len(mine))

    def parts(self, epoch: int, number: int) -> list[list[Row]]:
        """The micro-batches of a step, of all ranks, without the empty ones that fill it up."""
        rows = self.rows(epoch, number)
        cut = np.array_split(np.arange(len(rows)), self._parts(len(rows)))
        return [[rows[index] for index in part] for part in cut]

    def share_used(self, epoch: int = 0, *, fixed: bool = False) -> float:
        """Share of an epoch's positions, of all ranks, that hold a token and no padding.

        Args:
            fixed: whether every micro-batch, empty ones too, has `height` rows of the layout's width.
        """
        positions, tokens = 0, 0
        whole = self.micro_batches * self.geometry.ranks * self.height * (self.layout.width or 0)
        for number in range(self.steps):
            parts = [[int(self.lengths[row].sum()) for row in part] for part in self.parts(epoch, number) if part]
            tokens += sum(map(sum, parts))
            positions += whole if fixed else sum(len(part) * (self.layout.width or max(part)) for part in parts)
        return tokens / max(positions, 1)
