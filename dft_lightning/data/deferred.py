"""A loader that prepares nothing before its first batch is asked for.

Lightning makes a loader's iterator long before that: for training when somebody asks for the number of steps, for
evaluation before `on_validation_start`. Workers that were started then would not see what is set up meanwhile, such as
reference log-probabilities, the shape of compiled batches, or the position to resume from.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch.utils.data import DataLoader

from dft_lightning.data.batch import Batch, Collator


class DeferredLoader(DataLoader[Batch]):
    """A `DataLoader` that starts its workers and its sampler with the first batch, not with `iter`."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator: nothing runs before the first `next`
        yield from super().__iter__()


class DeferredCollate:
    """A collate function that is built where it is first called, or when it is sent to a worker.

    Args:
        build: makes the collator from the state of the data module at that time.
    """

    def __init__(self, build: Callable[[], Collator]) -> None:
        self.build = build

    @cached_property
    def collator(self) -> Collator:
        """The function itself."""
        return self.build()

    def __call__(self, rows: Sequence[Sequence[Mapping[str, Any]]]) -> Batch:
        """As `Collator`."""
        return self.collator(rows)

    def __getstate__(self) -> dict[str, Any]:  # a spawned worker gets the collator, and no data module or trainer
        return {"collator": self.collator}
