"""Runs on two ranks whose callbacks average the weights, or search the learning rate."""

import os
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from harness import fit
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder
from lightning.pytorch.strategies import DDPStrategy

from dft_lightning.callbacks import Checkpoints
from dft_lightning.callbacks.checkpoints import checkpoint_folder
from dft_lightning.errors import UserError
from dft_lightning.sharding import FSDP2Strategy
from dft_lightning.sharding.tensors import whole

MODULE = {"lr_schedule": "constant", "warmup_ratio": 0.0, "optimizer": lambda p: torch.optim.SGD(p, lr=0.05)}


def run(folder: Path, name: str, callback, strategy=None, **options):
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    more = {} if ranks == 1 else {"devices": ranks, "strategy": strategy or DDPStrategy(process_group_backend="gloo")}
    tuner, recorder, _ = fit(
        folder / "model",
        folder / "rows.jsonl",
        module=MODULE,
        data={"micro_batch_size": 2, "val_size": 2},
        callbacks=[callback, Checkpoints(1)],
        default_root_dir=folder / name,
        enable_checkpointing=True,
        **(more | options),
    )
    weights = {key: whole(value.detach()).clone() for key, value in tuner.named_parameters()}
    return weights, recorder.gradients


def both(folder: Path, name: str) -> None:
    """An averaged run, one that resumes in its middle, and a search; what each rank has is written."""
    rank = os.environ.get("RANK", "0")
    averaged = run(folder, f"{name} whole", EMAWeightAveraging(decay=0.5))[0]
    run(folder, f"{name} parts", EMAWeightAveraging(decay=0.5), max_steps=2)
    last = checkpoint_folder(folder / f"{name} parts") / "last.ckpt"
    resumed = run(folder, f"{name} parts", EMAWeightAveraging(decay=0.5), ckpt_path=last)[0]
    finder = LearningRateFinder(min_lr=1e-4, num_training_steps=14)
    searched = run(folder, f"{name} search", finder)[0]
    found = {"averaged": averaged, "resumed": resumed, "searched": searched, "lr": finder.optimal_lr.suggestion()}
    torch.save(found, folder / f"{name} {rank}.pt")


def sharded(folder: Path) -> None:
    """Averaging is refused, and a search leaves the weights as they were."""
    with pytest.raises(UserError, match=r"does not average weights that .* fsdp2 shards"):
        run(folder, "fsdp2", EMAWeightAveraging(), FSDP2Strategy(process_group_backend="gloo"))
    finder = LearningRateFinder(min_lr=1e-4, num_training_steps=14, update_attr=False)
    strategy = FSDP2Strategy(process_group_backend="gloo")
    searched = run(folder, "fsdp2 search", finder, strategy)[0]
    plain = run(folder, "fsdp2 plain", pl.Callback(), FSDP2Strategy(process_group_backend="gloo"))[0]
    assert all(torch.equal(searched[key], value) for key, value in plain.items())
