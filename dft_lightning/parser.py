"""What is wrong with the options, in one line that names the option."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from inspect import isabstract
from typing import Any, ClassVar, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from dft_lightning.data import ChatDataModule
from dft_lightning.errors import printable
from dft_lightning.optimizer_options import optimizer_hint, with_full_names
from dft_lightning.weighting.plugins import load_plugins, weightings


class Parser(LightningArgumentParser):
    """Says what is wrong in one line, and leaves with 2."""

    given: ClassVar[list[str]] = []
    """The words of the command line."""

    def parse_string(self, *args: Any, **kwargs: Any) -> Any:
        """A configuration, in which a bare class name of an optimizer is torch's, as it is on the command line."""
        first = [with_full_names(each) if isinstance(each, str) else each for each in args[:1]]
        named = {key: with_full_names(kwargs[key]) for key in ("content", "cfg_str") if key in kwargs}
        return super().parse_string(*first, *args[1:], **(kwargs | named))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message without usage and traceback."""
        text = " ".join(message.split())
        if unknown := re.search(r'Parser key "([\w.]+)":.*Expected a dot import path string: (\S+)', text):
            text = class_hint(*unknown.groups()) or text
        if text.endswith("the following arguments are required: of"):
            text += ": name the weighting that is modified, as in --model.weighting.of DFT"
        text = optimizer_hint(text, self.given) or text
        text = nameless(text, self.given) or wrong_value(text, self.given) or text
        self.exit(2, f"dft: error: {printable(text)}\n")
        raise AssertionError("exit returns")


def class_hint(key: str, name: str) -> str | None:
    """What could have been meant by a class name that is not known."""
    installed, known = load_plugins().values(), [ChatDataModule, *_subclasses(ChatDataModule)]
    if key != "data":
        if key != "model.weighting" and not _holds_weightings(key):
            return None
        known = [*weightings()]
    ours = [cls for cls in known if cls.__module__.startswith("dft_lightning.") or cls in installed]
    names = sorted(cls.__name__ for cls in ours if not isabstract(cls))
    where = key if key.startswith(("data", "model.weighting")) else f"model.weighting….{key}"
    return f"--{where} {name!r} is none of {', '.join(names)}; write a class of your own as file.Class"


def _holds_weightings(key: str) -> bool:
    """Whether a key is that of a weighting within another: jsonargparse then gives its last part alone."""
    known: list[type] = [*weightings()]
    held = [field for cls in known if is_dataclass(cls) for field in fields(cls)]
    return any(field.name == key.rpartition(".")[2] and "TokenWeighting" in str(field.type) for field in held)


def _subclasses(base: type) -> list[type]:
    found: list[type] = base.__subclasses__()
    return found + [deeper for cls in found for deeper in _subclasses(cls)]


def nameless(text: str, given: Sequence[str]) -> str | None:
    """What to say where an option belongs to a weighting that no word names."""
    if "is abstract" not in text and "NestedArg" not in text:
        return None
    named = {name for name, _ in _options(given)}
    for name in sorted(named, key=len):
        parts = name.split(".")
        parents = [".".join(parts[:length]) for length in range(2, len(parts))]
        if name.startswith("model.weighting.") and (missing := [each for each in parents if each not in named]):
            return f"--{name} is given, but not what --{missing[0]} is: name it before, as in --{missing[0]} DFT"
    return None


def wrong_value(text: str, given: Sequence[str]) -> str | None:
    """The whole name of an option of which jsonargparse gives the last part alone, and what was expected."""
    found = re.search(r"Option '(?P<key>[\w.]+)' is not accepted", text) or re.search(
        r'Parser key "(?P<key>[\w.]+)": .*(Got|Given) value: (?P<value>.*)', text
    )
    if found is None:
        return None
    value = found.groupdict().get("value")
    names = [
        name for name, word in _options(given) if f".{name}".endswith(f".{found['key']}") and value in (None, word)
    ]
    if not names:
        return None
    if value is None:
        return f"--{names[-1]}: what is named before it has no such option"
    kinds = re.findall(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])", text)
    wanted = " or ".join(kind or choices for kind, choices in kinds if kind != "NoneType")
    return f"--{names[-1]} is {value!r}; expected {wanted}" if wanted else None


def _options(given: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each option of the command line with its value; "" where it has none."""
    for word, following in zip(given, [*given[1:], ""], strict=True):
        if word.startswith("--"):
            name, sign, value = word[2:].partition("=")
            yield name, value if sign else following
