"""A weighting as plain data (`class_path` and `init_args`, as in YAML) and back.

Checkpoints hold this form, since an object could only be pickled, and a checkpoint is loaded without pickle.
"""

import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from dft_lightning.weighting.base import TokenWeighting
from dft_lightning.weighting.plugins import load_plugins


def check_instance(weighting: Any) -> None:
    """Refuse the name or the class of a weighting, where Python wants an object.

    Raises:
        ValueError: it is no TokenWeighting; says what to pass.
    """
    if isinstance(weighting, TokenWeighting):
        return
    name = weighting.__name__ if isinstance(weighting, type) else str(weighting).rpartition(".")[2]
    if isinstance(weighting, type) and issubclass(weighting, TokenWeighting):
        raise ValueError(f"weighting is the class {name}; expected an object of it, as in {name}()")
    found = f"weighting is {weighting!r:.200}, a {type(weighting).__name__}; expected an object of a weighting"
    if isinstance(weighting, str) and name in _published():
        raise ValueError(f"{found}: `from dft_lightning.weighting import {name}` and pass {name}()")
    raise ValueError(f"{found}, such as DFT() of dft_lightning.weighting; `dft weightings` lists all")


def _published() -> set[str]:
    return {name for name, value in vars(sys.modules["dft_lightning.weighting"]).items() if isinstance(value, type)}


def to_spec(weighting: TokenWeighting) -> dict[str, Any]:
    """`{"class_path": …, "init_args": …}`, nested weightings included."""
    cls = type(weighting)
    if not is_dataclass(cls):
        raise ValueError(f"{cls.__qualname__} is not a dataclass: decorate it with @dataclass(frozen=True)")
    init_args = {field.name: _plain(getattr(weighting, field.name)) for field in fields(cls) if field.init}
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": init_args}


def from_spec(spec: Mapping[str, Any]) -> TokenWeighting:
    """The weighting that `to_spec` described. It may come from a file, so that nothing is imported for it.

    Raises:
        ValueError: no module that is imported already, and no installed plug-in, has the class; or it is not a
            TokenWeighting, or does not take these arguments.
    """
    cls = _imported(spec)
    try:
        return cls(**{key: _built(value) for key, value in spec.get("init_args", {}).items()})
    except (TypeError, AttributeError) as error:
        raise ValueError(f"weighting {spec['class_path']!r} cannot be made from {spec!r:.200}: {error}") from error


def _imported(spec: Mapping[str, Any]) -> type[TokenWeighting]:
    path = spec.get("class_path")
    if not isinstance(path, str):
        raise ValueError(f"a weighting is given as {spec!r:.200}; expected class_path and init_args")
    module_name, _, name = path.rpartition(".")
    if module_name not in sys.modules:
        load_plugins()
    module = sys.modules.get(module_name)
    if module is None:
        raise ValueError(
            f"weighting {path!r} is of a module that is not imported, and a file does not decide what is: if you "
            f"trust it, `import {module_name}` first"
        )
    cls = vars(module).get(name)
    if not (isinstance(cls, type) and issubclass(cls, TokenWeighting)):
        raise ValueError(f"{path!r} is not a TokenWeighting")
    return cls


def label(weighting: TokenWeighting) -> str:
    """The class and those of its fields that are not at their defaults."""
    name = type(weighting).__name__
    if not is_dataclass(weighting):
        return name
    changed = []
    for field in fields(weighting):
        value = getattr(weighting, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if field.init and not (default is not MISSING and value == default):
            changed.append(f"{field.name}={label(value) if isinstance(value, TokenWeighting) else repr(value)}")
    return f"{name}({', '.join(changed)})" if changed else name


def _plain(value: Any) -> Any:
    if isinstance(value, TokenWeighting):
        return to_spec(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"a weighting's field holds {value!r}; expected numbers, text, lists or other weightings")


def _built(value: Any) -> Any:
    if isinstance(value, Mapping):
        return from_spec(value)
    if isinstance(value, list):
        return tuple(_built(item) for item in value)
    return value
