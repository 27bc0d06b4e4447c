"""Where rows come from (the hub, or local files) and how one row becomes a conversation.

Local files are written once into an Arrow file named by the sha256 of their content, which every process memory-maps
and which is the rows' fingerprint. (datasets' own builders go by path and modification time: a copied file is converted
anew, and one changed under the same time stamp is not.) Lines of jsonl stay unparsed there: one that cannot be read
costs a counted row, not the run, and rows need not agree on a schema.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dft_lightning.data.rendering import UnusableRow
from dft_lightning.errors import UserError

if TYPE_CHECKING:
    import datasets

# What rows of local files have besides: the row as a line of JSON, if it is one; its file ("a.jsonl line"); its number.
LINE, _PLACE, _NUMBER = "__line__", "__place__", "__number__"
_FORMAT = "2"  # of the Arrow files; part of their name
_ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
_BATCH_ROWS = 1000
_READ_BYTES = 16 << 20
_NO_ROWS = re.compile(r"dataset_infos?\.json|dataset_dict\.json|state\.json|cache-.*\.arrow")  # what datasets adds
_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "eval"},
}
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Columns:
    """Which columns of a row hold its conversation: `messages`, or `prompt` and `completion` in its place."""

    messages: str | None = "messages"
    """A list of {role, content}, or ShareGPT's {from, value}."""
    prompt: str | None = None
    """What the user says: a text, or the list of messages that the completion answers."""
    completion: str | None = None
    """The assistant's answer to the prompt."""

    def __post_init__(self) -> None:
        pair = (self.prompt, self.completion)
        if all(pair) and self.messages == "messages":
            object.__setattr__(self, "messages", None)
        if any(pair) != all(pair) or any(pair) == bool(self.messages):
            raise UserError(f"name either data.messages, or both data.prompt and data.completion; got {self}")

    @property
    def wanted(self) -> list[str]:
        return [name for name in (self.messages, self.prompt, self.completion) if name]


def load_rows(
    *,
    dataset: str | None,
    path: str | None,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> datasets.Dataset:
    """The rows of a hub dataset, or of a local file, glob or folder (parquet, jsonl, json, or from `save_to_disk`).

    `split` may be a slice, as in `train[:1000]`. In a folder or glob, if files are named for splits, those of `split`
    are taken: never `validation.parquet` because it lies beside `train.parquet`.
    """
    if (dataset is None) == (path is None):
        raise UserError(f"give either data.dataset (on the hub) or data.path (local); got {dataset!r} and {path!r}")
    if path is None:
        return _hub_rows(path=dataset, name=name, split=split, revision=revision, cache_dir=cache_dir)
    if name or revision:
        raise UserError(f"data.name and data.revision belong to data.dataset; the local {path!r} has neither")
    whole = re.split(r"[\[+]", split)[0]
    return _sliced(_file_rows(_find_files(path, whole), cache_dir), whole, split)


def _hub_rows(**request: Any) -> datasets.Dataset:
    import datasets

    try:
        return datasets.load_dataset(**request)
    except Exception as error:  # hub, network, configuration and file errors have no class in common
        raise UserError(
            f"cannot load data.dataset from the hub: {error!r:.300}. Asked for: {request}. Without a network, set "
            "data.path to a local parquet or jsonl file, or to a folder of them, in place of data.dataset"
        ) from error


def _sliced(rows: datasets.Dataset, whole: str, split: str) -> datasets.Dataset:
    import datasets

    if split == whole:
        return rows
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({whole: len(rows)})
    except (ValueError, AssertionError, KeyError) as error:
        raise UserError(f"data.split {split!r} is no slice such as '{whole}[:1000]': {error!r:.200}") from error
    return rows.select(list(chain.from_iterable(range(part.from_, part.to) for part in parts)))


def _find_files(path: str, split: str) -> dict[str, Path]:
    """The files in order, by their names below the folder that they share."""
    root = Path(path).expanduser()
    if root.is_dir():
        inside = (file for file in root.rglob("*") if file.suffix.lower() in _READERS)
        matches = [file for file in inside if not any(part[0] == "." for part in file.relative_to(root).parts)]
    else:
        matches = [root] if root.is_file() else [Path(match) for match in glob.glob(str(root), recursive=True)]
    files = sorted(file for file in matches if file.is_file() and not _NO_ROWS.fullmatch(file.name))
    endings = {file.suffix.lower() for file in files}
    if not files or not endings <= _READERS.keys():
        got = f"has the ending {listed(endings - _READERS.keys())}" if files else "matches no files"
        raise UserError(f"{path!r} {got}; expected a file, glob or folder of {', '.join(_READERS)}")
    if len(endings) > 1:
        raise UserError(f"{path!r} mixes {listed(endings)}: choose one kind, as in '{path}/*.parquet'")
    top = root if root.is_dir() else os.path.commonpath([file.parent for file in files])
    named = {os.path.relpath(file, top): file for file in files}
    return named if root.is_file() else _of_split(named, split)


def _of_split(files: dict[str, Path], split: str) -> dict[str, Path]:
    words = {name: set(re.split(r"[^a-z]+", name.lower())) for name in files}
    others = [name for name in files if any(words[name] & known for known in _SPLITS.values())]
    chosen = {name: file for name, file in files.items() if words[name] & _SPLITS.get(split, {split.lower()})}
    if others and not chosen:
        raise UserError(f"no file is named for the split {split!r}, but {listed(others)} for others: name one file")
    return chosen or files


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"{name!r:.200}" for name in islice(sorted(names), 20))  # a row's keys may be anything


