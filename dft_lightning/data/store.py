"""What tokenised rows are read from: a folder of Arrow files, memory-mapped by every process.

The folder has *every* row of the source in its order (one that cannot be used has a reason and no tokens, so that a
row's place is its index in the source), and `report.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch.utils.data import Dataset

Indices: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]

TOO_LONG = "longer than max_length"


@dataclass(frozen=True)
class Report:
    """What became of the source's rows. Dropped ones were asked to go, so they are not among the unusable."""

    rows: int
    used: int
    truncated: int
    dropped: int
    unusable: dict[str, int]
    """Rows by reason."""
    examples: dict[str, list[str]]
    """Up to three rows of each reason: where they are, and what is wrong there."""
    weighted: int = 0
    """Rows that have weights of their own."""
    unequal: bool = False
    """Whether any of these weights is not 1."""
    unused: list[str] = field(default_factory=list)
    """What the usable rows have and nothing reads, as "column id" or "key name"."""

    def __str__(self) -> str:
        parts = [f"{self.used} of {self.rows} rows used"]
        parts += [f"{self.truncated} truncated"] if self.truncated else []
        parts += [f"{self.dropped} dropped as {TOO_LONG}"] if self.dropped else []
        parts += [f"{self.weighted} with weights of their own"] if self.weighted else []
        parts += [f"{count} unusable: {why} ({'; '.join(self.examples[why])})" for why, count in self.unusable.items()]
        return ", ".join(parts)


class TokenizedRows(Dataset[dict[str, Any]]):
    """The usable rows in tokens. Nothing is shifted: `supervised[i]` says whether token i is itself a target.

    Attributes:
        lengths: (rows,) int32, tokens of a row.
        targets: (rows,) int32, supervised tokens with a predecessor: those that the loss sees after the shift.
        fingerprint: key of the content, that is of the source, the rendering and the selection.
        report: what became of the source's rows; a selection keeps it.
    """

    def __init__(self, store: Store, rows: npt.NDArray[np.int64], fingerprint: str) -> None:
        self._store, self._rows = store, rows
        self.fingerprint, self.report = fingerprint, store.report
        self.lengths: npt.NDArray[np.int32] = store.lengths[rows]
        self.targets: npt.NDArray[np.int32] = store.targets[rows]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max(initial=0))

    @property
    def largest_id(self) -> int:
        """The largest token id of the store that these rows are of; -1 where there are no tokens."""
        return self._store.largest_id

    def first_row_with_id_from(self, token: int) -> int | None:
        """The index in the source of the first row that has this token id or a larger one."""
        return next((int(row) for row in self._rows if self._store.tokens(row)[0].max(initial=-1) >= token), None)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row in T tokens.

        `row` (index in the source), `input_ids` (T,) int64, `supervised` (T,) bool, `stop` (T,) bool: which tokens end
        an assistant turn, `weight` (T,) float32: 1 where the data say nothing, and `source` ("" if it has none).
        """
        row = int(self._rows[index])
        ids, supervised = self._store.tokens(row)
        ends, weights = self._store.marks(row)
        stop, weight = np.zeros(len(ids), dtype=np.bool_), np.ones(len(ids), dtype=np.float32)
        stop[ends] = True
        if len(weights):
            weight[supervised] = weights
        marks = {"stop": stop, "weight": weight, "source": self._store.source(row)}
        return {"row": row, "input_ids": ids.astype(np.int64), "supervised": supervised, **marks}

    def select(self, indices: Indices) -> TokenizedRows:
        """These rows, in this order; the files stay mapped."""
        rows = self._rows[np.asarray(indices, dtype=np.int64)]
        return TokenizedRows(self._store, rows, hashlib.sha256(self.fingerprint.encode() + rows.tobytes()).hexdigest())

    def find(self, sources: Sequence[int]) -> list[int] | None:
        """The places here of rows that are known by their index in the source; None where one is not here."""
        places = {row: place for place, row in enumerate(self._rows.tolist())}
        return None if set(sources) - places.keys() else [places[row] for row in sources]

    def content_hash(self, indices: Indices) -> str:
        """sha256 over the tokens and masks of these rows in order, however they are stored."""
        rows = self._rows[np.asarray(indices, dtype=np.int64)]
        digest, masks = hashlib.sha256(self._store.lengths[rows].tobytes()), hashlib.sha256()
        for row in rows.tolist():  # views: 4 µs a row; gathering them by Arrow's `take` is slower
            ids, supervised = self._store.tokens(row)
            digest.update(ids.data)
            masks.update(supervised.data)
        digest.update(masks.digest())
        return digest.hexdigest()


class Store:
    """An artefact on disk, mapped. Opening it reads the columns that hold one number a row, not the tokens."""

    def __init__(self, folder: Path) -> None:
        manifest = json.loads((folder / "report.json").read_text())
        self.folder, self.report = folder, Report(**manifest["report"])
        self._parts: list[pa.RecordBatch] = []
        for name, size in manifest["files"].items():
            if (folder / name).stat().st_size != size:
                raise ValueError(f"{name} has not the {size} bytes that were written")
            self._parts += pa.ipc.open_stream(pa.memory_map(str(folder / name)))
        self._starts = np.cumsum([0, *(part.num_rows for part in self._parts)])
        if self._starts[-1] != self.report.rows:
            raise ValueError(f"{self._starts[-1]} rows where {self.report.rows} were written")
        self._ids = [(ids.offsets.to_numpy(), ids.values.to_numpy()) for ids in self._column("input_ids")]
        self._masks = [masks.values for masks in self._column("supervised")]
        self._ends, self._weights = (
            [(lists.offsets.to_numpy(), lists.values.to_numpy()) for lists in self._column(name)]
            for name in ("ends", "weights")
        )
        self.lengths = np.concatenate([lengths.to_numpy() for lengths in self._column("length")])
        self.targets = np.concatenate([targets.to_numpy() for targets in self._column("targets")])
        self._largest_id: int | None = manifest.get("largest_id")

    @property
    def largest_id(self) -> int:
        """The largest token id; -1 where there are no tokens. An older store does not know it, and is scanned."""
        if self._largest_id is None:
            self._largest_id = max((int(values.max(initial=-1)) for _, values in self._ids), default=-1)
        return self._largest_id

    def __reduce__(self) -> tuple[type[Store], tuple[Path]]:
        return Store, (self.folder,)  # a process that is sent one maps the files itself

    def tokens(self, row: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        part, at = self._find(row)
        offsets, values = self._ids[part]
        first, last = int(offsets[at]), int(offsets[at + 1])
        return values[first:last], self._masks[part].slice(first, last - first).to_numpy(zero_copy_only=False)

    def marks(self, row: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Where assistant turns end, and the weights of the supervised tokens; none if the row has no weights."""
        part, at = self._find(row)
        (ends, first), (weights, second) = self._ends[part], self._weights[part]
        return first[ends[at] : ends[at + 1]], second[weights[at] : weights[at + 1]]

    def source(self, row: int) -> str:
        part, at = self._find(row)
        return str(self._parts[part].column("source")[at])

    def _find(self, row: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return part, row - int(self._starts[part])

    def _column(self, name: str) -> list[Any]:
        return [part.column(name) for part in self._parts]
