"""Which options there are at a place of the configuration, and which one a misspelt name most likely stands for."""

import importlib
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jsonargparse import ArgumentParser
from torch.optim import Optimizer

from dft_lightning.option_sources import Entry, entries
from dft_lightning.suggestions import did_you_mean, nearest

_STRUCTURE = ("class_path", "init_args", "dict_kwargs")
_MOST_LISTED = 15

Known = Mapping[str, Any]
"""Names of options with their types."""


@dataclass(frozen=True)
class Unknown:
    """A key that there is not.

    Args:
        entry: where it is written.
        name: the part of it that is not known.
        owner: the class that has no such option; "" where no class does.
        known: what is valid in its place.
    """

    entry: Entry
    name: str
    owner: str
    known: Sequence[str]

    def __str__(self) -> str:
        what = f"{self.owner} has no such option" if self.owner else "no such option"
        names = nearest(self.name, self.known)
        meant = f"; did you mean {' or '.join(map(self._written, names))}?" if names else ""
        if names and names[0].startswith(self.name) and not self.entry.file:
            meant += " Options cannot be abbreviated"
        elif not names and self.owner:
            meant = f"; it has {', '.join(self.known)}" if self.known else "; it has no options"
        elif not names and len(self.known) <= _MOST_LISTED:
            meant = f"; expected one of {', '.join(self.known)}"
        elif not names:
            meant = "; --help lists all options"
        return f"{self.entry.place}: {what}{meant}"

    def _written(self, name: str) -> str:
        """A known name, as the user would write it in place of the unknown one."""
        parts = self.entry.shown.split(".")
        bare = [part.removeprefix("--") for part in parts]
        if ("." in name and not self.entry.is_misplaced) or self.name not in bare:  # trainer.max_steps for max_steps
            return f"{'' if self.entry.file else '--'}{name}"
        at = len(bare) - 1 - bare[::-1].index(self.name)
        return ("" if self.entry.file else "--") + ".".join([*bare[:at], name])


def find_unknown(known: Known, words: Sequence[str], defaults: Callable[[str], Any]) -> Unknown | None:
    """The first key of the command line or of a configuration file that there is not.

    Args:
        known: the options of the command, in full, with their types.
        words: of the command line.
        defaults: of an option, what it is where nothing sets it.
    """
    return Names(known, defaults).first_unknown(entries(words))


class Names:
    """The options of a command, and those of the classes that are named for them so far."""

    def __init__(self, known: Known, defaults: Callable[[str], Any]) -> None:
        self.known, self.defaults = known, defaults
        self.classes: dict[tuple[str, ...], str] = {}

    def first_unknown(self, given: Iterable[Entry]) -> Unknown | None:
        """The first of the entries whose key there is not."""
        for entry in given:
            if isinstance(entry.value, str):
                self.classes[entry.path] = entry.value
            if (unknown := self._check(entry)) is not None:
                return unknown
        return None

    def hint_of(self, entry: Entry) -> Any:
        """The type of an entry's value; None where it is not known."""
        length = self._option_length(entry.path)
        return self._below(entry, length, self.known[".".join(entry.path[:length])]) if length else None

    def _option_length(self, path: tuple[str, ...]) -> int:
        """How many parts of the path name an option of the command; 0 where none does."""
        return next((n for n in range(len(path), 0, -1) if ".".join(path[:n]) in self.known), 0)

    def _check(self, entry: Entry) -> Unknown | None:
        length = self._option_length(entry.path)
        if not length:
            return self._unknown_option(entry)
        below = self._below(entry, length, self.known[".".join(entry.path[:length])])
        return below if isinstance(below, Unknown) else None

    def _unknown_option(self, entry: Entry) -> Unknown | None:
        """An option that the command does not have; None where the path is that of a group."""
        for length in range(len(entry.path)):
            start = "".join(f"{part}." for part in entry.path[:length])
            here = [name.removeprefix(start).split(".")[0] for name in self.known if name.startswith(start)]
            if (name := entry.path[length]) not in here:
                whole = [full for full in self.known if full.rpartition(".")[2] == name]
                return Unknown(entry, name, "", whole or sorted(set(here)))
        return None

    def _below(self, entry: Entry, at: int, hint: Any) -> Any:
        """The type of what the rest of the path names, an `Unknown`, or None where nothing is known about it."""
        if at == len(entry.path):
            return hint
        name = entry.path[at]
        if name.isdigit():
            return self._below(entry, at + 1, hint)
        bases = classes_in(hint)
        if not bases:
            return None
        if entry.is_misplaced and at + 1 == len(entry.path):
            return Unknown(entry, name, "", (_STRUCTURE if nearest(name, _STRUCTURE) else (f"init_args.{name}",)))
        cls = self._class_at(entry.path[:at], bases)
        if cls is None:
            return Unknown(entry, name, "", _STRUCTURE) if nearest(name, _STRUCTURE) else None
        members = members_of(cls)
        if name not in members and name not in _STRUCTURE:
            is_structure = nearest(name, _STRUCTURE) and not nearest(name, members)
            near = _STRUCTURE if is_structure else list(members)
            return Unknown(entry, name, self.classes.get(entry.path[:at], cls.__name__), near)
        return self._below(entry, at + 1, members.get(name))

    def _class_at(self, path: tuple[str, ...], bases: Sequence[type]) -> type | None:
        """The class that is named for an option, or that it has by default."""
        if path not in self.classes and ".".join(path) in self.known:
            default = self.defaults(".".join(path))
            named = default.get("class_path") if isinstance(default, Mapping) else getattr(default, "class_path", None)
            if isinstance(named, str):
                self.classes[path] = named
        if (named := self.classes.get(path)) is not None:
            return resolved(named, bases)
        return bases[0] if len(bases) == 1 and not inspect.isabstract(bases[0]) else None


