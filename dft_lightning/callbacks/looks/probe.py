"""The probe: a few fixed rows that are scored again and again.

Shapes: M supervised tokens of the whole probe, N of a batch of it.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from dft_lightning.data.batch import Batch
    from dft_lightning.data.store import TokenizedRows


class Probe:
    """Gives every supervised token of the probe a place of its own, the same on all ranks.

    Ranks score different rows of it. What each knows of its tokens it puts at their places in a vector (M,) of zeros,
    so that the sum over ranks is what a single one would know: 8 bytes a token (some 60 kB for 16 rows).

    Args:
        rows: of the probe, on every rank all of them.
        batches: of this rank.
    """

    def __init__(self, rows: "TokenizedRows", batches: "list[Batch]") -> None:
        self.rows, self.batches = rows, batches
        self.starts: npt.NDArray[np.int64] = np.cumsum([0, *rows.targets.tolist()])
        self.sources: list[int] = [int(rows[index]["row"]) for index in range(len(rows))]
        self._order = {row: index for index, row in enumerate(self.sources)}

    def __len__(self) -> int:
        """M."""
        return int(self.starts[-1])

    @property
    def fingerprint(self) -> str:
        """Of the rows' content, whatever they were selected from."""
        return self.rows.content_hash(range(len(self.rows)))

    def places(self, batch: "Batch") -> Tensor:
        """The place (N,) of each token of a batch, in its order; on the batch's device."""
        first = [int(self.starts[self._order[row]]) for row in batch.row.tolist()]
        return torch.tensor(first, dtype=torch.long, device=batch.row.device)[batch.sequence] + batch.position

    def spread(self, values: list[Tensor]) -> Tensor:
        """What this rank knows, `values` (N,) of each of its batches, at its places among zeros, (M,) float64."""
        whole = torch.zeros(len(self), dtype=torch.float64)
        for batch, of_batch in zip(self.batches, values, strict=True):
            whole[self.places(batch)] = of_batch.double().cpu()
        return whole

    def targets(self) -> Tensor:
        """The ids (M,) of all tokens."""
        parts = [_targets(self.rows[index]) for index in range(len(self.rows))]
        return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]))

    def positions(self) -> Tensor:
        """The index (M,) of each token in its response."""
        counts = torch.from_numpy(np.diff(self.starts))
        return torch.arange(len(self)) - torch.from_numpy(self.starts[:-1]).repeat_interleave(counts)


def _targets(row: dict[str, "npt.NDArray[np.int64]"]) -> "npt.NDArray[np.int64]":
    """The ids of a row's supervised tokens that have a predecessor."""
    return row["input_ids"][1:][row["supervised"][1:]]
