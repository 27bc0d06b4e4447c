"""A weighting by its name: one of the package, of an installed plug-in, or a class in a file of the user's."""

import importlib

from dft_lightning.errors import UserError
from dft_lightning.suggestions import did_you_mean
from dft_lightning.weighting import TokenWeighting
from dft_lightning.weighting.catalogue import Entry, entries, weightings_in
from dft_lightning.weighting.plugins import load_plugins

PLUGINS, OWN = "Plug-ins", "Yours"


def plugins() -> list[Entry]:
    """What installed packages bring."""
    return [Entry(cls, PLUGINS) for cls in load_plugins().values()]


def find(name: str) -> Entry:
    """The weighting of this name, or `file.Class`.

    Raises:
        UserError: there is none.
    """
    known = {entry.name: entry for entry in [*entries(), *plugins()]}
    if name in known:
        return known[name]
    if "." not in name:
        listed = ", ".join(sorted(known))
        meant = did_you_mean(name, known)
        raise UserError(f"no weighting {name!r}; there are {listed}; one of your own is named as file.Class{meant}")
    return _own(name)


def _own(name: str) -> Entry:
    module_name, _, class_name = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"weighting {name!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, TokenWeighting)):
        raise UserError(f"{name!r} is not a TokenWeighting: subclass dft_lightning.weighting.TokenWeighting")
    if not weightings_in({class_name: cls}):
        raise UserError(f"{name!r} cannot be made: decorate it with @dataclass(frozen=True), and define `weights`")
    package = next((entry for entry in entries() if entry.cls is cls), None)
    return package or Entry(cls, OWN)
