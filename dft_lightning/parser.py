"""What is wrong with the options, in one line that names the option."""

import re
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from inspect import isabstract
from typing import Any, ClassVar, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from dft_lightning.data import ChatDataModule
from dft_lightning.errors import printable
from dft_lightning.optimizer_options import optimizer_hint, with_full_names
from dft_lightning.option_names import find_unknown, known_options, unknown_class
from dft_lightning.option_sources import Entry, entries, options
from dft_lightning.suggestions import did_you_mean
from dft_lightning.weighting.plugins import load_plugins, weightings


class Parser(LightningArgumentParser):
    """Says what is wrong in one line, and leaves with 2."""

    given: ClassVar[list[str]] = []
    """The words of the command line."""
    root: ClassVar["LightningArgumentParser | None"] = None
    """The parser of all subcommands; jsonargparse makes further ones, for the classes that are named."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        """An option has to be written in full: an abbreviation means something else once there are more options."""
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)

    def parse_string(self, *args: Any, **kwargs: Any) -> Any:
        """A configuration, in which a bare class name of an optimizer is torch's, as it is on the command line."""
        first = [with_full_names(each) if isinstance(each, str) else each for each in args[:1]]
        named = {key: with_full_names(kwargs[key]) for key in ("content", "cfg_str") if key in kwargs}
        return super().parse_string(*first, *args[1:], **(kwargs | named))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message without usage and traceback."""
        text = " ".join(message.split())
        text = self._with_names(text)
        self.exit(2, f"dft: error: {printable(text)}\n")
        raise AssertionError("exit returns")

    def _with_names(self, text: str) -> str:
        """The message with the option or file at fault, and the names that it could have meant."""
        command = self._command()
        known = known_options(command)
        if text.startswith("argument subcommand: invalid choice") and self.given[:1] and self.given[0].startswith("--"):
            return str(find_unknown(known_options(self.root or self), self.given[:1], command.get_default) or text)
        if re.search(_UNKNOWN, text) and nameless(text, self.given) is None:
            found = find_unknown(known, self.given, command.get_default)
            if found is not None:
                return str(found)
        if unknown := re.search(r'Parser key "([\w.]+)":.*Expected a dot import path string: (\S+)', text):
            hint = class_hint(unknown[1], unknown[2], self.given)
            hint = hint or optimizer_hint(text, self.given)
            text = hint or unknown_class(known, self.given, command.get_default) or text
        if text.endswith("the following arguments are required: of"):
            text += ": name the weighting that is modified, as in --model.weighting.of DFT"
        text = optimizer_hint(text, self.given) or not_imported(text, self.given) or text
        return nameless(text, self.given) or wrong_value(text, self.given) or text

    def _command(self) -> LightningArgumentParser:
        """The parser of the subcommand that is given."""
        root = self.root or self
        commands = next((action.choices for action in root._actions if isinstance(action.choices, dict)), {})
        return next((commands[word] for word in self.given if word in commands), root)


#: Of jsonargparse and argparse: a key or option that there is not.
_UNKNOWN = r"is not accepted|does not accept option|unrecognized arguments|ambiguous option|is abstract"


def class_hint(key: str, name: str, given: Sequence[str] = ()) -> str | None:
    """What could have been meant by a class name that is not known.

    Args:
        key: that jsonargparse names.
        name: of the class.
        given: words of the command line, to find the file that names the class.
    """
    installed, known = load_plugins().values(), [ChatDataModule, *_subclasses(ChatDataModule)]
    if key != "data":
        if key != "model.weighting" and not _holds_weightings(key):
            return None
        known = [*weightings()]
    ours = [cls for cls in known if cls.__module__.startswith("dft_lightning.") or cls in installed]
    names = sorted(cls.__name__ for cls in ours if not isabstract(cls))
    where = key if key.startswith(("data", "model.weighting")) else f"model.weighting….{key}"
    where = next((entry.place for entry in _named(key, name, given)), f"--{where}")
    meant = did_you_mean(name, names)
    return f"{where} {name!r} is none of {', '.join(names)}; write a class of your own as file.Class{meant}"


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
    named = {name for name, _ in options(given)}
    for name in sorted(named, key=len):
        parts = name.split(".")
        parents = [".".join(parts[:length]) for length in range(2, len(parts))]
        if name.startswith("model.weighting.") and (missing := [each for each in parents if each not in named]):
            return f"--{name} is given, but not what --{missing[0]} is: name it before, as in --{missing[0]} DFT"
    return None


def not_imported(text: str, given: Sequence[str]) -> str | None:
    """What to say of an import path that leads to no class."""
    problem = r"Problem with given class_path '([\w.]+)': (No module.*|module.*)"
    found = re.search(rf'Parser key "([\w.]+)":.*{problem}', text)
    if found is None:
        return None
    key, path, reason = found.groups()
    place = next((entry.place for entry in _named(key, path, given)), f"--{key}")
    module, _, name = path.rpartition(".")
    meant = did_you_mean(name, vars(sys.modules[module])) if module in sys.modules else ""
    return f"{place} {path!r} cannot be imported: {reason}{meant}"


def _named(key: str, value: str | None, given: Sequence[str]) -> list[Entry]:
    """Where the value of an option is written of which jsonargparse gives the last parts alone."""
    ends = f".{key}"
    return [
        entry
        for entry in entries(given)
        if f".{'.'.join(part for part in entry.path if not part.isdigit())}".endswith(ends)
        and value in (None, str(entry.value))
    ]


def wrong_value(text: str, given: Sequence[str]) -> str | None:
    """The full name of an option of which jsonargparse gives the last part alone, and what was expected."""
    found = re.search(r'Parser key "(?P<key>[\w.]+)": .*(Got|Given) value: (?P<value>.*)', text)
    if found is None:
        return None
    places = [entry.place for entry in _named(found["key"], found["value"], given)]
    kinds = re.findall(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])", text)
    wanted = " or ".join(kind or choices for kind, choices in kinds if kind != "NoneType")
    if not places or not wanted:
        return None
    choices = [word for _, literal in kinds for word in re.findall(r"'(.*?)'", literal)]
    return f"{places[-1]} is {found['value']!r}; expected {wanted}{did_you_mean(found['value'], choices)}"
