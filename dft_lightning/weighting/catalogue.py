"""The list of the package's weightings, found in its modules rather than kept by hand, and the table in the README."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

import dft_lightning.weighting as package
from dft_lightning.weighting.base import DISTRIBUTION_STATISTICS, REF_DISTRIBUTION, Source, TokenWeighting
from dft_lightning.weighting.composition import Modifier
from dft_lightning.weighting.likelihood import Uniform

_OF_P, _MODIFIERS = "Functions of p", "Modifiers of another weighting"
#: What the modules hold, in the order of the list; a module that is not named here comes last, under its own name.
_GROUPS = {
    "likelihood": _OF_P,
    "selection": _OF_P,
    "adaptive": _OF_P,
    "distribution": "Of the whole distribution",
    "reference": "Against a reference or an earlier policy",
    "sentence": "Of whole responses",
    "vocabulary": "Targets over the vocabulary",
    "modifiers": _MODIFIERS,
    "mixing": _MODIFIERS,
}
DIVIDED_BY = {"tokens": "tokens", "weights": "Σw", "selected": "tokens with w ≠ 0"}


@dataclass(frozen=True)
class Entry:
    """What there is to say about a weighting without a model.

    `scope` and `needs` are those of its defaults; None where they are those of the weighting that it wraps.
    """

    cls: type[TokenWeighting]
    group: str

    @property
    def name(self) -> str:
        """Its short name, as options take it."""
        return self.cls.__name__

    @property
    def formula(self) -> str:
        """The weight in one line; the first line of the docstring where the class does not say."""
        return self.cls.formula or (inspect.getdoc(self.cls) or "").split("\n")[0]

    @property
    def source(self) -> Source | None:
        """Where it was published."""
        return self.cls.source

    @property
    def scope(self) -> str | None:
        """How far a weight looks at other tokens."""
        scope: str | None = _of_defaults(self.cls, "scope")
        return scope

    @property
    def needs(self) -> frozenset[str] | None:
        """The statistics it looks at beside log p."""
        needs: frozenset[str] | None = _of_defaults(self.cls, "needs")
        return needs

    @property
    def divisor(self) -> str:
        """By what a step's sum is divided, in words."""
        divisor = _of_defaults(self.cls, "divisor")
        return "as what it wraps" if divisor is None else DIVIDED_BY[divisor]

    @property
    def cost(self) -> str:
        """What it costs beside plain fine-tuning, in words."""
        if self.scope is None or self.needs is None:
            return "as what it wraps"
        return cost(self.scope, self.needs)

    @property
    def signature(self) -> str:
        """Name and fields with their defaults."""
        listed = [
            field.name if field.default is MISSING else f"{field.name}={_shown(field.default)}"
            for field in fields(self.cls)  # type: ignore[arg-type]  # `entries` lets no others in
            if field.init
        ]
        return f"{self.name}({', '.join(listed)})" if listed else self.name


def entries() -> list[Entry]:
    """All weightings of the package, in the order of its modules and of the classes in them."""
    found = [name for _, name, _ in pkgutil.iter_modules(package.__path__)]
    known = [name for name in _GROUPS if name in found] + sorted(set(found) - set(_GROUPS))
    modules = {name: importlib.import_module(f"{package.__name__}.{name}") for name in known}
    return [
        Entry(cls, _GROUPS.get(name, name))
        for name, module in modules.items()
        for cls in weightings_in(vars(module))
        if cls.__module__ == module.__name__
    ]


def weightings_in(names: dict[str, Any]) -> list[type[TokenWeighting]]:
    """The classes among `names` that a run can use: concrete, a dataclass, and not marked as internal."""
    return [
        value
        for name, value in names.items()
        if isinstance(value, type)
        and issubclass(value, TokenWeighting)
        and is_dataclass(value)
        and not inspect.isabstract(value)
        and not name.startswith("_")
    ]


def cost(scope: str, needs: Iterable[str]) -> str:
    """What a weighting costs beside plain fine-tuning, in words."""
    needs = set(needs)
    passes = {
        "token": "one pass",
        "sequence": "one pass of the loss, two for very long responses",
        "step": "one more forward a step",
    }[scope]
    parts = [passes]
    if statistics := sorted(needs & DISTRIBUTION_STATISTICS):
        parts.append(f"{', '.join(statistics)} of the logits in the same pass")
    if "ref_logp" in needs:
        parts.append("one forward of the reference over the data, once, cached")
    if "old_logp" in needs:
        parts.append("one more forward a step")
    if REF_DISTRIBUTION in needs:
        parts.append("a frozen copy of the model, or its adapter off: one more forward a step")
    return "; ".join(parts)


def markdown(listed: Iterable[Entry]) -> str:
    """One table a group."""
    groups: dict[str, list[Entry]] = {}
    for entry in listed:
        groups.setdefault(entry.group, []).append(entry)
    return "\n\n".join(f"**{group}**\n\n{_table(members)}" for group, members in groups.items())


def _table(listed: list[Entry]) -> str:
    head = ["weighting", "w", "source", "scope", "needs", "divided by"]
    rows = [
        [
            f"`{entry.signature}`",
            entry.formula.replace("|", "\\|"),
            _cited(entry.source),
            entry.scope or "as wrapped; step around another divisor",
            "as wrapped" if entry.needs is None else ", ".join(sorted(entry.needs)) or "–",
            entry.divisor,
        ]
        for entry in listed
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def _cited(source: Source | None) -> str:
    if source is None:
        return "–"
    link = f"[{source.link}]({url(source.link)})" if url(source.link) else source.link
    return f"{source.authors}, {link}" + (" (known from others' code)" if source.third else "")


def url(link: str) -> str | None:
    """The address of an arXiv number or of a repository; None for anything else."""
    if re.fullmatch(r"\d{4}\.\d{4,5}", link):
        return f"https://arxiv.org/abs/{link}"
    return f"https://github.com/{link}" if re.fullmatch(r"[\w.-]+/[\w.-]+", link) else None


def _shown(default: object) -> str:
    return f'"{default}"' if isinstance(default, str) else str(default)


def _of_defaults(cls: type[TokenWeighting], name: str) -> Any:
    """A class attribute; of an instance by its defaults where a property decides, and None where there is none."""
    if not isinstance(inspect.getattr_static(cls, name), property):
        return getattr(cls, name)
    try:
        return getattr(cls(), name)
    except (TypeError, ValueError):  # it has a field without a default
        return cls(of=Uniform()).divisor if name == "divisor" and issubclass(cls, Modifier) else None
