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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dft_lightning.chats import TOOL_RESULTS, UnusableRow, refuse_unsupported
from dft_lightning.data.readers import LINE, READERS, listed, read_row, refuse_cut, write_arrow
from dft_lightning.errors import UserError

if TYPE_CHECKING:
    import datasets

_FORMAT = "2"  # of the Arrow files; part of their name
_NO_ROWS = re.compile(r"dataset_infos?\.json|dataset_dict\.json|state\.json|cache-.*\.arrow")  # what datasets adds
_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "eval"},
}
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_SHAREGPT_ROLES |= {role: role for role in ("developer", "function_call", *TOOL_RESULTS)}  # to be refused by name


@dataclass(frozen=True)
class Columns:
    """Which columns of a row hold its conversation: `messages`, or `prompt` and `completion`; its weight."""

    messages: str | None = "messages"
    """A list of {role, content}, or ShareGPT's {from, value}."""
    prompt: str | None = None
    """What the user says: a text, or the list of messages that the completion answers."""
    completion: str | None = None
    """The assistant's answer to the prompt."""
    weight: str | None = None
    """How much the row counts, or each of its supervised tokens: see `data/weights.py`."""
    ignore: tuple[str, ...] = ()
    """Columns and keys of messages that are passed over: see `data/unsupported.py`."""

    def __post_init__(self) -> None:
        pair = (self.prompt, self.completion)
        if all(pair) and self.messages == "messages":
            object.__setattr__(self, "messages", None)
        if any(pair) != all(pair) or any(pair) == bool(self.messages):
            raise UserError(f"name either data.messages, or both data.prompt and data.completion; got {self}")
        if needed := {*self.read, "role", "content", "from", "value"}.intersection(self.ignore):
            raise UserError(f"data.ignore names what the rows are read from: {listed(needed)}; take it off that list")

    @property
    def wanted(self) -> list[str]:
        """The columns of the conversation."""
        return [name for name in (self.messages, self.prompt, self.completion) if name]

    @property
    def read(self) -> list[str]:
        """All of them."""
        return [*self.wanted, *([self.weight] if self.weight is not None else [])]


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
        inside = (file for file in root.rglob("*") if file.suffix.lower() in READERS)
        matches = [file for file in inside if not any(part[0] == "." for part in file.relative_to(root).parts)]
    else:
        matches = [root] if root.is_file() else [Path(match) for match in glob.glob(str(root), recursive=True)]
    files = sorted(file for file in matches if file.is_file() and not _NO_ROWS.fullmatch(file.name))
    endings = {file.suffix.lower() for file in files}
    if not files or not endings <= READERS.keys():
        got = f"has the ending {listed(endings - READERS.keys())}" if files else "matches no files"
        raise UserError(f"{path!r} {got}; expected a file, glob or folder of {', '.join(READERS)}")
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
        refuse_cut(target)
        table = MemoryMappedTable.from_file(str(target))
    except (OSError, ValueError):  # not there yet, or cut off
        write_arrow(files, target)
        table = MemoryMappedTable.from_file(str(target))
    return datasets.Dataset(table, fingerprint=key)


def require_columns(rows: datasets.Dataset, columns: Columns) -> None:
    """A UserError if no row has what a conversation is made of."""
    seen = set(read_row(dict.fromkeys(rows.column_names)))
    if LINE in seen:
        seen = set()
        for raw in rows:
            with suppress(UnusableRow):
                seen |= read_row(raw).keys()
            if seen.issuperset(columns.read):  # as a rule the first row
                break
    missing = [name for name in columns.wanted if name not in seen]
    if missing and seen:  # where no line can be read, the report says so
        raise UserError(
            f"no row has the column {listed(missing)}; there are {listed(seen)}. Name the one of the conversation in "
            "data.messages, or those of its two sides in data.prompt and data.completion"
        )
    if columns.weight is not None and columns.weight not in seen and seen:
        raise UserError(f"no row has the column {columns.weight!r} of data.weight; there are {listed(seen)}")


def conversation(row: Mapping[str, Any], columns: Columns) -> list[dict[str, Any]]:
    """The row's messages, each with role and content as text and whatever else it has. Raises `UnusableRow`."""
    row = read_row(row)
    messages: list[dict[str, Any]] = []
    for name, role in zip(columns.wanted, ("user", "assistant"), strict=False):
        cell = row.get(name)
        if cell is None:
            raise UnusableRow("a column is missing or null", name)
        is_text = isinstance(cell, str) and columns.messages is None
        cell = _without(cell, columns.ignore) if columns.ignore else cell
        messages += _messages([{"role": role, "content": cell}] if is_text else cell)
    return messages


def _without(cell: Any, ignored: tuple[str, ...]) -> Any:
    if not isinstance(cell, list):
        return cell
    return [{k: v for k, v in item.items() if k not in ignored} if isinstance(item, Mapping) else item for item in cell]


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
    if not isinstance(content, str) or not content.strip():
        refuse_unsupported(item)  # an empty text beside a tool call is as it should be
    if not isinstance(content, str):
        raise UnusableRow("a message is not text", f"got {content!r:.60}")
    if not content.strip() and role != "system":  # an empty system message is common: it says that there be no default
        raise UnusableRow("a message is empty", role)
    return {**item, "role": role, "content": content}
