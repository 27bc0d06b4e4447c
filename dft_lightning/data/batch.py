"""What the data stage hands to the model: token rows, and an index of what is supervised in them.

Shapes: B rows of T positions, N supervised tokens, S sequences.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Batch:
    """Right-padded rows and their supervised tokens, with labels already shifted.

    Not a dataclass on purpose: Lightning walks into dataclasses and would round `ref_logp` to a half-precision run's
    dtype on the way to the device.

    Attributes:
        input_ids: (B, T) token ids. Padding stands on the right, so causal attention never sees it.
        supervised: (N,) flat index into the B·T positions, of those whose *next* token is supervised.
        target: (N,) the ids of those next tokens.
        sequence: (N,) which of the batch's sequences, 0 … S−1.
        position: (N,) index among the supervised tokens of its sequence.
        row: (S,) index of each sequence in the rows of its data set.
        tokens: how many positions hold real tokens.
        ref_logp: (N,) at least float32, log-probability under the reference, or None.
    """

    def __init__(
        self,
        input_ids: Tensor,
        supervised: Tensor,
        target: Tensor,
        sequence: Tensor,
        position: Tensor,
        row: Tensor,
        tokens: int,
        ref_logp: Tensor | None = None,
    ) -> None:
        self.input_ids = input_ids
        self.supervised = supervised
        self.target = target
        self.sequence = sequence
        self.position = position
        self.row = row
        self.tokens = tokens
        self.ref_logp = ref_logp

    def __len__(self) -> int:
        """Sequences in the batch."""
        return len(self.row)

    def _map(self, name: str, *args: Any, **kwargs: Any) -> "Batch":
        moved = {
            key: getattr(value, name)(*args, **kwargs) if isinstance(value, Tensor) else value
            for key, value in vars(self).items()
        }
        return Batch(**moved)

    def to(self, *args: Any, **kwargs: Any) -> "Batch":
        """The batch on another device."""
        return self._map("to", *args, **kwargs)

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory; a DataLoader calls this."""
        return self._map("pin_memory")


class Reference(Protocol):
    """One float32 array a row."""

    def __getitem__(self, row: int) -> "np.ndarray": ...


class Collator:
    """Lays rows out as a padded `Batch`.

    Args:
        pad_id: id to fill up with; any id will do, as no supervised position sees a padded one.
        references: log-probabilities of each row's supervised tokens under the reference, by stage and row. They may be
            put there after the collator is made.
        stage: which of them are this collator's.
    """

    def __init__(
        self, pad_id: int = 0, references: "Mapping[str, Reference] | None" = None, stage: str = "train"
    ) -> None:
        self.pad_id = pad_id
        self.references = {} if references is None else references
        self.stage = stage

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Rows with `row`, `input_ids` (T_i,) and `supervised` (T_i,), the latter not shifted yet."""
        width = max((len(row["input_ids"]) for row in rows), default=1)
        ids = np.full((max(len(rows), 1), width), self.pad_id, dtype=np.int64)  # no rows: one padded position
        flat, target, sequence, position = [], [], [], []
        for number, row in enumerate(rows):
            tokens = np.asarray(row["input_ids"])
            ids[number, : len(tokens)] = tokens
            before = np.flatnonzero(np.asarray(row["supervised"])[1:])  # the position before each supervised token
            flat.append(number * width + before)
            target.append(tokens[before + 1])
            sequence.append(np.full(len(before), number))
            position.append(np.arange(len(before)))
        return Batch(
            input_ids=torch.from_numpy(ids),
            supervised=_joined(flat),
            target=_joined(target),
            sequence=_joined(sequence),
            position=_joined(position),
            row=torch.tensor([row["row"] for row in rows], dtype=torch.long),
            tokens=sum(len(row["input_ids"]) for row in rows),
            ref_logp=self._reference(rows),
        )

    def _reference(self, rows: Sequence[Mapping[str, Any]]) -> Tensor | None:
        if (known := self.references.get(self.stage)) is None:
            return None
        parts = [known[row["row"]] for row in rows]
        return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *parts]))


def _joined(parts: list["np.ndarray"]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64))
