"""`dft weightings`: all weightings in a list, or one of them with its formula, its fields and its plot.

Starts without lightning and transformers, which nothing here needs.
"""

import inspect
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dft_lightning.errors import UserError
from dft_lightning.suggestions import did_you_mean

if TYPE_CHECKING:
    from dft_lightning.weighting import TokenWeighting
    from dft_lightning.weighting.catalogue import Entry

_HELP = """usage: dft weightings [--markdown]
       dft weightings NAME [--field VALUE ...] [--plot FILE.png]

Lists what a token can be worth: the package's weightings and those of installed plug-ins. With a NAME, which can also
be a class of your own as file.Class, explains one, and plots its weight and its push on the target's logit against p;
fields are given as to dft fit --model.weighting NAME, without the --model.weighting.

  --markdown       the list as the tables of the README
  --plot FILE.png  the plot as an image, too
"""
_WIDTH, _POINTS = 100, 61


def main(args: Sequence[str]) -> int:
    """Run `dft weightings` with these arguments; 2 where they cannot be used."""
    sys.path.insert(0, os.getcwd())  # for a weighting from the user's own file
    given = list(args)
    try:
        if "-h" in given or "--help" in given:
            print(_HELP, end="")
        elif not given or given == ["--markdown"]:
            print(_markdown() if given else listing())
        elif given[0].startswith("-"):
            meant = did_you_mean(given[0], ["--markdown", "--help"])
            raise UserError(f"dft weightings takes a NAME first, or --markdown, not {given[0]!r}{meant}")
        else:
            path, options = _without_plot(given[1:])
            print(explanation(given[0], options, path))
        sys.stdout.flush()
    except UserError as error:
        print(f"dft: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def listing() -> str:
    """All weightings, by group, one a line or two."""
    from dft_lightning.explain.find import plugins
    from dft_lightning.weighting.catalogue import entries

    lines, group = [], ""
    for entry in [*entries(), *plugins()]:
        if entry.group != group:
            group = entry.group
            lines += ["", f"{group}:"]
        scope, needs = entry.scope or "as wrapped", _needs(entry)
        lines.append(f"  {entry.name:<20}{entry.formula}")
        lines.append(f"{'':22}{_cited(entry)}; scope {scope}; needs {needs}; cost: {entry.cost}")
    return "\n".join([*lines[1:], "", "dft weightings NAME explains one."])


def explanation(name: str, options: Sequence[str] = (), path: Path | None = None) -> str:
    """One weighting: docstring, formula, source, fields, what it looks at and costs, and its plot."""
    from dft_lightning.explain.find import find

    entry = find(name)
    made = _made(entry, options)
    known = None if isinstance(made, str) else made
    parts = [f"{entry.signature}  ({entry.group})", inspect.getdoc(entry.cls) or "no docstring", _facts(entry, known)]
    if isinstance(made, str):
        if path is not None:
            raise UserError(f"no plot of {entry.name}: {made}")
        parts.append(f"No plot: {made}")
    else:
        parts.append(_plots(made, path))
    return "\n\n".join(parts)


def _markdown() -> str:
    from dft_lightning.weighting.catalogue import entries, markdown

    return markdown(entries())


def _facts(entry: "Entry", made: "TokenWeighting | None") -> str:
    """What there is to say; scope, needs, divisor and cost of the one that was made, where there is one."""
    from dft_lightning.weighting.catalogue import DIVIDED_BY, cost

    source = entry.source
    facts = {"w": entry.formula, "source": _cited(entry)}
    if source is not None:
        facts |= {"title": source.title, "place": source.place, "note": source.note}
    facts |= {
        "scope": entry.scope or "as what it wraps",
        "needs": _needs(entry),
        "divided by": entry.divisor,
        "cost": entry.cost,
    }
    if made is not None:
        needs = ", ".join(sorted(made.needs)) or "log p only"
        own = {"scope": made.scope, "needs": needs, "divided by": DIVIDED_BY[made.divisor]}
        facts |= own | {"cost": cost(made.scope, made.needs)}
    return "\n".join(_wrapped(name, text) for name, text in facts.items() if text)


def _wrapped(name: str, text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=f"{name:<12}", subsequent_indent=" " * 12)


def _needs(entry: "Entry") -> str:
    if entry.needs is None:
        return "what the wrapped one needs"
    return ", ".join(sorted(entry.needs)) or "log p only"


def _cited(entry: "Entry") -> str:
    source = entry.source
    if source is None:
        return "no source given"
    return f"{source.authors}, {source.link}" + (" (known from others' code)" if source.third else "")


def _without_plot(options: list[str]) -> tuple[Path | None, list[str]]:
    """The path after --plot, and the other options."""
    for at, option in enumerate(options):
        name, equals, value = option.partition("=")
        if name == "--plot":
            if not equals and at + 1 == len(options):
                raise UserError("--plot needs a file, such as --plot weighting.png")
            return Path(value if equals else options[at + 1]), options[:at] + options[at + (1 if equals else 2) :]
    return None, options


def _made(entry: "Entry", options: Sequence[str]) -> "TokenWeighting | str":
    """The weighting with these options, parsed as `dft fit` does; why there is none where a field is missing."""
    import jsonargparse

    from dft_lightning.weighting import TokenWeighting

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--weighting", type=TokenWeighting)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name before 4.49
    path = f"{entry.cls.__module__}.{entry.cls.__qualname__}"
    prefixed = [f"--weighting.{option[2:]}" if option.startswith("--") else option for option in options]
    if not options and (missing := _without_default(entry)):
        return f"give {' and '.join(f'--{name} VALUE' for name in missing)}"
    try:
        made = instantiate(parser.parse_args([f"--weighting={path}", *prefixed])).weighting
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise UserError(_said(entry, str(error))) from error
    assert isinstance(made, TokenWeighting)
    return made


def _said(entry: "Entry", text: str) -> str:
    """An error in a field, without the parser's way to it."""
    name = entry.name
    text = re.sub(r'Parser key "weighting": (Problem with given class_path \S+ )?', "", " ".join(text.split()))
    if unknown := re.fullmatch(r"Option '([\w.]+)' is not accepted", text):
        fields = list(inspect.signature(entry.cls).parameters)
        meant = did_you_mean(unknown[1], ["plot", *fields], "--") or f"; it has {', '.join(fields) or 'no options'}"
        return f"--{unknown[1]}: {name} has no such option{meant}"
    return text if text.startswith(f"{name}.") else f"{name}: {text}"


def _without_default(entry: "Entry") -> list[str]:
    from dataclasses import MISSING, fields

    every = fields(entry.cls)  # type: ignore[arg-type]  # the catalogue lets no others in
    return [field.name for field in every if field.default is MISSING and field.default_factory is MISSING]


def _plots(weighting: "TokenWeighting", path: Path | None) -> str:
    import torch

    from dft_lightning.explain.curves import curves, held
    from dft_lightning.explain.plot import as_image, as_text

    points = torch.linspace(0, 1, _POINTS, dtype=torch.float64).clamp(min=1e-6)
    try:
        drawn = curves(weighting, points)
    except ValueError as error:
        raise UserError(str(error)) from error
    labels = [curve.label for curve in drawn]
    parts = [repr(weighting), held(weighting)]
    parts.append(as_text("weight w", labels, [curve.weight for curve in drawn]))
    title = "push on the target's logit, −∂L/∂z = w·(1 − p)" + (" + q − p·Σq" if weighting.vocabulary else "")
    parts.append(as_text(title, labels, [curve.push for curve in drawn]))
    if path is not None:
        try:
            as_image(path, repr(weighting), points, drawn)
        except (OSError, ValueError) as error:
            raise UserError(f"--plot {path}: {error}") from error
        parts.append(f"The plot as an image: {path}")
    return "\n\n".join(part for part in parts if part)
