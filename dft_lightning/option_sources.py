"""What the command line and the configuration files set, one entry per key, each with the place where it is written."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_CONFIG = ("config", "c")
_STRUCTURE = ("class_path", "init_args", "dict_kwargs")


@dataclass(frozen=True)
class Entry:
    """One key that is set.

    Args:
        path: the key without `class_path` and `init_args`; items of lists are numbers, such as
            `("trainer", "callbacks", "0", "monitor")`.
        value: what it is set to; the class path where the value is a class.
        shown: the key as the user wrote it, such as `--model.weighting.floor`.
        file: the configuration file that sets it; "" where the command line does.
        is_misplaced: it stands next to `class_path`, where `init_args` belongs.
    """

    path: tuple[str, ...]
    value: Any
    shown: str
    file: str = ""
    is_misplaced: bool = False

    @property
    def place(self) -> str:
        """File and key, or the option of the command line."""
        return f"{self.file}: {self.shown}" if self.file else self.shown


def entries(words: Sequence[str]) -> Iterator[Entry]:
    """Every key that the words and the configuration files among them set, in the order in which they are read."""
    items: dict[tuple[str, ...], int] = {}  # of each list that words have added to, the last item
    for name, value in options(words):
        if name in _CONFIG:
            yield from _of_file(value, items)
            continue
        bare = name.removesuffix("+")
        path = _indexed(tuple(part for part in bare.split(".") if part not in _STRUCTURE), items)
        if name.endswith("+"):
            items[path] = items.get(path, -1) + 1
            path = (*path, str(items[path]))
        file, content = _content(value)
        shown = f"--{bare}" if not file else bare
        yield from _flat(path, content, shown, file, items)


def options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each option of the command line with its value; "" where it has none."""
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if word.startswith("--") or word.split("=")[0] == "-c":
            name, sign, value = word.lstrip("-").partition("=")
            yield name, value if sign else following


def _indexed(path: tuple[str, ...], items: Mapping[tuple[str, ...], int]) -> tuple[str, ...]:
    """The path with the last item of a list in it, to which options after it belong."""
    for length in range(len(path) - 1, 0, -1):
        if path[:length] in items and not path[length].isdigit():
            return (*path[:length], str(items[path[:length]]), *path[length:])
    return path


def _of_file(name: str, items: dict[tuple[str, ...], int]) -> Iterator[Entry]:
    file, content = _content(name)
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flat((str(key),), value, str(key), file or "--config", items)


def _content(text: str) -> tuple[str, Any]:
    """The file that a value names, or "", and the mapping or list that is in it or in the text; else the text."""
    try:
        is_file = bool(text) and Path(text).is_file()
        loaded = yaml.safe_load(Path(text).read_text(encoding="utf-8") if is_file else text)
    except (OSError, ValueError, yaml.YAMLError):
        return "", text
    return (text if is_file else "", loaded) if isinstance(loaded, Mapping | list) else ("", text)


def _flat(
    path: tuple[str, ...], value: Any, shown: str, file: str, items: dict[tuple[str, ...], int]
) -> Iterator[Entry]:
    """The keys within a value; a class comes before its options."""
    if isinstance(value, Mapping):
        yield Entry(path, value.get("class_path", value), shown, file)
        for key in ("init_args", "dict_kwargs"):
            if isinstance(value.get(key), Mapping):
                for name, each in value[key].items():
                    yield from _flat((*path, str(name)), each, f"{shown}.{key}.{name}", file, items)
        for key in [each for each in value if each not in _STRUCTURE]:
            if "class_path" in value:
                yield Entry((*path, str(key)), value[key], f"{shown}.{key}", file, is_misplaced=True)
                continue
            yield from _flat((*path, str(key)), value[key], f"{shown}.{key}", file, items)
    elif isinstance(value, list):
        items[path] = len(value) - 1
        for at, each in enumerate(value):
            item = f"{shown}.{at}" if isinstance(each, Mapping) else shown
            yield from _flat((*path, str(at)), each, item, file, items)
    else:
        yield Entry(path, value, shown, file)
