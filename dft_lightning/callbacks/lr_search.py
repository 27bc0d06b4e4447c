"""Lightning's `LearningRateFinder`, fitted to this module's optimizer steps."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner.lr_finder import _LRFinder
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import _TunerExitException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from dft_lightning.callbacks.preemption import LEAVE, leave
from dft_lightning.errors import UserError
from dft_lightning.module_base import ratios
from dft_lightning.nonfinite import SkippedSteps
from dft_lightning.optimization import restore_settings
from dft_lightning.sharding.layers import let_go
from dft_lightning.step import StepInTheMaking

if TYPE_CHECKING:
    from dft_lightning.data import ChatDataModule
    from dft_lightning.module import FineTuner

#: Steps that Lightning leaves out at the beginning and at the end of the curve, and the least that have a slope.
_SKIPPED, _LEAST = 11, 3
_SMOOTHING = 0.98


class LearningRateSearch(LearningRateFinder):
    """A range test before the first step of a run: the learning rate rises from `min_lr` to `max_lr` over some steps.

    Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv 1506.01186, section 3.3. What is taken is where
    the smoothed loss falls most steeply against the learning rate, or against its logarithm in mode exponential
    (Lightning: against the learning rate in both modes, by which the lowest rates win by their noise).

    The loss is the step's mean negative log-likelihood, over all micro-batches and ranks: the weighted loss of DFT, for
    one, is low where a model has collapsed too. The steps are those of the training data from its beginning; afterwards
    weights, optimizer, data and random numbers are as if there had been no search. A resumed run keeps what was found.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what the search could not do anything with."""
        module = cast("FineTuner", pl_module)
        if self._attr_name not in ("", "lr", "learning_rate"):
            raise UserError(
                f"LearningRateFinder.attr_name is {self._attr_name!r}; what is searched is the optimizer's lr: leave "
                "it out"
            )
        if not 0 < self._min_lr < self._max_lr:
            raise UserError(
                f"LearningRateFinder: min_lr is {self._min_lr} and max_lr {self._max_lr}; expected 0 < min_lr < max_lr"
            )
        if self._num_training_steps < _SKIPPED + _LEAST:
            raise UserError(
                f"LearningRateFinder.num_training_steps is {self._num_training_steps}; expected "
                f"{_SKIPPED + _LEAST} or more, of which the first 10 and the last one are left out"
            )
        if module.old_policy is not None:
            raise UserError(
                f"LearningRateFinder with {type(module.weighting).__name__}, which compares with the policy of some "
                "steps ago: search with --model.weighting Uniform, and set model.optimizer's lr"
            )

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A resumed run takes the learning rate that was found, before its optimizer is made."""
        found = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("lr")
        if trainer.state.fn == "fit" and self._update_attr:
            cast("FineTuner", pl_module).lr = found

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Search, where the run begins."""
        module = cast("FineTuner", pl_module)
        if trainer.global_step and self.found is None:
            raise UserError(
                f"LearningRateFinder searches before the first step, and this run resumes at step "
                f"{trainer.global_step:,} without a search: leave the callback out, or start from scratch with "
                "--overwrite true"
            )
        if trainer.global_step or getattr(trainer, "fast_dev_run", False):
            return
        with isolate_rng():
            curve = _Search(self, trainer, module).run()
        self.optimal_lr, self.found = curve, curve.suggestion()
        found = self.found
        if self._update_attr:
            module.lr = found
            use(trainer, module, found)
        rank_zero_info(
            f"LearningRateFinder: {'the learning rate is' if self._update_attr else 'suggests'} {found:.3g} (steepest "
            f"descent over {len(curve.results['lr'])} steps from {self._min_lr:.3g} to {curve.results['lr'][-1]:.3g})"
        )
        if self._early_exit:
            raise _TunerExitException

    found: float | None = None
    """What the search of this run has found, before a resume too."""

    def state_dict(self) -> dict[str, Any]:
        """What was found."""
        return {"lr": self.found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it."""
        self.found = state_dict["lr"]


class Curve(_LRFinder):
    """Learning rates and smoothed losses, as Lightning has them, e.g. for `plot`."""

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> float:
        """Where the loss falls most steeply.

        Raises:
            UserError: it is finite at too few learning rates.
        """
        places = range(skip_begin, len(self.results["loss"]) - skip_end)
        kept = [place for place in places if math.isfinite(self.results["loss"][place])]
        if len(kept) < 2:
            raise UserError(
                f"LearningRateFinder ended after {len(self.results['lr'])} of {self.num_training} steps, at a learning "
                f"rate of {self.results['lr'][-1]:.3g}, with too few losses for a slope: raise num_training_steps, or "
                "lower max_lr or raise early_stop_threshold where the loss went up at once"
            )
        at = torch.tensor([self.results["lr"][place] for place in kept], dtype=torch.float64)
        losses = torch.tensor([self.results["loss"][place] for place in kept], dtype=torch.float64)
        slope = torch.gradient(losses, spacing=(at.log() if self.mode == "exponential" else at,))[0]
        self._optimal_idx = kept[int(slope.argmin())]
        return float(self.results["lr"][self._optimal_idx])


