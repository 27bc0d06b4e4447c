"""What `FineTuner` adds to Lightning's module apart from training: deep copies, and callbacks that fit its steps."""

import copy
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch.optim import Optimizer

if TYPE_CHECKING:
    from dft_lightning.models import WeightedLM


class ModuleBase(pl.LightningModule):
    """A module that can be deep-copied at any time, and that fits Lightning's callbacks to its steps."""

    lr: float | None = None
    """What a `LearningRateFinder` has found: takes the place of the optimizer's learning rate."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModuleBase":
        """A copy with weights of its own, which belongs to no trainer.

        The recipe of the optimizer (from the command line, an object that holds the parser), the tokenizer and the
        frozen initial model are shared: nothing changes them. Requests of a trainer's callbacks are not copied.
        """
        state = self.__getstate__()
        for shared in (state.get("optimization"), state.get("tokenizer"), *state.get("_initial", [])):
            memo[id(shared)] = shared
        if (step := state.get("step")) is not None:
            memo[id(step.wishes)] = {}
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        restored: Any = copied
        restored.__setstate__(copy.deepcopy(state, memo))
        network: WeightedLM | None = copied._modules.get("network")  # type: ignore[assignment]
        if network is not None:
            network.observer = None
        return copied

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **options: Any) -> Any:
        """Lightning's, without pickle. Only an argument allows a model's own code, never what the checkpoint holds.

        Args:
            checkpoint_path: a file; `dft export` reads folders, too.
            args: as in Lightning.
            options: as in Lightning; arguments of the module replace those of the checkpoint.
        """
        safe = {"weights_only": True, "trust_remote_code": False}
        return super().load_from_checkpoint(checkpoint_path, *args, **safe | options)

    def take_found_lr(self, optimizer: Optimizer) -> None:
        """Give a new optimizer the learning rate that was found, where one was."""
        if self.lr is not None:
            for group, ratio in zip(optimizer.param_groups, ratios(optimizer), strict=True):
                group["lr"] = self.lr * ratio

    def configure_callbacks(self) -> list[pl.Callback]:
        """None of our own: those of the trainer are checked, and those that average weights are fitted, in place."""
        from dft_lightning.callbacks.lightnings import fit_callbacks
        from dft_lightning.sharding import FSDP2Strategy

        fit_callbacks(self.trainer.callbacks, sharded=isinstance(self.trainer.strategy, FSDP2Strategy))  # type: ignore[attr-defined]
        return []


def ratios(optimizer: Optimizer) -> list[float]:
    """Of each parameter group's base learning rate to the highest."""
    base = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    return [each / max(base) if max(base) > 0 else 1.0 for each in base]
