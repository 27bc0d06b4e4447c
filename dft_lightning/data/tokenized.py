"""Rows in tokens: rendered once, kept as Arrow files, memory-mapped by every process.

The artefact is a folder, `cache_dir/<key>/`: Arrow files with *every* row of the source in its order (one that cannot
be used has a reason and no tokens, so that a row's place is its index in the source), and `report.json`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Dataset

from dft_lightning.data.rendering import UnusableRow
from dft_lightning.data.sources import LINE, Columns, conversation, listed, place_in, read_row
from dft_lightning.errors import UserError

if TYPE_CHECKING:
    import datasets

    from dft_lightning.data.rendering import ChatRenderer, Rendered

Indices: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]

log = logging.getLogger(__name__)

TOKENIZED_VERSION = 2
"""Part of the key: to be raised whenever the same rows and rendering come out as another artefact."""

TOO_LONG = "longer than max_length"
_BATCH_ROWS = 1000
_BATCH_CHARACTERS = 1 << 22  # of what is tokenised in one go
_ROWS_PER_WORKER = 4000  # with fewer, a process costs more than it gains
_COLUMNS = {
    "input_ids": pa.list_(pa.int32()),
    "supervised": pa.list_(pa.bool_()),
    "length": pa.int32(),
    "targets": pa.int32(),  # supervised tokens with a predecessor
    "full_length": pa.int32(),  # before truncation
    "source": pa.string(),
    "reason": pa.string(),  # why the row cannot be used; "" if it can
    "detail": pa.string(),
}


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

    def __str__(self) -> str:
        parts = [f"{self.used} of {self.rows} rows used"]
        parts += [f"{self.truncated} truncated"] if self.truncated else []
        parts += [f"{self.dropped} dropped as {TOO_LONG}"] if self.dropped else []
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

    def __init__(self, store: _Store, rows: npt.NDArray[np.int64], fingerprint: str) -> None:
        self._store, self._rows = store, rows
        self.fingerprint, self.report = fingerprint, store.report
        self.lengths: npt.NDArray[np.int32] = store.lengths[rows]
        self.targets: npt.NDArray[np.int32] = store.targets[rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`row` (index in the source), `input_ids` (T,) int64, `supervised` (T,) bool, `source` ("" if it has none)."""
        row = int(self._rows[index])
        ids, supervised = self._store.tokens(row)
        source = self._store.source(row)
        return {"row": row, "input_ids": ids.astype(np.int64), "supervised": supervised, "source": source}

    def select(self, indices: Indices) -> TokenizedRows:
        """These rows, in this order; the files stay mapped."""
        rows = self._rows[np.asarray(indices, dtype=np.int64)]
        return TokenizedRows(self._store, rows, hashlib.sha256(self.fingerprint.encode() + rows.tobytes()).hexdigest())

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


