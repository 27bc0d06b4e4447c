"""The folder that holds a run: what is in it, how it is set aside, and which checkpoint a command starts from."""

import shutil
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from dft_lightning.callbacks.checkpoints import checkpoint_folder
from dft_lightning.checkpointing import skeleton
from dft_lightning.checkpointing.place import unfinished
from dft_lightning.checkpointing.reading import newest_whole
from dft_lightning.errors import UserError
from dft_lightning.resume import age, identity_by_options

#: What belongs to a run.
_CONTENTS = (
    "config.yaml",
    "environment.json",
    "tensorboard",
    "checkpoints",
    "export",
    "export-merged",
    "predictions",
    "skipped_steps.jsonl",
)
ASIDE = ".overwritten"


def move_run(source: Path, target: Path) -> None:
    """Move what belongs to a run from one folder to another, in place of what is there."""
    for name in _CONTENTS:
        if not (source / name).exists():
            continue
        if (target / name).is_dir():
            shutil.rmtree(target / name)
        target.mkdir(exist_ok=True)
        (source / name).rename(target / name)


def find_checkpoint(run_dir: Path, asked: str | None, subcommand: str) -> str | None:
    """The checkpoint to start from: for a fit the run's last checkpoint, if there is one, unless another is asked for.

    Args:
        asked: a checkpoint; "last" or "best" of the run; None.

    Raises:
        UserError: a checkpoint that was asked for by name or path is not there, or none there is whole.
    """
    folder = checkpoint_folder(run_dir)
    if asked is None and subcommand != "fit":
        return None
    asked = asked or "last"
    path = folder / f"{asked}.ckpt" if asked in ("last", "best") else Path(str(asked))
    found = newest_whole(path)
    if found is not None:
        return str(found)
    if asked == "last" and subcommand == "fit":  # nothing there: a fresh start
        if unfinished(path).exists():
            rank_zero_info(f"{folder} has no whole checkpoint, only one that was cut off in the writing: starting anew")
        return None
    raise UserError(f"ckpt_path {asked!r}: there is no {path}; give a checkpoint, or 'last' or 'best' of the run_dir")


def refuse_own(checkpoint: str | None, run_dir: Path) -> None:
    """Refuse to start anew from a checkpoint that the start would remove."""
    if checkpoint is not None and Path(checkpoint).resolve().is_relative_to(run_dir.resolve()):
        raise UserError(
            f"--overwrite true would remove {checkpoint}, which ckpt_path asks for: leave --overwrite out, or choose "
            "another --run_dir"
        )


def read_checkpoint(checkpoint: str, subcommand: str) -> tuple[dict[str, Any], int]:
    """The options and the step of a checkpoint; says how old it is."""
    stored = skeleton(Path(checkpoint))
    try:
        options, step = dict(stored["hyper_parameters"]), int(stored["global_step"])
        identity_by_options(options)
    except Exception as error:  # missing keys, and what is not a checkpoint's, have no common class
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot read checkpoint {checkpoint} ({reason}): give another ckpt_path") from error
    cut_off = unfinished(Path(checkpoint)).exists()
    rank_zero_info(
        f"{'Going on from' if subcommand == 'fit' else 'Using'} {checkpoint}: step {step:,}, written "
        f"{age(time.time() - Path(checkpoint).stat().st_mtime)} ago"
        + (" (a later one was cut off while it was written, and is left out)" if cut_off else "")
    )
    return options, step