def use(trainer: pl.Trainer, module: "FineTuner", lr: float) -> None:
    """Let the run's schedule have this base learning rate; groups of parameters keep their ratios."""
    module._settings = [
        settings | {"initial_lr": lr * ratio}
        for settings, ratio in zip(module._settings, ratios(trainer.optimizers[0]), strict=True)
    ]
    restore_settings(trainer.optimizers[0], cast(Any, trainer.lr_scheduler_configs[0].scheduler), module._settings)


class _Unreported(SkippedSteps):
    """Steps of the search that are not finite are no steps of the run."""

    def _report(self, trainer: pl.Trainer, facts: dict[str, float]) -> None:
        """Nothing is written."""


@dataclass
class _Search:
    finder: LearningRateSearch
    trainer: pl.Trainer
    module: "FineTuner"
    _mean: float = 0.0
    _best: float = math.inf
    _losses: list[float] = field(default_factory=list)

    def run(self) -> Curve:
        """The curve; everything is as before."""
        of = self.finder
        curve = Curve(of._mode, of._min_lr, of._max_lr, of._num_training_steps)
        rates = [self._rate(step) for step in range(of._num_training_steps)]
        with self._undone():
            for step, lr in enumerate(self._shown(rates)):
                if not self._is_fine(self._step(step, lr)):
                    break
        curve.results.update({"lr": rates[: len(self._losses)], "loss": self._losses})
        return curve

    def _rate(self, step: int) -> float:
        least, most, share = self.finder._min_lr, self.finder._max_lr, step / (self.finder._num_training_steps - 1)
        return least + share * (most - least) if self.finder._mode == "linear" else least * (most / least) ** share

    def _shown(self, rates: list[float]) -> Iterator[float]:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        bar = tqdm(rates, desc="Searching the learning rate", disable=not self.trainer.is_global_zero)
        yield from bar
        bar.close()

    def _step(self, number: int, lr: float) -> float:
        """Train on one optimizer step's rows at a learning rate; their mean negative log-likelihood before it."""
        trainer, module, optimizer = self.trainer, self.module, self.trainer.optimizers[0]
        data = cast("ChatDataModule", trainer.datamodule)  # type: ignore[attr-defined]
        place = number % data.sampler().steps
        batches = [module._moved(batch) for batch in data.step(trainer.current_epoch, place)]
        for group, ratio in zip(optimizer.param_groups, ratios(optimizer), strict=True):
            group["lr"] = lr * ratio

        def forward_and_backward() -> Tensor:
            for micro, batch in enumerate(batches):
                loss = cast(Tensor, trainer.strategy.training_step(batch, place * len(batches) + micro))
                trainer.strategy.backward(loss / trainer.accumulate_grad_batches, optimizer)
            return loss

        trainer.strategy.optimizer_step(optimizer, forward_and_backward)
        optimizer.zero_grad()
        if LEAVE in module.step.wished:
            leave(trainer, "before any step")
        found = module.step.close(optimizer).get("nll")  # not there where it is not finite
        return math.inf if found is None else float(found)

    def _is_fine(self, loss: float) -> bool:
        """Take note of a loss; whether to continue."""
        self._mean = _SMOOTHING * self._mean + (1 - _SMOOTHING) * loss
        smooth = self._mean / (1 - _SMOOTHING ** (len(self._losses) + 1))
        self._losses.append(smooth)
        limit = self.finder._early_stop_threshold
        diverges = limit is not None and smooth > limit * self._best
        self._best = min(self._best, smooth)
        return math.isfinite(smooth) and not diverges

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Whatever happens within to weights, optimizer and counters, afterwards they are as before."""
        trainer, module, optimizer = self.trainer, self.module, self.trainer.optimizers[0]
        let_go(module._network)  # after a forward pass alone, gathered copies stand in for sharded weights
        trained = [weight for weight in module.parameters() if weight.requires_grad]
        weights = [weight.detach().clone() for weight in trained]
        states = {weight: copy.deepcopy(state) for weight, state in optimizer.state.items()}
        groups = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        precision = copy.deepcopy(trainer.precision_plugin.state_dict())
        step, initial, callbacks = module.step, module.is_initial, trainer.callbacks  # type: ignore[attr-defined]
        module.step = _trial(module)
        trainer.callbacks = []  # type: ignore[attr-defined]
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, before in zip(trained, weights, strict=True):
                    weight.copy_(before)
            optimizer.zero_grad()
            optimizer.state.clear()
            optimizer.state.update(states)
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update(settings)
            if precision:
                trainer.precision_plugin.load_state_dict(precision)
            module.step, module.is_initial, trainer.callbacks = step, initial, callbacks  # type: ignore[attr-defined]
            module.trained_on = None


def _trial(module: "FineTuner") -> StepInTheMaking:
    """What puts together the steps of the search: they ask for the same, and are no part of the run's counts."""
    made = StepInTheMaking(module.step.normalize, module.weighting.divisor, module.step.skipped.limit)
    made.wishes, made.skipped = module.step.wishes, _Unreported(module.step.skipped.limit)
    return made