class _Store:
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
        self.lengths = np.concatenate([lengths.to_numpy() for lengths in self._column("length")])
        self.targets = np.concatenate([targets.to_numpy() for targets in self._column("targets")])

    def __reduce__(self) -> tuple[type[_Store], tuple[Path]]:
        return _Store, (self.folder,)  # a process that is sent one maps the files itself

    def tokens(self, row: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        part, at = self._find(row)
        offsets, values = self._ids[part]
        first, last = int(offsets[at]), int(offsets[at + 1])
        return values[first:last], self._masks[part].slice(first, last - first).to_numpy(zero_copy_only=False)

    def source(self, row: int) -> str:
        part, at = self._find(row)
        return str(self._parts[part].column("source")[at])

    def _find(self, row: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return part, row - int(self._starts[part])

    def _column(self, name: str) -> list[Any]:
        return [part.column(name) for part in self._parts]


def tokenize(
    rows: datasets.Dataset,
    renderer: ChatRenderer,
    columns: Columns,
    *,
    max_length: int,
    overlength: Literal["truncate", "drop"],
    cache_dir: Path,
    workers: int | None = None,
    max_unusable_share: float = 0.1,
) -> TokenizedRows:
    """The rows in tokens: from `cache_dir` if they are there, else rendered and put there; processes may share it.

    Args:
        max_length: in tokens. What is longer is truncated on the right, or dropped, as `overlength` says.
        workers: processes to render in. 0: this one. None: one a core, if cores and rows are enough to gain by it.
        max_unusable_share: a larger share of unusable rows is refused.
    """
    if not len(rows):
        raise UserError("there are no rows: check data.path and data.split")
    if max_length < 2 or overlength not in ("truncate", "drop") or not 0 <= max_unusable_share <= 1:
        raise UserError(
            "expected data.max_length of at least 2, data.overlength truncate or drop, data.max_unusable_share from 0 "
            f"to 1; got {max_length}, {overlength}, {max_unusable_share}"
        )
    _require_columns(rows, columns)
    task = _Task(renderer, columns, max_length, overlength)
    key = task.key(rows._fingerprint)
    folder = Path(cache_dir) / key
    store = _open(folder)
    if store is None:
        _build(rows, task, folder, _workers(len(rows)) if workers is None else workers)
        store = _Store(folder)
    _judge(store.report, max_unusable_share)
    return TokenizedRows(store, np.flatnonzero(store.targets), key)


def _require_columns(rows: datasets.Dataset, columns: Columns) -> None:
    """A UserError if no row has what a conversation is made of."""
    seen = set(read_row(dict.fromkeys(rows.column_names)))
    if LINE in seen:
        seen = set()
        for raw in rows:
            with suppress(UnusableRow):
                seen |= read_row(raw).keys()
            if seen.issuperset(columns.wanted):  # as a rule the first row
                break
    missing = [name for name in columns.wanted if name not in seen]
    if missing and seen:  # where no line can be read, the report says so
        raise UserError(
            f"no row has the column {listed(missing)}; there are {listed(seen)}. Name the one of the conversation in "
            "data.messages, or those of its two sides in data.prompt and data.completion"
        )


@dataclass(frozen=True)
class _Task:
    """What is done to a batch of rows, wherever."""

    renderer: ChatRenderer
    columns: Columns
    max_length: int
    overlength: str

    def key(self, source: str) -> str:
        parts = [TOKENIZED_VERSION, source, self.renderer.identity, *self.columns.wanted]
        text = json.dumps([*parts, self.max_length, self.overlength], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def __call__(self, batch: Mapping[str, list[Any]]) -> pa.Table:
        names = [name for name in batch if name in {LINE, "source", *self.columns.wanted}]
        chats, sources = zip(*map(self._read, _raws(batch, names)), strict=True)
        rendered = self._rendered([chat for chat in chats if not isinstance(chat, UnusableRow)])
        rows = [self._cells(chat if isinstance(chat, UnusableRow) else next(rendered)) for chat in chats]
        table = {name: [row.get(name, "") for row in rows] for name in _COLUMNS} | {"source": sources}
        return pa.table(table, schema=pa.schema(_COLUMNS))

    def _rendered(self, chats: list[list[dict[str, Any]]]) -> Iterator[Rendered | UnusableRow]:
        """Piece by piece: the tokens of a thousand rows of a megabyte each would not fit in memory."""
        part, size = [], 0
        for index, chat in enumerate(chats, start=1):
            part.append(chat)
            size += sum(len(message["content"]) for message in chat)
            if size > _BATCH_CHARACTERS or index == len(chats):
                yield from self.renderer.render_batch(part)
                part, size = [], 0

    def _read(self, raw: Mapping[str, Any] | UnusableRow) -> tuple[list[dict[str, Any]] | UnusableRow, str]:
        source = ""
        if isinstance(raw, UnusableRow):
            return raw, source
        try:
            row = read_row(raw)
            source = _storable(row.get("source"))
            return conversation(row, self.columns), source
        except UnusableRow as unusable:
            return unusable, source

    def _cells(self, row: Rendered | UnusableRow) -> dict[str, Any]:
        if isinstance(row, UnusableRow):
            return _without_tokens(row.reason, row.detail)
        ids, supervised = row.input_ids[: self.max_length], row.supervised[: self.max_length]
        full, targets = len(row.input_ids), sum(supervised[1:])
        assert full == len(row.supervised)
        if full > self.max_length and self.overlength == "drop":
            return _without_tokens(TOO_LONG)
        if not targets:
            return _without_tokens("nothing left to learn", f"{full} tokens, data.max_length {self.max_length}")
        numbers = {"length": len(ids), "targets": targets, "full_length": full}
        return {"input_ids": ids, "supervised": supervised, **numbers}


def _raws(batch: Any, names: list[str]) -> list[Mapping[str, Any] | UnusableRow]:
    """The rows of a batch; where Python cannot hold a cell (broken UTF-8, the year 300,000), all but its row."""
    try:
        return [dict(zip(names, cells, strict=True)) for cells in zip(*(batch[name] for name in names), strict=True)]
    except (ValueError, OverflowError, pa.ArrowException) as error:
        if (count := batch.pa_table.num_rows) == 1:
            return [UnusableRow("a cell cannot be read", f"{type(error).__name__}: {error}")]
        single = (type(batch)(batch.pa_table.slice(index, 1), batch.formatter) for index in range(count))
        return [row for one in single for row in _raws(one, names)]


def _without_tokens(reason: str, detail: str = "") -> dict[str, Any]:
    empty: dict[str, Any] = {"input_ids": [], "supervised": [], "length": 0, "targets": 0, "full_length": 0}
    return empty | {"reason": reason, "detail": _printable(detail[:200])}


def _printable(text: str) -> str:
    """On one line, without anything that a terminal obeys: no row may write lines of its own into the log."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _storable(text: object) -> str:
    """As UTF-8 can hold it: no lone surrogate in a row may end the run."""
    return text.encode(errors="backslashreplace").decode() if isinstance(text, str) else ""


def _workers(rows: int) -> int:
    """On two cores this process and its tokenizer's threads are fast enough; only on more does the Python part show."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, rows // _ROWS_PER_WORKER) if cores > 2 and rows >= 2 * _ROWS_PER_WORKER else 0


def _open(folder: Path) -> _Store | None:
    if not folder.exists():
        return None
    try:
        return _Store(folder)
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        log.warning("The token cache %s is damaged and will be built anew: %r", folder, error)
    aside = folder.with_name(f".damaged-{uuid4().hex}")
    with suppress(FileNotFoundError):  # another process has done it
        os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)
    return None


def _build(rows: datasets.Dataset, task: _Task, folder: Path, workers: int) -> None:
    import datasets

    draft = folder.with_name(f".draft-{uuid4().hex}")
    draft.mkdir(parents=True)
    options = {"batched": True, "batch_size": _BATCH_ROWS, "num_proc": workers or None, "desc": "Tokenizing"}
    options |= {"cache_file_name": str(draft / "rows.arrow"), "load_from_cache_file": False}
    options |= {"new_fingerprint": folder.name[:32]}  # else datasets pickles the renderer to find one
    try:
        mapped = rows.map(task, features=datasets.Features.from_arrow_schema(pa.schema(_COLUMNS)), **options)
        files = [Path(file["filename"]) for file in mapped.cache_files]  # in order
        sizes = {file.name: file.stat().st_size for file in files}
        manifest = {"files": sizes, "report": asdict(_report(rows, mapped))}
        (draft / "report.json").write_text(json.dumps(manifest, indent=1))
        try:
            os.rename(draft, folder)
        except OSError:
            if not folder.exists():
                raise  # else another process was first, and its artefact is as good
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _report(rows: datasets.Dataset, mapped: datasets.Dataset) -> Report:
    reasons, full, kept = (mapped.data.column(name) for name in ("reason", "full_length", "length"))
    counts = {count["values"]: count["counts"] for count in pc.value_counts(reasons).to_pylist()}
    used, dropped = counts.pop("", 0), counts.pop(TOO_LONG, 0)
    examples = {}
    for why in counts:
        where = np.flatnonzero(pc.equal(reasons, why).to_numpy())[:3].tolist()
        examples[why] = [f"{place_in(rows, row)}: {mapped[row]['detail']}".removesuffix(": ") for row in where]
    return Report(len(rows), used, pc.sum(pc.greater(full, kept)).as_py(), dropped, counts, examples)


def _judge(report: Report, max_unusable_share: float) -> None:
    share = sum(report.unusable.values()) / report.rows
    if share > max_unusable_share:
        raise UserError(
            f"{share:.1%} of the rows cannot be used, {max_unusable_share:.1%} would be let pass: {report}. Mend them, "
            "data.max_length or data.messages, data.prompt and data.completion; or raise data.max_unusable_share"
        )
    if not report.used:
        raise UserError(f"no row is left to train on: {report}. Check data.max_length and data.overlength")
