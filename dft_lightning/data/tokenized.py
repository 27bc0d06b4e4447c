"""Rows in tokens: rendered once, by one process or several, into a folder `cache_dir/<key>/` that `store.py` reads."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dft_lightning.chats import UnusableRow
from dft_lightning.data.readers import LINE, place_in, read_row
from dft_lightning.data.sources import Columns, conversation, require_columns
from dft_lightning.data.store import TOO_LONG, Report, Store, TokenizedRows
from dft_lightning.data.unsupported import (
    EFFECTIVE,
    refuse_head,
    refuse_report,
    refuse_row,
    refused_columns,
    unused,
    unused_names,
)
from dft_lightning.data.weights import RowWeight, message_weights, row_weight, token_weights
from dft_lightning.disk import writing
from dft_lightning.errors import UserError

if TYPE_CHECKING:
    import datasets

    from dft_lightning.data.rendering import ChatRenderer, Rendered

log = logging.getLogger(__name__)

TOKENIZED_VERSION = 2
"""Part of the key: to be raised whenever the same rows and rendering come out as another artefact."""

_FORMAT = "4"  # of the artefact; part of its name, but not of the key, which is what the tokens are

_BATCH_ROWS = 1000
_BATCH_CHARACTERS = 1 << 22  # of what is tokenised in one go
_ROWS_PER_WORKER = 4000  # with fewer, a process costs more than it gains
_COLUMNS = {
    "input_ids": pa.list_(pa.int32()),
    "supervised": pa.list_(pa.bool_()),
    "ends": pa.list_(pa.int32()),  # where the stop tokens of assistant turns are
    "weights": pa.list_(pa.float32()),  # of the supervised tokens, in order; empty where the row has none
    "length": pa.int32(),
    "targets": pa.int32(),  # supervised tokens with a predecessor
    "full_length": pa.int32(),  # before truncation
    "source": pa.string(),
    "reason": pa.string(),  # why the row cannot be used; "" if it can
    "detail": pa.string(),
    "unused": pa.string(),  # what the row has and nothing reads, in lines
}


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
    message_weights: bool = True,
) -> TokenizedRows:
    """The rows in tokens: from `cache_dir` if they are there, else rendered and put there; processes may share it.

    Args:
        max_length: in tokens. What is longer is truncated on the right, or dropped, as `overlength` says.
        workers: processes to render in. 0: this one. None: one a core, if cores and rows are enough to gain by it.
        max_unusable_share: a larger share of unusable rows is refused.
        message_weights: whether the key `weight` of a message is its weight, or is passed over.
    """
    if not len(rows):
        raise UserError("there are no rows: check data.path and data.split")
    if max_length < 2 or overlength not in ("truncate", "drop") or not 0 <= max_unusable_share <= 1:
        raise UserError(
            "expected data.max_length of at least 2, data.overlength truncate or drop, data.max_unusable_share from 0 "
            f"to 1; got {max_length}, {overlength}, {max_unusable_share}"
        )
    require_columns(rows, columns)
    task = _Task(renderer, columns, max_length, overlength, message_weights)
    key = task.key(rows._fingerprint)
    folder = Path(cache_dir) / f"{key}-{_FORMAT}"
    store = _open(folder)
    if store is None:
        refuse_head(rows, columns)
        _build(rows, task, folder, _workers(len(rows)) if workers is None else workers)
        store = Store(folder)
    _judge(store.report, max_unusable_share)
    return TokenizedRows(store, np.flatnonzero(store.targets), key)


class _Row(NamedTuple):
    """What is read of a row before it is rendered."""

    chat: list[dict[str, Any]] | UnusableRow
    source: str
    of_row: RowWeight | None = None
    of_messages: list[float] | None = None
    unused: str = ""


@dataclass(frozen=True)
class _Task:
    """What is done to a batch of rows, wherever."""

    renderer: ChatRenderer
    columns: Columns
    max_length: int
    overlength: str
    message_weights: bool

    def key(self, source: str) -> str:
        parts: list[Any] = [TOKENIZED_VERSION, source, self.renderer.identity, *self.columns.wanted]
        parts += [self.max_length, self.overlength]
        parts += [{"weight": self.columns.weight}] if self.columns.weight is not None else []  # keys of before stay
        parts += [] if self.message_weights else [{"message_weights": False}]
        parts += [{"ignore": ignored}] if (ignored := sorted(EFFECTIVE.intersection(self.columns.ignore))) else []
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def __call__(self, batch: Mapping[str, list[Any]]) -> pa.Table:
        names = [name for name in batch if name in {LINE, "source", *self.columns.read, *refused_columns(self.columns)}]
        read = [self._read(raw) for raw in _raws(batch, names)]
        rendered = self._rendered([row.chat for row in read if not isinstance(row.chat, UnusableRow)])
        rows = [self._cells(row, row.chat if isinstance(row.chat, UnusableRow) else next(rendered)) for row in read]
        table = {name: [row.get(name, "") for row in rows] for name in _COLUMNS}
        notes = {"source": [row.source for row in read], "unused": [row.unused for row in read]}
        return pa.table(table | notes, schema=pa.schema(_COLUMNS))

    def _rendered(self, chats: list[list[dict[str, Any]]]) -> Iterator[Rendered | UnusableRow]:
        """Piece by piece: the tokens of a thousand rows of a megabyte each would not fit in memory."""
        part, size = [], 0
        for index, chat in enumerate(chats, start=1):
            part.append(chat)
            size += sum(len(message["content"]) for message in chat)
            if size > _BATCH_CHARACTERS or index == len(chats):
                yield from self.renderer.render_batch(part)
                part, size = [], 0

    def _read(self, raw: Mapping[str, Any] | UnusableRow) -> _Row:
        source = ""
        if isinstance(raw, UnusableRow):
            return _Row(raw, source)
        try:
            row = read_row(raw)
            source = _storable(row.get("source"))
            refuse_row(row, self.columns)
            chat, column = conversation(row, self.columns), self.columns.weight
            of_row = None if column is None else row_weight(row, column)
            of_messages = message_weights(chat) if self.message_weights else None
            return _Row(chat, source, of_row, of_messages, _storable("\n".join(unused(row, self.columns))))
        except UnusableRow as unusable:
            return _Row(unusable, source)

    def _cells(self, read: _Row, row: Rendered | UnusableRow) -> dict[str, Any]:
        try:
            if isinstance(row, UnusableRow):
                raise row
            weights = token_weights(row, read.of_row, read.of_messages)
        except UnusableRow as unusable:
            return _without_tokens(unusable.reason, unusable.detail)
        ids, supervised = row.input_ids[: self.max_length], row.supervised[: self.max_length]
        full, targets = len(row.input_ids), sum(supervised[1:])
        assert full == len(row.supervised)
        if full > self.max_length and self.overlength == "drop":
            return _without_tokens(TOO_LONG)
        if not targets:
            return _without_tokens("nothing left to learn", f"{full} tokens, data.max_length {self.max_length}")
        numbers = {"length": len(ids), "targets": targets, "full_length": full}
        marks = {"ends": [end for end in row.ends if end < len(ids)], "weights": weights[: sum(supervised)]}
        return {"input_ids": ids, "supervised": supervised, **marks, **numbers}


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
    empty: dict[str, Any] = {name: [] for name in ("input_ids", "supervised", "ends", "weights")}
    empty |= dict.fromkeys(("length", "targets", "full_length"), 0)
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


def _open(folder: Path) -> Store | None:
    if not folder.exists():
        return None
    try:
        return Store(folder)
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        log.warning("The token cache %s is damaged and will be built anew: %r", folder, error)
    aside = folder.with_name(f".damaged-{uuid4().hex}")
    with suppress(FileNotFoundError):  # another process has done it
        os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)
    return None


def _build(rows: datasets.Dataset, task: _Task, folder: Path, workers: int) -> None:
    draft = folder.with_name(f".draft-{uuid4().hex}")
    options: dict[str, Any] = {"batched": True, "batch_size": _BATCH_ROWS, "num_proc": workers or None}
    options |= {"desc": "Tokenizing"}
    options |= {"cache_file_name": str(draft / "rows.arrow"), "load_from_cache_file": False}
    options |= {"new_fingerprint": folder.name[:32]}  # else datasets pickles the renderer to find one
    try:
        with writing(folder, "--data.cache_dir"):
            _write(rows, task, folder, draft, options)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(rows: datasets.Dataset, task: _Task, folder: Path, draft: Path, options: dict[str, Any]) -> None:
    import datasets

    draft.mkdir(parents=True)
    mapped = rows.map(task, features=datasets.Features.from_arrow_schema(pa.schema(_COLUMNS)), **options)
    files = [Path(file["filename"]) for file in mapped.cache_files]  # in order
    sizes = {file.name: file.stat().st_size for file in files}
    manifest = {
        "files": sizes,
        "report": asdict(_report(rows, mapped, task.columns)),
        "largest_id": _largest_id(mapped),
    }
    (draft / "report.json").write_text(json.dumps(manifest, indent=1))
    try:
        os.rename(draft, folder)
    except OSError:
        if not folder.exists():
            raise  # else another process was first, and its artefact is as good


def _report(rows: datasets.Dataset, mapped: datasets.Dataset, columns: Columns) -> Report:
    reasons, full, kept = (mapped.data.column(name) for name in ("reason", "full_length", "length"))
    counts = {count["values"]: count["counts"] for count in pc.value_counts(reasons).to_pylist()}
    used, dropped = counts.pop("", 0), counts.pop(TOO_LONG, 0)
    examples = {}
    for why in counts:
        where = np.flatnonzero(pc.equal(reasons, why).to_numpy())[:3].tolist()
        examples[why] = [f"{place_in(rows, row)}: {mapped[row]['detail']}".removesuffix(": ") for row in where]
    weights = mapped.data.column("weights")
    weighted = pc.sum(pc.greater(pc.list_value_length(weights), 0)).as_py()
    changed = pc.any(pc.not_equal(pc.list_flatten(weights), 1.0)).as_py() or False
    truncated, rest = pc.sum(pc.greater(full, kept)).as_py(), unused_names(rows, mapped.data.column("unused"), columns)
    return Report(len(rows), used, truncated, dropped, counts, examples, weighted, changed, rest)


def _largest_id(mapped: datasets.Dataset) -> int:
    """Of all tokens; -1 where there are none."""
    found = pc.max(pc.list_flatten(mapped.data.column("input_ids"))).as_py()
    return -1 if found is None else int(found)


def _judge(report: Report, max_unusable_share: float) -> None:
    refuse_report(report)
    share = sum(report.unusable.values()) / report.rows
    if share > max_unusable_share:
        raise UserError(
            f"{share:.1%} of the rows cannot be used, {max_unusable_share:.1%} would be let pass: {report}. Mend them, "
            "data.max_length or data.messages, data.prompt and data.completion; or raise data.max_unusable_share"
        )
    if not report.used:
        raise UserError(f"no row is left to train on: {report}. Check data.max_length and data.overlength")
