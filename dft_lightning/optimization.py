"""The optimizer and schedule of a run, and what becomes of their settings when it resumes with others."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dft_lightning import resume
from dft_lightning.refusals import refuse_fused_scaling, refuse_parts
from dft_lightning.schedules import schedule

if TYPE_CHECKING:
    from dft_lightning.module import FineTuner

#: The optimizer of the DFT paper's runs (arXiv 2508.05629).
PAPERS_ADAMW: dict[str, Any] = {"lr": 5e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}
papers_adamw = partial(torch.optim.AdamW, **PAPERS_ADAMW)


def configured(
    module: "FineTuner", resumed: Mapping[str, Any] | None = None
) -> tuple[Optimizer, LambdaLR, list[dict[str, Any]]]:
    """The optimizer over everything that is trained, its schedule, and the settings of each group.

    Args:
        resumed: facts of the checkpoint that the run resumes from.

    Raises:
        UserError: it cannot work in this run, or the checkpoint is of another optimizer.
    """
    assert module.network is not None
    optimizer = module.optimization.build(module.network.model)
    module.take_found_lr(optimizer)
    if resumed is not None:
        resume.refuse_optimizer(resumed, optimizer)
    for group in optimizer.param_groups:  # a schedule changes a tensor in place
        group["lr"] = group["lr"].clone() if isinstance(group["lr"], torch.Tensor) else group["lr"]
    refuse_fused_scaling(module.trainer, optimizer)
    refuse_parts(module.trainer, optimizer)
    module.optimization.check_device(module.device)
    total = module.total_steps
    warmup = int(module.warmup_ratio * total)
    scheduler = schedule(optimizer, module.lr_schedule, warmup, total, module.lr_schedule_kwargs)
    return optimizer, scheduler, settings(optimizer)


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


def _plain(value: Any) -> Any:
    """A value to compare and to print: a learning rate may be a tensor, and a pair come back as a list."""
    if isinstance(value, torch.Tensor):
        return value.item()
    return tuple(value) if isinstance(value, list) else value


def restore_settings(optimizer: Optimizer, scheduler: LambdaLR, asked: list[dict[str, Any]]) -> list[str]:
    """After a checkpoint is loaded, put the run's own hyperparameters back in force; say what has changed.

    A checkpoint brings the learning rate and all else of its own run along, and would silently win. The learning rate
    of the next step is that of this run's schedule at that step.
    """
    changed = []
    for group, wanted in zip(optimizer.param_groups, asked, strict=True):
        for key, value in wanted.items():
            if _plain(group.get(key)) != _plain(value):
                name = "lr" if key == "initial_lr" else key
                changed.append(f"{name} {_plain(group.get(key))} → {_plain(value)}")
            group[key] = value
        _count_on_device(optimizer, group)
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for group, base, at in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * at(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    return list(dict.fromkeys(changed))


def put_in_force(module: "FineTuner", resumed: Mapping[str, Any]) -> None:
    """After a resume: the run's own learning rate and other settings are in force, and what has changed is reported.

    Args:
        resumed: facts of the checkpoint that the run resumes from.
    """
    scheduler: Any = module.trainer.lr_scheduler_configs[0].scheduler
    changed = restore_settings(module.trainer.optimizers[0], scheduler, module._settings)
    others = resume.changes(resumed["settings"], resume.settings_of(module))
    changed += [f"{what} {change}" for what, change in others.items()]
    if changed:
        rank_zero_info(f"Going on with other settings than the checkpoint's: {', '.join(changed)}")