def known_options(parser: ArgumentParser) -> dict[str, Any]:
    """The options of a command with their types, without the `.help` of classes."""
    found = [action for action in parser._actions if action.option_strings]
    return {
        action.dest: getattr(action, "_typehint", None)
        for action in found
        if not action.dest.endswith(".help") and type(action).__name__ != "_ActionConfigLoad"
    }


def classes_in(hint: Any) -> list[type]:
    """The classes that can be named by class_path for a type: those of a union, of a list's items, of a factory."""
    if isinstance(hint, type) and not typing.get_args(hint):
        return [hint] if _has_options(hint) else []
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.get_origin(Callable[[], Any]):
        args = args[-1:]
    return [cls for each in args for cls in classes_in(each)]


def _has_options(cls: type) -> bool:
    return cls.__module__ not in ("builtins", "datetime", "pathlib", "collections.abc", "typing") and cls is not object


def resolved(name: str, bases: Sequence[type]) -> type | None:
    """The class of this name: an import path, or the bare name of a subclass that has been imported."""
    module, _, last = name.rpartition(".")
    if not module:
        known = [cls for base in bases for cls in subclasses(base) if cls.__name__ == last]
        return known[0] if known else None
    try:
        found = getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError, ValueError):
        return None
    return found if isinstance(found, type) else None


def subclasses(base: type) -> Iterator[type]:
    """A class and those derived from it, as far as they have been imported."""
    yield base
    derived: list[type] = type.__subclasses__(base)
    for cls in derived:
        yield from subclasses(cls)


@cache
def members_of(cls: type) -> dict[str, Any]:
    """The options of a class with their types, those that it hands on to its base classes included."""
    parser = ArgumentParser(exit_on_error=False)
    skip: set[str | int] = {0} if issubclass(cls, Optimizer) else set()  # the parameters to train
    parser.add_class_arguments(cls, fail_untyped=False, skip=skip)
    return {name: hint for name, hint in known_options(parser).items() if name != "help"}


def unknown_class(known: Known, words: Sequence[str], defaults: Callable[[str], Any]) -> str | None:
    """What to say of the first class name that is not known; None where every class is."""
    names = Names(known, defaults)
    for entry in entries(words):
        names.first_unknown([entry])
        hint = names.hint_of(entry)
        bases = [] if isinstance(hint, Unknown) else classes_in(hint)
        if not (isinstance(entry.value, str) and entry.value.isidentifier() and bases) or str in typing.get_args(hint):
            continue
        every = {made.__name__ for base in bases for made in subclasses(base) if _can_be_made(made)}
        if entry.value not in every and (meant := did_you_mean(entry.value, every)):
            return f"{entry.place} {entry.value!r} is no {bases[0].__name__} that is known{meant}"
    return None


def _can_be_made(cls: type) -> bool:
    return not inspect.isabstract(cls) and not cls.__name__.startswith("_")
