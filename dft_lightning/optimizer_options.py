"""`--model.optimizer` on a command line: which class is meant, and which options are its own.

jsonargparse keeps the options of a class when another one is named that happens to accept them. Here each class has
its own defaults: options given for one class never reach another.
"""

import importlib
import importlib.util
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.optim import Optimizer

from dft_lightning.errors import UserError
from dft_lightning.optimization import PAPERS_ADAMW
from dft_lightning.suggestions import did_you_mean

OPTION = "model.optimizer"
DEFAULT = "torch.optim.AdamW"
#: Where a bare class name is looked up after torch.optim, whose classes come first.
_OTHERS = ("transformers.optimization", "bitsandbytes.optim")
_NAMES_OF_CONFIG = ("config", "c")


def full_name(name: str) -> str:
    """The import path that a bare class name stands for: torch's where torch has one; other names as they are.

    Raises:
        UserError: several packages have a class of that name, and torch is none of them.
    """
    if not name.isidentifier():
        return name
    if _is_optimizer(getattr(torch.optim, name, None)):
        return f"torch.optim.{name}"
    found: dict[Any, str] = {}
    for place in _OTHERS:
        if importlib.util.find_spec(place.partition(".")[0]) is not None:
            made = getattr(importlib.import_module(place), name, None)
            if _is_optimizer(made):
                found.setdefault(made, f"{place}.{name}")
    for known in _subclasses(Optimizer):
        if known.__name__ == name and known not in found and "<locals>" not in known.__qualname__:
            found[known] = f"{known.__module__}.{name}"
    if len(found) > 1:
        raise UserError(f"--{OPTION} {name!r} is ambiguous: give one of {', '.join(sorted(found.values()))}")
    return next(iter(found.values()), name)


def _is_optimizer(candidate: Any) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, Optimizer) and candidate is not Optimizer


def _subclasses(base: type) -> Iterator[type]:
    known: list[type] = base.__subclasses__()
    for found in known:
        yield found
        yield from _subclasses(found)


def accepted(path: str) -> dict[str, Any]:
    """The options of an optimizer class with their defaults (`inspect.Parameter.empty` where there is none)."""
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return {}
    found: dict[str, Any] = {}
    for owner in getattr(cls, "__mro__", ()):
        if owner is Optimizer:
            break
        if "__init__" in vars(owner):
            parameters = list(inspect.signature(owner.__init__).parameters.values())[2:]  # without self and params
            for each in parameters:
                if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
                    found.setdefault(each.name, each.default)
            if not any(each.kind == each.VAR_KEYWORD for each in parameters):
                break
    return found


class Given:
    """What the sources of a configuration, in their order, say of the optimizer."""

    def __init__(self) -> None:
        self.path = DEFAULT
        self.own = set(PAPERS_ADAMW)
        """Options that were given for this class."""
        self.seen = set(PAPERS_ADAMW)
        """Options that were given for any class."""

    def name(self, name: str) -> None:
        """A class is named: what was given for another one is none of its options."""
        path = full_name(name)
        if path != self.path:
            self.path, self.own = path, set()

    def add(self, option: str) -> None:
        """An option is given."""
        option = option.removeprefix("init_args.").partition(".")[0]
        self.own.add(option)
        self.seen.add(option)

    def specify(self, spec: Any) -> None:
        """As the value of `model.optimizer` in a file, or as a word."""
        if isinstance(spec, str):
            self.name(spec)
        elif isinstance(spec, Mapping):
            if isinstance(spec.get("class_path"), str):
                self.name(spec["class_path"])
            options = spec.get("init_args", None if "class_path" in spec else spec)
            for option in options if isinstance(options, Mapping) else ():
                self.add(option)

    def restored(self) -> dict[str, Any]:
        """The class's own defaults for options that were given for another class only."""
        defaults = accepted(self.path)
        if self.path == DEFAULT:
            defaults |= PAPERS_ADAMW
        kept = {name: defaults[name] for name in sorted(self.seen - self.own) if name in defaults}
        missing = [name for name, value in kept.items() if value is inspect.Parameter.empty]
        if missing:
            raise UserError(f"--{OPTION} {self.path} has no default for {missing[0]}: give --{OPTION}.{missing[0]}")
        return kept


def with_own_options(words: Sequence[str]) -> list[str]:
    """The words with a full class name, its options after it, and its own defaults where another class's would stay."""
    arranged = _arranged(words)
    restored = _given(arranged).restored()
    return arranged + [f"--{OPTION}.{name}={json.dumps(value)}" for name, value in restored.items()]


