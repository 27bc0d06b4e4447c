"""One optimizer step of a real run, and what came of it."""

from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import DEFAULT_SIZE_GUIDANCE, EventAccumulator

from dft_lightning import FineTuner, NuminaMathDataModule
from dft_lightning.sharding.tensors import whole
from dft_lightning.weighting import DFT


@dataclass
class Recorder(pl.Callback):
    """Keeps gradients as the optimizer sees them, and what is logged, step by step."""

    gradients: list[torch.Tensor] = field(default_factory=list)
    logged: list[dict[str, float]] = field(default_factory=list)

    def on_train_batch_end(self, trainer, pl_module, *_: Any) -> None:
        if trainer.global_step > len(self.logged):
            self.logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    def on_train_start(self, trainer, pl_module) -> None:
        trainer.optimizers[0].register_step_post_hook(self.keep)  # the gradients are still those of the step

    def keep(self, optimizer, *_: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        self.gradients.append(torch.cat([whole(grad.detach()).flatten().double() for grad in grads]))


def fit(
    model, rows, weighting=None, *, module=None, data=None, kind=FineTuner, **trainer
) -> tuple[FineTuner, Recorder, pl.Trainer]:
    """Train on a file of rows, one epoch unless told otherwise; dropout is off."""
    pl.seed_everything(0, verbose=False)
    recorder = Recorder()
    options = {"global_batch_size": 8, "micro_batch_size": 8, "max_length": 200}
    # SGD: the gradient of a later step does not hang on how the earlier one was rounded, as Adam's division does
    finetuner = kind(
        str(model), weighting or DFT(), **({"optimizer": lambda p: torch.optim.SGD(p, lr=0.01)} | (module or {}))
    )
    finetuner.allow_changes = trainer.pop("allow_changes", frozenset())
    datamodule = NuminaMathDataModule(str(rows), **(options | (data or {})))
    defaults = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
    }
    watching = [recorder] if trainer.pop("recorder", True) else []  # it cannot keep a gradient that is not there
    callbacks, resume_from = [*watching, *trainer.pop("callbacks", [])], trainer.pop("ckpt_path", None)
    runner = pl.Trainer(**(defaults | trainer), callbacks=callbacks)
    runner.fit(finetuner, datamodule, ckpt_path=resume_from)
    return finetuner, recorder, runner


def logger(folder) -> TensorBoardLogger:
    """TensorBoard's, as the command line makes it."""
    return TensorBoardLogger(str(folder), name="tensorboard", version="", default_hp_metric=False)


def events(folder) -> EventAccumulator:
    """All that `logger` wrote."""
    found = EventAccumulator(str(folder / "tensorboard"), dict.fromkeys(DEFAULT_SIZE_GUIDANCE, 0))
    return found.Reload()
