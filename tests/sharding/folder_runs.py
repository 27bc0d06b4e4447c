"""Runs on some ranks that write folders, and go on from those of others."""

import os
import shutil
from pathlib import Path

import cases
from cases import Case, keep, outcome

from dft_lightning.callbacks import Checkpoints, Export
from dft_lightning.callbacks.checkpoints import checkpoint_folder

#: Name, and what the callback is told.
FORMS = {"at once": {"sharded": True}, "meanwhile": {"sharded": True, "asynchronous": True}}
KEPT: dict[str, Case] = cases.KEPT | {"sizes that ranks cannot share evenly": Case(model="odd", module=cases.ADAMW)}


class InTheMiddle(Checkpoints):
    """Keeps the state after two steps beside the last."""

    def _write(self, trainer, name):
        super()._write(trainer, name)
        if trainer.global_step == 2:
            self._io.wait()
            if trainer.is_global_zero:
                folder = checkpoint_folder(trainer.default_root_dir)
                shutil.copytree(folder / f"{name}.ckpt", folder / "middle.ckpt", dirs_exist_ok=True)


def middle(folder: Path, name: str, form: str) -> Path:
    """Where a run of two ranks has kept its state."""
    return checkpoint_folder(folder / f"{form} {name}") / "middle.ckpt"


def write(folder: Path) -> None:
    """Whole runs that write folders, in each form; with one they export, too."""
    count = int(os.environ["WORLD_SIZE"])
    for name, case in KEPT.items():
        for form, options in FORMS.items():
            callbacks = [InTheMiddle(every_n_steps=2, **options), Export(enabled=form == "at once", merge_lora=True)]
            where = {"default_root_dir": folder / f"{form} {name}", "enable_checkpointing": True}
            found = outcome(folder, case, count, sharded=True, callbacks=callbacks, **where)
            keep(folder, f"whole {form} {name}", found)


def go_on(folder: Path, own: str) -> None:
    """From what two ranks have written at once."""
    count = int(os.environ["WORLD_SIZE"])
    for name, case in KEPT.items():
        origin = middle(folder, name, "at once")
        keep(folder, f"{own} {name}", outcome(folder, case, count, sharded=True, ckpt_path=str(origin)))
