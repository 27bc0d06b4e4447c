"""A run that is stopped half-way and resumed, next to one that is not."""

import lightning.pytorch as pl
import torch
from harness import fit

from dft_lightning.callbacks import Checkpoints
from dft_lightning.callbacks.checkpoints import checkpoint_folder
from dft_lightning.weighting import DFT


class StopAfter(pl.Callback):
    """Asks for an end after so many steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop |= trainer.global_step == self.steps


def run(model, rows, folder, module, *callbacks, **options):
    return fit(
        model,
        rows,
        DFT(),
        module={"warmup_ratio": 0.0} | module,
        recorder=False,
        callbacks=[*callbacks, Checkpoints(1, save_best=False)],
        enable_checkpointing=True,
        default_root_dir=folder,
        max_steps=4,
        **options,
    )


def last(folder):
    return checkpoint_folder(folder) / "last.ckpt"


def resumes_to_the_bit(model, rows, folder, module, **options):
    """2N steps = N + resume + N, and both halves train."""
    whole = run(model, rows, folder / "whole", module, **options)[0].network.state_dict()
    run(model, rows, folder / "parts", module, StopAfter(2), **options)
    half = torch.load(last(folder / "parts"), weights_only=True)
    assert half["global_step"] == 2
    resumed, _, trainer = run(model, rows, folder / "parts", module, ckpt_path=last(folder / "parts"), **options)
    ours = resumed.network.state_dict()
    assert trainer.global_step == 4
    assert all(torch.equal(ours[name], value) for name, value in whole.items())
    assert any(not torch.equal(half["state_dict"][f"network.{name}"], value) for name, value in whole.items())
    return resumed, trainer
