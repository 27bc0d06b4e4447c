"""log-probabilities of a window of optimizer steps under the policy at its start, for weightings that need `old_logp`.

They are kept by row of the data set, so that a run which goes on in the middle of a window, on however many ranks,
finds them again.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dft_lightning.errors import UserError
from dft_lightning.weighting import TokenWeighting
from dft_lightning.weighting.composition import nested

if TYPE_CHECKING:
    from dft_lightning.data.batch import Batch


def window_of(weighting: TokenWeighting) -> int:
    """Optimizer steps that share an old policy, by the field `window`; 0 where no old policy is needed.

    Raises:
        UserError: parts of the weighting have different windows, or one has none.
    """
    windows = {getattr(part, "window", None) for part in nested(weighting) if _compares(part)}
    if not windows:
        return 0
    if len(windows) > 1 or not all(isinstance(window, int) and window > 0 for window in windows):
        raise UserError(
            f"{weighting!r} compares with an old policy; expected one field `window`, the optimizer steps that share "
            f"it, 1 or more and alike in all its parts; got {sorted(map(str, windows))}"
        )
    return int(windows.pop() or 0)


def _compares(weighting: TokenWeighting) -> bool:
    """Whether it compares with an old policy by itself, and not only by what is in it."""
    inner = [part for part in nested(weighting) if part is not weighting]
    by_itself = not any("old_logp" in part.needs for part in inner)
    return "old_logp" in weighting.needs and (by_itself or hasattr(weighting, "window"))


@dataclass
class OldPolicy:
    """What the policy at a window's start thought of the window's tokens.

    Args:
        window: optimizer steps that share it.
    """

    window: int
    start: int = 0
    """The optimizer step from which on it is known."""
    end: int = 0
    """The optimizer step before which it is known."""
    values: dict[int, Tensor] = field(default_factory=dict)
    """log-probabilities (T_i,) of the supervised tokens of each row, on the CPU."""

    def is_due(self, step: int) -> bool:
        """Whether none is known for this optimizer step."""
        return not self.start <= step < self.end

    def steps(self, step: int, total: int) -> range:
        """The optimizer steps that share the policy of this one: to the end of its window, or of the run."""
        return range(step, min(step - step % self.window + self.window, total))

    def begin(self, steps: range, found: Iterable[tuple["Batch", Tensor]], ranks: int) -> None:
        """Take note of some steps' micro-batches, and their log-probabilities (N,), of all ranks."""
        mine: dict[int, Tensor] = {}
        for batch, logp in found:
            mine.update(zip(batch.row.tolist(), torch.split(logp.cpu(), batch.counts), strict=True))
        self.start, self.end, self.values = steps.start, steps.stop, _of_all_ranks(mine, ranks)

    def forget(self) -> None:
        """The next step begins a window."""
        self.start, self.end, self.values = 0, 0, {}

    def of(self, batch: "Batch") -> Tensor:
        """Those of a micro-batch's tokens (N,), on its device."""
        each = [self.values[row] for row in batch.row.tolist()]
        together = torch.cat([torch.zeros(0), *each]) if each else torch.zeros(0)
        return together.to(batch.target.device, non_blocking=True)

    def state(self) -> dict[str, Any]:
        """As plain tensors."""
        rows = sorted(self.values)
        values = [self.values[row] for row in rows]
        return {
            "window": self.window,
            "start": self.start,
            "end": self.end,
            "rows": torch.tensor(rows, dtype=torch.int64),
            "counts": torch.tensor([len(value) for value in values], dtype=torch.int64),
            "values": torch.cat([torch.zeros(0), *values]),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on in the middle of a window; of another length, it is begun anew."""
        self.forget()
        if state["window"] == self.window:
            each = torch.split(state["values"], state["counts"].tolist())
            self.start, self.end = state["start"], state["end"]
            self.values = dict(zip(state["rows"].tolist(), each, strict=True))


def _of_all_ranks(mine: dict[int, Tensor], ranks: int) -> dict[int, Tensor]:
    if ranks == 1:
        return mine
    each: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(each, mine)
    return {row: values for part in each for row, values in part.items()}