def _given(words: Sequence[str]) -> Given:
    given = Given()
    for option, value in _options(words):
        if option == OPTION:
            given.specify(_value(value))
        elif option.startswith(f"{OPTION}."):
            given.add(option.removeprefix(f"{OPTION}."))
        elif option == "model":
            given.specify(_within(_value(value), "optimizer"))
        elif option in _NAMES_OF_CONFIG:
            given.specify(_of_file(_value(value)))
    return given


def with_full_names(text: str) -> str:
    """A configuration in which a bare class name of an optimizer is its import path."""
    if "optimizer" not in text:
        return text
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # the parser says what is wrong
    holders = [content, *([content[key] for key in content] if isinstance(content, Mapping) else [])]
    changed = [_name_fully(_within(holder, "model")) for holder in holders]
    return str(yaml.safe_dump(content, sort_keys=False)) if any(changed) else text


def _name_fully(model: Any) -> bool:
    spec = _within(model, "optimizer")
    name = spec.get("class_path") if isinstance(spec, dict) else spec
    if not isinstance(name, str) or full_name(name) == name:
        return False
    if isinstance(spec, dict):
        spec["class_path"] = full_name(name)
    else:
        model["optimizer"] = full_name(name)
    return True


def _arranged(words: Sequence[str]) -> list[str]:
    """Options of the optimizer follow the last word that names its class, whose name is a full one."""
    parts = list(_parts(words))
    named = [place for place, (option, _) in enumerate(parts) if option == OPTION]
    if not named:
        return list(words)
    last = named[-1]
    early = [words for option, words in parts[:last] if option.startswith(f"{OPTION}.")]
    others = [words for option, words in parts[:last] if not option.startswith(f"{OPTION}.")]
    value = parts[last][1][0].partition("=")[2] or parts[last][1][-1]
    late = _flat([words for _, words in parts[last + 1 :]])
    return [*_flat(others), f"--{OPTION}", _named_fully(value), *_flat(early), *late]


def _named_fully(word: str) -> str:
    """A class name, or a mapping with one, with its import path."""
    spec = _value(word)
    if Path(word).is_file() or not isinstance(spec, Mapping) or not isinstance(spec.get("class_path"), str):
        return full_name(word)
    return json.dumps({**spec, "class_path": full_name(spec["class_path"])})


def _flat(parts: Sequence[Sequence[str]]) -> list[str]:
    return [word for part in parts for word in part]


def _parts(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each option with its words; words that belong to none by themselves, with an empty name."""
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("-") or word == "-":
            yield "", [word]
            continue
        taken = [word]
        while "=" not in word and left and not left[0].startswith("--"):
            taken.append(left.pop(0))
        name = word.lstrip("-").partition("=")[0]
        yield OPTION if name == f"{OPTION}.class_path" else name, taken


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    for option, taken in _parts(words):
        if option:
            yield option, taken[0].partition("=")[2] or (taken[1] if len(taken) > 1 else "")


def _value(text: str) -> Any:
    """What a word stands for: the content of a file, a mapping, or itself."""
    try:
        path = Path(text)
        content = path.read_text(encoding="utf-8") if text and path.is_file() else text
        loaded = yaml.safe_load(content)
    except (OSError, ValueError, yaml.YAMLError):
        return text
    return loaded if isinstance(loaded, Mapping) else text


def _of_file(content: Any) -> Any:
    """The optimizer of a configuration of a subcommand, or of one that has subcommands."""
    for holder in (content, *(content.values() if isinstance(content, Mapping) else ())):
        model = _within(holder, "model")
        spec = _within(_value(model) if isinstance(model, str) else model, "optimizer")
        if spec is not None:
            return spec
    return None


def _within(content: Any, key: str) -> Any:
    return content.get(key) if isinstance(content, Mapping) else None


def optimizer_hint(text: str, words: Sequence[str]) -> str | None:
    """What to say where the parser does not know an optimizer's class, or one of its options."""
    if unknown := re.search(rf'Parser key "(?:\w+\.)?{OPTION}":.*?(?:dot import path string: |path )(\S+)', text):
        name = next((value for option, value in _options(words) if option == OPTION), unknown[1])
        known = ", ".join(each for each in torch.optim.__all__ if _is_optimizer(getattr(torch.optim, each, None)))
        meant = did_you_mean(name, known.split(", "))
        what = f"--{OPTION} {name!r} is no optimizer class that can be imported"
        return f"{what}; expected {known}, or an import path{meant}"
    named = re.search(rf"(?:{OPTION}\.|init_args\.|Option ')(?:init_args\.)?(\w+)' is not accepted", text)
    if named is None:
        return None
    given = _given(words)
    if named[1] not in given.own or named[1] in accepted(given.path):
        return None
    path = given.path
    meant = did_you_mean(named[1], accepted(path))
    return f"--{OPTION}.{named[1]}: {path} has no such option; it has {', '.join(accepted(path))}{meant}"