def _file_rows(files: Mapping[str, Path], cache_dir: str | os.PathLike[str] | None) -> datasets.Dataset:
    import datasets
    from datasets.table import MemoryMappedTable

    digest = hashlib.sha256(_FORMAT.encode())
    for name, file in files.items():
        try:
            with file.open("rb") as stream:
                digest.update(json.dumps([name, hashlib.file_digest(stream, "sha256").hexdigest()]).encode())  # 2 GB/s
        except OSError as error:
            raise UserError(f"cannot read {str(file)!r}: {error!r:.300}") from error
    key = digest.hexdigest()
    target = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "dft_rows" / f"{key}.arrow"
    try:
        _refuse_cut(target)
        table = MemoryMappedTable.from_file(str(target))
    except (OSError, ValueError):  # not there yet, or cut off
        _write_arrow(files, target)
        table = MemoryMappedTable.from_file(str(target))
    return datasets.Dataset(table, fingerprint=key)


def _write_arrow(files: Mapping[str, Path], target: Path) -> None:
    """Written beside the target and renamed, so that no other process sees a part of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    first = next(tables := _tables(files))
    draft = target.with_name(f".draft-{uuid4().hex}")
    try:
        with draft.open("xb") as sink, pa.ipc.new_stream(sink, first.schema) as writer:
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
            for table in _READERS[file.suffix.lower()](file):
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


def _refuse_cut(file: Path) -> None:
    """Arrow itself takes a stream that was cut off between two batches for a whole one."""
    with file.open("rb") as stream:
        stream.seek(-len(_ARROW_END), os.SEEK_END)
        if stream.read() != _ARROW_END:
            raise ValueError("it is cut off: the end mark of an Arrow stream is missing")


def _arrow_tables(file: Path) -> Iterator[pa.Table]:
    _refuse_cut(file)
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


_READERS: dict[str, Callable[[Path], Iterator[Any]]]
_READERS = {".parquet": _parquet_tables, ".jsonl": _line_tables, ".json": _json_tables, ".arrow": _arrow_tables}


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


def conversation(row: Mapping[str, Any], columns: Columns) -> list[dict[str, Any]]:
    """The row's messages, each with role and content as text and whatever else it has. Raises `UnusableRow`."""
    row = read_row(row)
    messages: list[dict[str, Any]] = []
    for name, role in zip(columns.wanted, ("user", "assistant"), strict=False):
        cell = row.get(name)
        if cell is None:
            raise UnusableRow("a column is missing or null", name)
        is_text = isinstance(cell, str) and columns.messages is None
        messages += _messages([{"role": role, "content": cell}] if is_text else cell)
    return messages


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(item, Mapping) for item in value):
        raise UnusableRow("not a list of messages", f"got {value!r:.60}")
    return [_message(item) for item in value]


def _message(item: Mapping[str, Any]) -> dict[str, Any]:
    if item.get("role") is None and "from" in item:
        others = {key: cell for key, cell in item.items() if key not in ("from", "value")}
        item = others | {"role": _SHAREGPT_ROLES.get(str(item["from"])), "content": item.get("value")}
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str):
        raise UnusableRow("a message has no known role", f"got {item!r:.60}")
    if not isinstance(content, str):
        raise UnusableRow("a message is not text", f"got {content!r:.60}")
    if not content.strip() and role != "system":  # an empty system message is common: it says that there be no default
        raise UnusableRow("a message is empty", role)
    return {**item, "role": role, "content": content}
