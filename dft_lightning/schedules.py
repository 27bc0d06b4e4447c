"""Schedules of transformers: the learning rate of each group as a function of the optimizer step."""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dft_lightning.errors import UserError
from dft_lightning.suggestions import did_you_mean

#: What a schedule is given by the run.
_OF_THE_RUN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
_POINTS = 1000
_OPTION = "model.lr_schedule"


def schedule(
    optimizer: Optimizer, name: str, warmup_steps: int, total_steps: int, options: Mapping[str, Any] | None = None
) -> LambdaLR:
    """A schedule of transformers, a step at a time; each group has that of its own learning rate.

    Args:
        options: further arguments of the schedule, as `model.lr_schedule_kwargs`.

    Raises:
        UserError: there is none of that name, it does not have these options, or its rates are not usable.
    """
    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    given = dict(options or {})
    factors = {rate: _factor(name, rate, warmup_steps, total_steps, given) for rate in dict.fromkeys(rates)}
    return LambdaLR(optimizer, [factors[rate] for rate in rates])


def _factor(name: str, lr: float, warmup: int, total: int, options: dict[str, Any]) -> Callable[[int], float]:
    """By which the learning rate is multiplied at a step."""
    from transformers import get_scheduler

    _check_options(name, options)
    decay, stable = options.get("num_decay_steps"), options.get("num_stable_steps")
    if decay is not None and stable is None and warmup + decay > total:
        raise UserError(
            f"{_OPTION}_kwargs.num_decay_steps is {decay}, with {warmup} steps of warm-up more than the run's {total} "
            "steps: lower it, or model.warmup_ratio"
        )
    toy = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=lr)
    try:
        made = get_scheduler(
            name, toy, num_warmup_steps=warmup, num_training_steps=total, scheduler_specific_kwargs=options
        )
        factor: Callable[[int], float] = made.lr_lambdas[0]
        points = {min(total, round(total * at / _POINTS)) for at in range(_POINTS + 1)}
        values = {step: factor(step) for step in sorted(points)}
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"{_OPTION} is {name!r}, {_OPTION}_kwargs {options}: {' '.join(str(error).split())}") from error
    for step, value in values.items():
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0.0:
            raise UserError(
                f"{_OPTION} {name} with {_OPTION}_kwargs {options} has learning rate {lr} × {value} at step {step} of "
                f"{total}; expected numbers of at least 0"
            )
    return factor


def accepted(name: str) -> dict[str, bool]:
    """The arguments that a schedule takes, and whether it needs them.

    Raises:
        UserError: there is no such schedule, or it is no function of the step.
    """
    functions = _functions()
    if name not in functions:
        raise UserError(f"{_OPTION} is {name!r}; expected one of {', '.join(names())}{did_you_mean(name, names())}")
    parameters = inspect.signature(functions[name]).parameters.values()
    if any(each.kind == each.VAR_KEYWORD for each in parameters):
        raise UserError(
            f"{_OPTION} is {name!r}, which follows the loss; expected one that is a function of the step: "
            f"{', '.join(names())}"
        )
    return {each.name: each.default is each.empty for each in parameters if each.name not in _OF_THE_RUN}


def names() -> list[str]:
    """The schedules that are functions of the step."""
    found = []
    for name, function in _functions().items():
        kinds = [each.kind for each in inspect.signature(function).parameters.values()]
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            found.append(name)
    return sorted(found)


@lru_cache(maxsize=1)
def _functions() -> dict[str, Callable[..., Any]]:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    known: dict[Any, Any] = TYPE_TO_SCHEDULER_FUNCTION
    return {kind.value: function for kind, function in known.items()}


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    known = accepted(name)
    if unknown := sorted(set(options) - set(known)):
        listed = f"it takes {', '.join(known)}" if known else "it takes none"
        raise UserError(f"{_OPTION}_kwargs has {', '.join(unknown)}, which {name} does not have: {listed}")
    for key, value in options.items():
        if isinstance(value, int | float) and not value >= 0:
            raise UserError(f"{_OPTION}_kwargs.{key} is {value}; expected a number of at least 0")
    if missing := [key for key, needed in known.items() if needed and key not in options]:
        raise UserError(f"{_OPTION} {name} needs --{_OPTION}_kwargs '{{{missing[0]}: …}}'")


def check(name: str, options: Mapping[str, Any] | None, lr: float) -> None:
    """Refuse a schedule that no run could have, before anything is loaded."""
    _check_options(name, options or {})
    lasting = 1 + sum(value for value in (options or {}).values() if isinstance(value, int))
    _factor(name, lr, 0, lasting, dict(options or {}))


def has_warmup(name: str) -> bool:
    """Whether `model.warmup_ratio` does anything to it."""
    return "num_warmup_steps" in inspect.signature(_functions()[name]).parameters


def described(name: str, options: Mapping[str, Any] | None, warmup: int, total: int) -> str:
    """In words."""
    given = "".join(f", {key} {value}" for key, value in (options or {}).items())
    began = f"warm-up over {warmup:,} of {total:,} steps" if has_warmup(name) else "no warm-up (it has none)"
    return f"{name}{given}, {began}"
