"""Files read into one Arrow table of rows, each with its place; nothing in a file disturbs more than its own row."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dft_lightning.chats import UnusableRow
from dft_lightning.disk import writing
from dft_lightning.errors import UserError

if TYPE_CHECKING:
    import datasets

# What rows of local files have besides: the row as a line of JSON, if it is one; its file ("a.jsonl line"); its number.
LINE, _PLACE, _NUMBER = "__line__", "__place__", "__number__"
_ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
_BATCH_ROWS = 1000
_READ_BYTES = 16 << 20


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"{name!r:.200}" for name in islice(sorted(names), 20))  # a row's keys may be anything


def write_arrow(files: Mapping[str, Path], target: Path) -> None:
    """Written beside the target and renamed, so that no other process sees a part of it."""
    with writing(target, "--data.cache_dir"):
        target.parent.mkdir(parents=True, exist_ok=True)
    first = next(tables := _tables(files))
    draft = target.with_name(f".draft-{uuid4().hex}")
    try:
        with (
            writing(target, "--data.cache_dir"),
            draft.open("xb") as sink,
            pa.ipc.new_stream(sink, first.schema) as writer,
        ):
            for table in chain([first], tables):
                writer.write_table(table, _BATCH_ROWS)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def _tables(files: Mapping[str, Path]) -> Iterator[pa.Table]:
    """Pieces of the files, in the first one's schema. Blank lines are counted as lines, but are no rows."""
    import datasets

    schema = None
    for name, file in files.items():
        kind, count = ("line", 1) if file.suffix.lower() == ".jsonl" else ("row", 0)
        empty = True
        try:
            for table in READERS[file.suffix.lower()](file):
                table = table.append_column(_PLACE, pa.array([f"{name} {kind}"] * len(table), pa.string()))
                table = table.append_column(_NUMBER, pa.array(range(count, count + len(table)), pa.int64()))
                count += len(table)
                fields = _fields(table.schema)
                if LINE in table.column_names:
                    table = table.filter(pc.match_substring_regex(table[LINE], r"\S"))
                if schema is None:
                    datasets.Dataset(table.slice(0, 0))  # an error where datasets knows no such type
                    schema, first = table.schema, fields
                if set(table.column_names) != set(schema.names):
                    raise ValueError(f"its columns are {table.column_names}, the first file's are {schema.names}")
                if strange := listed(path for path, _ in fields.items() - first.items()):
                    raise ValueError(
                        f"the first file has no {strange}, or one is text and one is not: give both one schema"
                    )
                empty = empty and not len(table)
                yield table.select(schema.names).cast(schema)
        except Exception as error:  # what pyarrow and datasets raise about a damaged file has no class in common
            raise UserError(f"cannot read {str(file)!r}: {error!r:.300}") from error
        if empty:
            raise UserError(f"{str(file)!r} has no rows")


def _leaves(fields: Iterable[pa.Field], above: str = "") -> Iterator[tuple[str, bool]]:
    """The innermost fields, but those that are null throughout: the path of each, and whether it is text."""
    for field in fields:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        inner = [kind.field(index) for index in range(kind.num_fields)]
        if inner:  # of a list one, whose name says nothing
            inner = inner if pa.types.is_struct(kind) else [part.with_name("") for part in inner]
            yield from _leaves(inner, f"{above}{field.name}.")
        elif not pa.types.is_null(kind):
            yield above + field.name, str(kind).removeprefix("large_").removesuffix("_view") == "string"


def _fields(schema: pa.Schema) -> dict[str, bool]:
    """The leaves of a file. A ValueError where two columns or fields have one name: all but one would be lost."""
    reserved = [LINE] if schema.names[:-2] != [LINE] else []
    counts = Counter(path for path, _ in _leaves(schema)) | Counter([*schema.names, *reserved])
    if twice := [path for path, count in counts.items() if count > 1]:
        raise ValueError(f"it has {listed(twice)} twice, or that name is used here: rename one")
    return dict(_leaves(schema))


def refuse_cut(file: Path) -> None:
    """Arrow itself takes a stream that was cut off between two batches for a whole one."""
    with file.open("rb") as stream:
        stream.seek(-len(_ARROW_END), os.SEEK_END)
        if stream.read() != _ARROW_END:
            raise ValueError("it is cut off: the end mark of an Arrow stream is missing")


def _arrow_tables(file: Path) -> Iterator[pa.Table]:
    refuse_cut(file)
    with pa.memory_map(str(file)) as mapped:
        for batch in pa.ipc.open_stream(mapped):
            batch.validate(full=True)  # a wrong offset in it would end the process
            yield pa.Table.from_batches([batch])


def _parquet_tables(file: Path) -> Iterator[pa.Table]:
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(_BATCH_ROWS):
            yield pa.Table.from_batches([batch])


def _line_tables(file: Path) -> Iterator[pa.Table]:
    """Split at newline bytes only: U+2028 and a lone carriage return may stand inside a row."""
    with file.open("rb") as stream:
        while lines := stream.readlines(_READ_BYTES):
            yield pa.table({LINE: pa.array(lines, pa.binary())})


def _json_tables(file: Path) -> Iterator[pa.Table]:
    try:
        content = json.loads(file.read_bytes().decode("utf-8-sig"), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":  # a second value after the first: lines of JSON under this ending
            raise
        yield from _line_tables(file)
        return
    values = content.values() if isinstance(content, dict) else [content]
    lists = [value for value in values if isinstance(value, list) and any(isinstance(row, dict) for row in value)]
    if len(lists) != 1:
        raise ValueError("expected a list of rows, or one object with exactly one list of rows in it")
    yield pa.table({LINE: pa.array([json.dumps(row).encode() for row in lists[0]], pa.binary())})


READERS: dict[str, Callable[[Path], Iterator[Any]]]
READERS = {".parquet": _parquet_tables, ".jsonl": _line_tables, ".json": _json_tables, ".arrow": _arrow_tables}


def read_row(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row itself: parsed where it is still a line of JSON, and without what was added to it."""
    if not isinstance(raw.get(LINE), bytes):  # a row may itself have a key of that name
        return {name: cell for name, cell in raw.items() if name not in (_PLACE, _NUMBER)}
    try:
        row = json.loads(raw[LINE].decode("utf-8-sig"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise UnusableRow("not valid JSON", f"{type(error).__name__}: {error}") from error
    if not isinstance(row, dict):
        raise UnusableRow("not a JSON object", type(row).__name__)
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; a ValueError where a key is given twice, as nothing says which of its values is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r:.60} is given twice")
    return found


def place_in(rows: datasets.Dataset, index: int) -> str:
    """The place of a row by its place alone: other cells of it may be such that they cannot be read."""
    known = [name for name in (_PLACE, _NUMBER) if name in rows.column_names]
    return place_of(rows.select_columns(known)[index] if known else {}, index)


def place_of(raw: Mapping[str, Any], index: int) -> str:
    """Where a user finds this row: a line (from 1) or row (from 0) of a file, or of the hub's split."""
    return f"{raw[_PLACE]} {raw[_NUMBER]}" if _PLACE in raw else f"row {index}"
