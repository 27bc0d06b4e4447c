"""Running averages of the trained weights, and how checkpoints hold them next to the weights that are trained.

A checkpoint of a run with averages has Lightning's layout: `state_dict` has the averages in place of the trained
weights, so that whatever loads a checkpoint gets the averaged model; `current_model_state` has the trained weights
themselves, by which a run resumes; `averaging_state` has the number of updates and the averages as they are held.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_swa_avg_fn

from dft_lightning.errors import UserError

if TYPE_CHECKING:
    from dft_lightning.callbacks.averaging import Averaging

Average = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(average, newest weight, number of updates so far) to the new average, as `torch.optim.swa_utils` has it."""
AverageAll = Callable[[list[Tensor], list[Tensor], Tensor], None]
"""The same over lists of tensors, in place."""

CURRENT, STATE = "current_model_state", "averaging_state"

Which = Literal["averaged", "current"]
"""Of a run that averages its weights: the averages, or the weights that are trained."""


class Averages:
    """Averages of a module's trained weights, held in at least float32.

    Weights that are not trained, and buffers, are constants of a causal language model, and stay as they are: an
    average of equal numbers is rounded, 0.999·x + 0.001·x is not x. In bfloat16 an exponential average would not move.

    Args:
        module: whose weights are averaged; those that share memory (tied embeddings) are one.
        device: where the averages are held; by default next to each weight.
        average: of one tensor; by default each update has an equal share.
        average_all: the same for lists of tensors, in its place.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device | str | int | None = None,
        average: Average | None = None,
        average_all: AverageAll | None = None,
    ) -> None:
        _refuse_running_statistics(module)
        self.trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        owners = {id(weight): name for name, weight in self.trained.items()}
        every = module.named_parameters(remove_duplicate=False)
        #: By each name in the module's state, that of the weight in `trained`.
        self.names = {name: owners[id(weight)] for name, weight in every if id(weight) in owners}
        self.weights = {
            name: weight.detach().to(device or weight.device, _held_in(weight), copy=True)
            for name, weight in self.trained.items()
        }
        self.count = 0
        """Updates so far; before the first one there is no average."""
        self._average, self._average_all = average or _equal_shares(), average_all
        self._set_aside: dict[str, Tensor] | None = None  # trained weights, while the averages are in their place

    @torch.no_grad()
    def update(self) -> None:
        """Let the averages include the present weights; the first update copies them."""
        assert self._set_aside is None, "the present weights are the averages"
        newest = {name: self.trained[name].detach().to(mean) for name, mean in self.weights.items()}
        count = torch.tensor(self.count)
        if self.count == 0:
            for name, mean in self.weights.items():
                mean.copy_(newest[name])
        elif self._average_all is not None:
            for dtype in {mean.dtype for mean in self.weights.values()}:
                names = [name for name, mean in self.weights.items() if mean.dtype == dtype]
                self._average_all([self.weights[name] for name in names], [newest[name] for name in names], count)
        else:
            for name, mean in self.weights.items():
                mean.copy_(self._average(mean, newest[name], count.to(mean.device)))
        self.count += 1

    def swap_in(self) -> None:
        """Put the averages in the place of the trained weights, where there are averages yet."""
        if self.count and self._set_aside is None:
            with torch.inference_mode(False), torch.no_grad():
                self._set_aside = {name: weight.detach().clone() for name, weight in self.trained.items()}
                self._fill(self.weights)

    def swap_out(self) -> None:
        """Put the trained weights back."""
        if self._set_aside is not None:
            with torch.inference_mode(False), torch.no_grad():
                self._fill(self._set_aside)
            self._set_aside = None

    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self.trained.items():
            weight.copy_(values[name])

    def lay_out(self, checkpoint: dict[str, Any]) -> None:
        """Give a checkpoint the layout at the top of this file.

        One without an optimizer's state, from which no run resumes, has the averaged model alone.
        """
        state = checkpoint["state_dict"]
        if self.count:
            means = {name: self.weights[name].to(weight.device, weight.dtype) for name, weight in self.trained.items()}
            checkpoint["state_dict"] = state | {
                name: means[owner] for name, owner in self.names.items() if name in state
            }
        if "optimizer_states" not in checkpoint:
            return
        aside = self._set_aside or {}
        trained = {name: aside[owner] for name, owner in self.names.items() if owner in aside and name in state}
        checkpoint[CURRENT] = state | trained
        checkpoint[STATE] = {"n_averaged": self.count, "weights": dict(self.weights) if self.count else {}}

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Continue with what a checkpoint has."""
        self.count = int(state["n_averaged"])
        for name, value in state["weights"].items():
            self.weights[name].copy_(value)


def averaging_of(trainer: Any) -> "Averaging | None":
    """The callback that averages the weights, where there is one."""
    from dft_lightning.callbacks.averaging import Averaging

    callbacks: list[pl.Callback] = getattr(trainer, "callbacks", [])
    return next((callback for callback in callbacks if isinstance(callback, Averaging)), None)


def averaging_in_words(trainer: Any) -> str | None:
    """The rule, where weights are averaged."""
    from dft_lightning.callbacks.averaging import described

    averaging = averaging_of(trainer)
    return None if averaging is None else described(averaging)


def keep_averages(trainer: Any, checkpoint: dict[str, Any]) -> None:
    """Lay out a checkpoint that is about to be written."""
    averaging = averaging_of(trainer)
    if averaging is not None and averaging.averages is not None:
        averaging.averages.lay_out(checkpoint)


def take_current(checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint that a run resumes from have the trained weights in `state_dict`, as without averages."""
    if CURRENT in checkpoint:
        checkpoint["state_dict"] = checkpoint.pop(CURRENT)


def state_of(checkpoint: Mapping[str, Any], which: Which | None, path: Path) -> Mapping[str, Any]:
    """The state of the module in a checkpoint, the averaged one where there are two and none is asked for.

    Raises:
        UserError: the averages are asked for, and there are none.
    """
    if which == "averaged" and not checkpoint.get(STATE, {}).get("n_averaged"):
        reason = (
            "before the first update of its averages" if STATE in checkpoint else "of a run without weight averaging"
        )
        raise UserError(f"{path} is {reason}: leave 'averaged' out")
    found: Mapping[str, Any] = checkpoint[CURRENT if which == "current" and CURRENT in checkpoint else "state_dict"]
    return found


def held_bytes(weight: Tensor) -> int:
    """What the average of a weight takes."""
    return weight.numel() * _held_in(weight).itemsize


def _held_in(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _equal_shares() -> Average:
    made: Callable[[], Average] = get_swa_avg_fn
    return made()


def _refuse_running_statistics(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if getattr(layer, "track_running_stats", False):
            raise UserError(
                f"{name} ({type(layer).__name__}) keeps running statistics of its inputs, which would not be those of "
                "averaged weights: leave the callback that averages weights out for this model"
            )
