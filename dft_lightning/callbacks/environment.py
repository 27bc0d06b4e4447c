"""Keeps in the run's folder what each of its starts stood on."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from dft_lightning import environment, resume
from dft_lightning.restarts import job

if TYPE_CHECKING:
    from dft_lightning.module import FineTuner


class Environment(Callback):
    """Adds to `run_dir/environment.json`, whenever a fit starts or goes on: versions, git state, data, hardware.

    What is not as at the last start is said: the run then goes on, but no longer to the bit.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hear of all ranks' hardware; the first one writes."""
        ranks = _of_all_ranks(environment.hardware(trainer.strategy.root_device))
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        run_dir = Path(trainer.default_root_dir)
        now = environment.start(ranks, {"job": job()} | _run(trainer, cast("FineTuner", pl_module)))
        earlier = environment.starts(run_dir)
        if earlier and trainer.global_step and (changed := environment.differences(earlier[-1], now)):
            rank_zero_info(f"Going on with another environment than at the last start: {', '.join(changed)}")
        environment.record(run_dir, now)


def _of_all_ranks(mine: dict[str, Any]) -> list[dict[str, Any]]:
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    every: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, mine)
    return every


def _run(trainer: pl.Trainer, module: "FineTuner") -> dict[str, Any]:
    """Which run this is: its identity has sha256 of model, tokenizer, weighting and data."""
    config, data = Path(trainer.default_root_dir) / "config.yaml", getattr(trainer, "datamodule", None)
    rows = getattr(data, "train_rows", None)
    held_out = getattr(data, "val_rows", None)
    return {
        "from_step": trainer.global_step,
        "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest() if config.exists() else None,
        "identity": resume.identity(module),
        "settings": resume.settings_of(module),
        "training_rows": None if rows is None else {"count": len(rows), "report": str(rows.report)},
        "validation_rows": None if held_out is None else held_out.fingerprint,
        "strategy": type(trainer.strategy).__name__,
        "micro_batches": trainer.accumulate_grad_batches,
    }
