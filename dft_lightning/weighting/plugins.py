"""Weightings of installed packages: entry points of the group `dft_lightning.weightings`.

A package names its classes in its pyproject.toml, each by its own name:

    [project.entry-points."dft_lightning.weightings"]
    Confident = "my_package:Confident"

Once they are imported, `--model.weighting Confident` finds them as it finds ours.
"""

import inspect
import logging
from dataclasses import is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from dft_lightning.weighting.base import TokenWeighting

GROUP = "dft_lightning.weightings"

log = logging.getLogger(__name__)


def load_plugins() -> dict[str, type[TokenWeighting]]:
    """The installed weightings by name; imported once. One that cannot be used is named in a warning and left out."""
    return dict(_loaded())


@cache
def _loaded() -> dict[str, type[TokenWeighting]]:
    found: dict[str, type[TokenWeighting]] = {}
    taken = {cls.__name__ for cls in weightings() if cls.__module__.startswith("dft_lightning.")}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            found[entry.name] = _load(entry, taken | found.keys())
        except (Exception, SystemExit) as error:  # whatever somebody else's module does
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            package = f" of {entry.dist.name} {entry.dist.version}" if entry.dist is not None else ""
            log.warning("The weighting %s (%s%s) is left out. %s", entry.name, entry.value, package, reason)
    return found


def _load(entry: EntryPoint, taken: set[str]) -> type[TokenWeighting]:
    """The class; a ValueError where it could not be used by its name."""
    if entry.name in taken:  # asked before it is imported: then the name would mean either
        raise ValueError("there is another one of that name: rename the class and its entry point")
    cls = entry.load()
    if not (isinstance(cls, type) and issubclass(cls, TokenWeighting) and is_dataclass(cls)):
        raise ValueError(f"got {cls!r}; expected a dataclass that is a TokenWeighting")
    if cls.__name__ != entry.name:
        raise ValueError(f"the class is called {cls.__name__}: name its entry point so, too")
    return cls


def weightings(base: type[TokenWeighting] = TokenWeighting) -> list[type[TokenWeighting]]:
    """Every weighting that has been imported and can be made, in the order of their definition, each after its base."""
    found = [] if inspect.isabstract(base) else [base]
    return found + [deeper for cls in base.__subclasses__() for deeper in weightings(cls)]
