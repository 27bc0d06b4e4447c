"""Names of strategies, accelerators and profilers that the trainer does not know, with the nearest that it knows."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from dft_lightning.errors import UserError
from dft_lightning.sharding.initial import refuse_name
from dft_lightning.suggestions import did_you_mean

_PROFILERS = ("simple", "advanced", "pytorch", "xla")
_CLIPPING = ("norm", "value")
#: Strategies that `refuse_name` refuses.
_REFUSED = ("fsdp", "deepspeed")


def refuse_names(options: Mapping[str, Any]) -> None:
    """Check the options of the trainer that are names, before anything is built.

    Args:
        options: the trainer's.

    Raises:
        UserError: one of them is not known; names it and the nearest that is.
    """
    strategies = [name for name in StrategyRegistry.available_strategies() if not name.startswith(_REFUSED)]
    strategy = options["strategy"]
    if isinstance(strategy, str):
        refuse_name(strategy)
    _refuse("strategy", strategy, ["auto", "fsdp2", *strategies])
    _refuse("accelerator", options["accelerator"], ["auto", "gpu", *AcceleratorRegistry.available_accelerators()])
    _refuse("profiler", options["profiler"], _PROFILERS)
    _refuse("gradient_clip_algorithm", options["gradient_clip_algorithm"], _CLIPPING)


def _refuse(option: str, value: Any, known: Iterable[str]) -> None:
    names = sorted(set(known))
    if isinstance(value, str) and value.lower() not in names:
        meant = did_you_mean(value, names)
        raise UserError(f"trainer.{option} is {value!r}; expected one of {', '.join(names)}{meant}")
