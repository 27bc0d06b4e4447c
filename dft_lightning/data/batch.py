"""What the data stage hands to the model: token rows, and an index of what is supervised in them.

Shapes: B rows of T positions, N supervised tokens, S sequences, D documents (the sequences, and each row's padding).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Batch:
    """Rows and their supervised tokens, with labels already shifted: the first token of a sequence is never a label.

    Not a dataclass on purpose: Lightning walks into dataclasses and would round `ref_logp` to a half-precision run's
    dtype on the way to the device.

    Attributes:
        input_ids: (B, T) token ids. Padding stands on the right, so causal attention never sees it.
        supervised: (N,) flat index into the B·T positions, of those whose *next* token is supervised.
        target: (N,) the ids of those next tokens.
        sequence: (N,) which of the batch's sequences, 0 … S−1.
        position: (N,) index among the supervised tokens of its sequence.
        row: (S,) index of each sequence in the rows of its data set.
        counts: how many supervised tokens each sequence has.
        lengths: how many tokens each sequence has.
        ref_logp: (N,) at least float32, log-probability under the reference, or None.
        stop: (N,) bool, whether the token ends an assistant turn.
        data_weight: (N,) float32, the weight that the data give the token, 1 where they say nothing.
        position_ids: (B, T) place of each token in its document, where rows are packed; else None.
        cu_seqlens: (D+1,) int32, where each document begins in the B·T positions, and their end; with position_ids.
        longest: tokens of the longest document; with position_ids.
        filled: how many positions of each row hold tokens, from the left; the others are padding.
    """

    def __init__(
        self,
        input_ids: Tensor,
        supervised: Tensor,
        target: Tensor,
        sequence: Tensor,
        position: Tensor,
        row: Tensor,
        counts: list[int],
        lengths: list[int],
        ref_logp: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        longest: int = 0,
        stop: Tensor | None = None,
        data_weight: Tensor | None = None,
        filled: Sequence[int] = (),
    ) -> None:
        self.input_ids = input_ids
        self.supervised = supervised
        self.target = target
        self.sequence = sequence
        self.position = position
        self.row = row
        self.counts = counts
        self.lengths = lengths
        self.ref_logp = ref_logp
        self.position_ids = position_ids
        self.cu_seqlens = cu_seqlens
        self.longest = longest
        self.stop = stop
        self.data_weight = data_weight
        self.filled = filled

    def __len__(self) -> int:
        """Sequences in the batch."""
        return len(self.row)

    @property
    def tokens(self) -> int:
        """How many positions hold real tokens."""
        return sum(self.lengths)

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
    """Lays sequences out in rows, as a `Batch`.

    Args:
        pad_id: id to fill up with; any id will do, as no supervised position sees a padded one.
        references: log-probabilities of each row's supervised tokens under the reference, by stage and row. They may be
            put there after the collator is made.
        stage: which of them are this collator's.
        packed: whether a row may have several sequences; the batch then says where each begins.
        width: positions of a row; by default as many as the longest needs.
        fixed: rows of every batch, and documents that it can have, so that all tensors the model reads always have one
            shape; by default as many as there are. `longest` then is `width`.
    """

    def __init__(
        self,
        pad_id: int = 0,
        references: "Mapping[str, Reference] | None" = None,
        stage: str = "train",
        packed: bool = False,
        width: int | None = None,
        fixed: tuple[int, int] | None = None,
    ) -> None:
        self.fixed = fixed
        self.pad_id = pad_id
        self.references = {} if references is None else references
        self.stage = stage
        self.packed, self.width = packed, width

    def __call__(self, rows: Sequence[Sequence[Mapping[str, Any]]]) -> Batch:
        """Rows of sequences with `row`, `input_ids` (T_i,), `supervised`, `stop` and `weight` (T_i,), not shifted yet.

        Without `stop` no token of a sequence ends a turn, and without `weight` each has the weight 1.
        """
        lengths = [[len(sequence["input_ids"]) for sequence in row] for row in rows]
        longest = max((sum(row) for row in lengths), default=1)
        width = self.width if self.width is not None and (rows or self.fixed) else longest
        height = max(len(rows), 1) if self.fixed is None else self.fixed[0]
        ids = np.full((height, width), self.pad_id, dtype=np.int64)  # no rows: one padded position, if none is fixed
        flat, places, target, number, position = [], [], [], [], []
        sequences = [sequence for row in rows for sequence in row]
        for index, (sequence, start) in enumerate(zip(sequences, _starts(lengths, width), strict=True)):
            tokens = np.asarray(sequence["input_ids"])
            ids.reshape(-1)[start : start + len(tokens)] = tokens
            before = np.flatnonzero(np.asarray(sequence["supervised"])[1:])  # the position before each supervised token
            flat.append(start + before)
            places.append(before + 1)
            target.append(tokens[before + 1])
            number.append(np.full(len(before), index))
            position.append(np.arange(len(before)))
        return Batch(
            input_ids=torch.from_numpy(ids),
            supervised=_joined(flat),
            target=_joined(target),
            sequence=_joined(number),
            position=_joined(position),
            row=torch.tensor([sequence["row"] for sequence in sequences], dtype=torch.long),
            counts=list(map(len, target)),
            lengths=[size for row in lengths for size in row],
            filled=[sum(row) for row in lengths] + [0] * (height - len(lengths)),
            ref_logp=self._reference(sequences),
            stop=_marks(sequences, places, "stop", np.False_),
            data_weight=_marks(sequences, places, "weight", np.float32(1)),
            **(_borders(lengths, ids.shape, self.fixed and self.fixed[1]) if self.packed else {}),
        )

    def _reference(self, sequences: Sequence[Mapping[str, Any]]) -> Tensor | None:
        if (known := self.references.get(self.stage)) is None:
            return None
        parts = [known[sequence["row"]] for sequence in sequences]
        return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *parts]))


def _marks(sequences: Sequence[Mapping[str, Any]], places: list["np.ndarray"], name: str, default: Any) -> Tensor:
    """What each sequence has by `name` at its places, (N,) in the type of `default`: that is where it has nothing."""
    dtype, pairs = default.dtype, zip(sequences, places, strict=True)
    parts = [np.asarray(s[name], dtype)[at] if name in s else np.full(len(at), default) for s, at in pairs]
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *parts]))


def _starts(lengths: list[list[int]], width: int) -> list[int]:
    """The flat position at which each sequence begins."""
    return [index * width + sum(row[:place]) for index, row in enumerate(lengths) for place in range(len(row))]


def _borders(lengths: list[list[int]], shape: tuple[int, ...], most: int | None) -> dict[str, Any]:
    """What tells attention where documents begin and end; a row's padding is a document of its own.

    Filled up to `most` documents by empty ones. Positions of padding begin again where they would exceed those of the
    sequences: a model with a table of positions has to have room for the sequences alone.
    """
    rows, width = shape
    filled = [*lengths, *[[] for _ in range(rows - len(lengths))]]
    documents = np.array([size for row in filled for size in (*row, width - sum(row)) if size], dtype=np.int64)
    ends = np.cumsum(documents)
    positions = np.arange(rows * width) - np.repeat(ends - documents, documents)
    positions %= max((size for row in lengths for size in row), default=1)
    empty = np.full(max((most or 0) - len(ends), 0), rows * width)
    return {
        "position_ids": torch.from_numpy(positions.reshape(rows, width)),
        "cu_seqlens": torch.from_numpy(np.concatenate([[0], ends, empty]).astype(np.int32)),
        "longest": int(documents.max()) if most is None else width,
    }


def _joined(parts: list["np.ndarray"]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64))
