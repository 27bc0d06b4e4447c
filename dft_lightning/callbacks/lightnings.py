"""Lightning's own callbacks in a run: fitted to it where they need that, or refused with what to use in their place."""

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    ProgressBar,
    SpikeDetection,
    StochasticWeightAveraging,
    WeightAveraging,
)

from dft_lightning.callbacks.averaging import Averaging, StepAveraging, refuse_sharded
from dft_lightning.callbacks.lr_search import LearningRateSearch
from dft_lightning.callbacks.swa import EpochAveraging
from dft_lightning.errors import UserError

#: Why each is refused, and what to use in its place.
REFUSED: dict[type[Callback], str] = {
    BatchSizeFinder: "the micro-batch size changes memory and speed, and not what is trained: `dft plan` with these "
    "options says which fits; set data.micro_batch_size",
    GradientAccumulationScheduler: "accumulation follows from data.global_batch_size and data.micro_batch_size: set "
    "these",
    BaseFinetuning: "it freezes layers before the model is loaded, and changes the optimizer's groups during the run: "
    "set --model.lora.rank 8 to train few weights",
    ModelPruning: "it replaces weights by other parameters, which checkpoints and exports do not have: prune the "
    "exported model",
    OnExceptionCheckpoint: "it saves in the middle of an optimizer step, and hangs where one of several ranks fails: "
    "checkpoints.every_n_steps and checkpoints.every_minutes keep the last state",
    SpikeDetection: "it compares losses of micro-batches, which are sums over tokens here: trainer.gradient_clip_val "
    "limits what a step can do, and model.max_skipped_steps is about steps that are not finite",
}


#: Lightning's, and by which of ours it is fitted.
_FITTED: tuple[tuple[type[Callback], type[Callback]], ...] = (
    (WeightAveraging, StepAveraging),
    (StochasticWeightAveraging, EpochAveraging),
    (LearningRateFinder, LearningRateSearch),
)

Callbacks = Sequence[Callback] | Callback | None
"""As `Trainer` takes them."""


def _listed(callbacks: Callbacks) -> list[Callback]:
    return [callbacks] if isinstance(callbacks, Callback) else [*(callbacks or [])]


def fit_callbacks(callbacks: Callbacks, sharded: bool) -> None:
    """Check callbacks, and change those that have to be, in place; may be called again.

    Raises:
        UserError: one of them is not supported, or two of them average weights.
    """
    given = _listed(callbacks)
    for callback in given:
        for kind, why in REFUSED.items():
            if isinstance(callback, kind):
                raise UserError(f"the callback {type(callback).__name__} is not supported: {why}")
        for base, ours in _FITTED:
            if isinstance(callback, base):
                _become(callback, base, ours)
        if isinstance(callback, Averaging):
            refuse_sharded(callback, sharded)
    averaging = [callback.state_key for callback in given if isinstance(callback, Averaging)]
    if len(averaging) > 1:
        raise UserError(f"{' and '.join(averaging)} both average the weights of one model: leave all but one out")


def _become(callback: Callback, base: type[Callback], ours: type[Callback]) -> None:
    """Let a callback be of `ours`, which takes the place of `base`, under the name that it has.

    What a class of the user's own overrides stays in force: ours is between it and Lightning's.
    """
    kind, key = type(callback), callback.state_key
    if isinstance(callback, ours):
        return
    # by its underscore the command line does not offer the class, whose name it would find twice
    bases, known = (ours,) if kind is base else (kind, ours), {"state_key": property(lambda _: key)}
    callback.__class__ = type(f"_{kind.__name__}", bases, known | {"__module__": kind.__module__})


def averages_on_device(callbacks: Callbacks, cuda: bool) -> bool:
    """Whether averages of the weights take memory of the device that trains."""
    held = [callback.device for callback in _listed(callbacks) if isinstance(callback, Averaging)]
    return any(not cuda or torch.device("cuda" if place is None else place).type == "cuda" for place in held)


def options_for(callbacks: Callbacks) -> dict[str, Any]:
    """Options of the trainer without which it would refuse a callback of the user's."""
    return {"enable_model_summary": True} if any(isinstance(each, ModelSummary) for each in _listed(callbacks)) else {}


def write_enums() -> None:
    """Let a configuration have options whose defaults are members of Lightning's enumerations, as `Timer` has."""

    def write(dumper: yaml.SafeDumper, value: Enum) -> yaml.Node:
        return dumper.represent_str(str(value.value))

    yaml.SafeDumper.add_multi_representer(Enum, write)


def has_progress_bar(callbacks: Sequence[Callback]) -> bool:
    """Whether there is one; Lightning takes no second."""
    return any(isinstance(each, ProgressBar) for each in callbacks)
