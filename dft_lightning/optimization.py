"""The optimizer, its schedule, and what becomes of both when a run goes on with other settings."""

from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dft_lightning.errors import UserError

#: The optimizer of the DFT paper's runs (arXiv 2508.05629).
PAPERS_ADAMW: dict[str, Any] = {"lr": 5e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}
papers_adamw = partial(torch.optim.AdamW, **PAPERS_ADAMW)


def schedule(optimizer: Optimizer, name: str, warmup_steps: int, total_steps: int) -> LambdaLR:
    """A schedule of transformers, a step at a time.

    Raises:
        UserError: there is none of that name.
    """
    from transformers import get_scheduler

    try:
        made: LambdaLR = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps)
    except ValueError as error:
        raise UserError(f"model.lr_schedule is {name!r}: {error}") from error
    if not isinstance(made, LambdaLR):
        raise UserError(f"model.lr_schedule is {name!r}; expected one that is a function of the step, as cosine is")
    return made


def _count_on_device(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """A fused step wants its counters beside the weights; a checkpoint of another kind has them on the host."""
    if not (group.get("fused") or group.get("capturable")):
        return
    for parameter in group["params"]:
        state = optimizer.state[parameter]
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].to(parameter.device)


def settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The hyperparameters of each parameter group as configured, without the state of a schedule."""
    return [
        {key: value for key, value in group.items() if key not in ("params", "lr")} for group in optimizer.param_groups
    ]


def restore_settings(optimizer: Optimizer, scheduler: LambdaLR, asked: list[dict[str, Any]]) -> list[str]:
    """After a checkpoint is loaded, put the run's own hyperparameters back in force; say what has changed.

    A checkpoint brings the learning rate and all else of its own run along, and would silently win. The learning rate
    of the next step is that of this run's schedule at that step.
    """
    changed = []
    for group, wanted in zip(optimizer.param_groups, asked, strict=True):
        for key, value in wanted.items():
            if group.get(key) != value and not (group.get(key) is None and value is None):
                name = "lr" if key == "initial_lr" else key
                changed.append(f"{name} {group.get(key)} → {value}")
            group[key] = value
        _count_on_device(optimizer, group)
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for group, base, at in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * at(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    return list(dict.fromkeys(changed))
