"""Columns and keys of messages that say what the model is shown or trained on, and that are not supported.

They mean that the data say something other than what would be trained on. So each refuses the whole run, unless
`data.ignore` names it. Values that ask for what happens anyway pass: `train: true` of an assistant message, a list of
no tools.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from dft_lightning.chats import REASONING, TOOL_CALLS, UnusableRow
from dft_lightning.data.readers import LINE, place_in, read_row
from dft_lightning.errors import UserError

if TYPE_CHECKING:
    import datasets

    from dft_lightning.data.sources import Columns
    from dft_lightning.data.store import Report

REASON = "says what is shown or trained on, and is not supported: "
"""Begins the reason of such a row; the names follow."""

_TRAINED = ("train", "trainable", "training", "loss", "loss_mask")  # 1 or true: the message is trained on
_MASKED = ("masked",)  # 1 or true: it is not
_STRETCHES = ("train_detail", "training_detail")  # which parts of it are
_SHOWN = ("tools", "functions", "documents")
_SYSTEM = ("system", "system_prompt")
_COLUMNS = (*_SHOWN, *_SYSTEM, "chat_template_kwargs", "loss_mask")
_KEYS = {*_TRAINED, *_MASKED, *_STRETCHES, *_SHOWN}
_PARTNER = {"instruction": "input", "input": "instruction"}  # Alpaca's prompt is both
_READ_KEYS = {"role", "content", "from", "value", "weight", *TOOL_CALLS, *REASONING, *_KEYS}
_HEAD_ROWS = 1000
_MOST_NAMES = 20

EFFECTIVE = frozenset({"weight", *TOOL_CALLS, *REASONING, *_KEYS, *_COLUMNS, *_PARTNER})
"""What changes a row's tokens, weights or usability if it is in `data.ignore`; any other name only is not listed."""

_ADVICE = {
    "column system": "one system prompt for all rows is given as data.system_prompt",
    "column system_prompt": "one system prompt for all rows is given as data.system_prompt",
    "column chat_template_kwargs": "variables that are the same for all rows are given as data.template_kwargs",
    "column input": "write instruction and input into one column, and name it in data.prompt",
    "column instruction": "write instruction and input into one column, and name it in data.prompt",
}


@lru_cache
def refused_columns(columns: Columns) -> tuple[str, ...]:
    """The columns that may not say anything where these are read."""
    partner = [_PARTNER[columns.prompt]] if columns.prompt in _PARTNER else []
    return tuple(name for name in (*_COLUMNS, *partner) if name not in {*columns.read, *columns.ignore})


@lru_cache
def _read_columns(columns: Columns) -> frozenset[str]:
    return frozenset({*columns.read, *_COLUMNS, *refused_columns(columns), "source"})


def unsupported(row: Mapping[str, Any], columns: Columns) -> dict[str, str]:
    """What the row has of such columns and keys, as "column tools" or "key train", and an example of each."""
    found: dict[str, str] = {}
    for name in refused_columns(columns):
        if name in row and not _says_nothing(row[name]) and not (name in _SYSTEM and _is_repeated(row, columns, name)):
            found[f"column {name}"] = f"{row[name]!r:.60}"
    for index, message in _messages(row, columns):
        for key in _KEYS & message.keys():
            if key not in columns.ignore and not _is_default(key, message):
                found.setdefault(f"key {key}", f"message {index} has {key}: {message[key]!r:.40}")
    return dict(sorted(found.items()))


def refuse_row(row: Mapping[str, Any], columns: Columns) -> None:
    """Raises `UnusableRow` with `REASON` if the row has such columns or keys."""
    if found := unsupported(row, columns):
        raise UnusableRow(_reason(found), "; ".join(found.values()))


def _reason(found: Iterable[str]) -> str:
    return REASON + ", ".join(found)


def refuse_head(rows: datasets.Dataset, columns: Columns) -> None:
    """A UserError if the first of many rows have such columns or keys: not after minutes of tokenizing."""
    if len(rows) <= _HEAD_ROWS:
        return
    names = {LINE, *columns.read, *refused_columns(columns)}.intersection(rows.column_names)
    read, reasons = rows.select_columns(sorted(names)), Counter[str]()
    examples: dict[str, list[str]] = {}
    for index in range(_HEAD_ROWS):
        with suppress(ValueError, OverflowError, pa.ArrowException):  # counted as unreadable later on
            row = read_row(read[index])
            if found := unsupported(row, columns):
                reasons[reason := _reason(found)] += 1
                examples.setdefault(reason, []).append(f"{place_in(rows, index)}: {'; '.join(found.values())}")
    _refuse(reasons, examples, f"the first {_HEAD_ROWS}")


def refuse_report(report: Report) -> None:
    """A UserError if rows have such columns or keys: not a share of unusable rows, but data of another meaning."""
    _refuse(report.unusable, report.examples, str(report.rows))


def _refuse(reasons: Mapping[str, int], examples: Mapping[str, Sequence[str]], of: str) -> None:
    found = {why: count for why, count in reasons.items() if why.startswith(REASON)}
    if not found:
        return
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for why, count in found.items():
        for name in why.removeprefix(REASON).split(", "):
            counts[name] += count
            first.setdefault(name, examples[why][0])
    listed = "; ".join(f"the {name} in {count} of {of} rows ({first[name]})" for name, count in sorted(counts.items()))
    advice = "".join(f"; {line}" for line in dict.fromkeys(_ADVICE[name] for name in sorted(counts) if name in _ADVICE))
    ignore = ", ".join(sorted({name.split(" ")[1] for name in counts}))
    raise UserError(
        f"the rows say what the model is to be shown or trained on by what is not supported: {listed}. To train as if "
        f"it were not there, set --data.ignore '[{ignore}]'; else write other rows{advice}"
    )


def unused(row: Mapping[str, Any], columns: Columns) -> list[str]:
    """Columns and keys of messages that have a value and that nothing reads, as "column id" or "key name"."""
    read = _read_columns(columns)
    names = [f"column {name}" for name in row.keys() - read if row[name] is not None]
    keys = {key for _, at in _messages(row, columns) for key in at.keys() - _READ_KEYS if at[key] is not None}
    names = sorted(names) + [f"key {key}" for key in sorted(keys)]
    return [f"{name:.60}" for name in islice(names, _MOST_NAMES)]


def unused_names(rows: datasets.Dataset, notes: pa.ChunkedArray, columns: Columns) -> list[str]:
    """What `unused` noted of all rows, and the columns of files that have columns."""
    names = {name for lines in pc.unique(notes).to_pylist() for name in lines.splitlines()}
    if LINE not in rows.column_names:
        names |= set(unused(read_row(dict.fromkeys(rows.column_names, "")), columns))
    return sorted(names)[: 2 * _MOST_NAMES]


def unused_line(names: Iterable[str], ignore: Sequence[str] = ()) -> str:
    """For the log: what the rows have and nothing reads, without what is to be ignored; "" where there is nothing."""
    names = [name for name in names if name.partition(" ")[2] not in ignore]
    kinds = {"column": "columns", "key": "keys of messages"}
    found = {kind: sorted(name.partition(" ")[2] for name in names if name.startswith(kind)) for kind in kinds}
    parts = [f"{kinds[kind]} {', '.join(map(repr, each[:_MOST_NAMES]))}" for kind, each in found.items() if each]
    return f"Not used: {'; '.join(parts)} (data.ignore takes names off this list)" if parts else ""


def _messages(row: Mapping[str, Any], columns: Columns) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """All messages of a row, numbered from 1, as they stand there."""
    cells = [row.get(name) for name in columns.wanted]
    messages = [message for cell in cells if isinstance(cell, list) for message in cell]
    return ((index, message) for index, message in enumerate(messages, start=1) if isinstance(message, Mapping))


def _is_default(key: str, message: Mapping[str, Any]) -> bool:
    """Whether the key asks for what happens anyway: the assistant's messages are trained on, all of each."""
    value, trained = message[key], (message.get("role") or message.get("from")) in ("assistant", "gpt")
    if key in _TRAINED:
        return value is None or value == trained
    return value is None or value != trained if key in _MASKED else _says_nothing(value)


def _is_repeated(row: Mapping[str, Any], columns: Columns, name: str) -> bool:
    """Whether the conversation has this system prompt itself."""
    first = next((message for _, message in _messages(row, columns)), {})
    is_system = "system" in (first.get("role"), first.get("from"))
    return is_system and row[name] in (first.get("content"), first.get("value"))


def _says_nothing(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, Mapping):
        return all(map(_says_nothing, value.values()))
    return value is None or (isinstance(value, list) and all(map(_says_nothing, value)))
