"""The folder that holds a run: what is in it, how it is set aside, and which checkpoint a command starts from."""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from dft_lightning.callbacks.checkpoints import checkpoint_folder
from dft_lightning.checkpointing import skeleton
from dft_lightning.checkpointing.place import remove, unfinished
from dft_lightning.checkpointing.reading import newest_whole
from dft_lightning.errors import UserError
from dft_lightning.own_files import files_of, move, own_files
from dft_lightning.resume import age, identity_by_options
from dft_lightning.run_marker import listed, update

ASIDE = ".overwritten"


def set_aside(run_dir: Path) -> None:
    """Move an earlier run's own files out of the way, for `--overwrite`.

    Raises:
        UserError: one of its folders is a link.
    """
    known = listed(run_dir)
    move([*own_files(run_dir, known)], run_dir, run_dir / ASIDE)


def bring_back(run_dir: Path) -> None:
    """Move back what was set aside: nothing came of the run that would have replaced it."""
    if (run_dir / ASIDE).is_dir():
        move([Path(name) for name in files_of(run_dir / ASIDE)], run_dir / ASIDE, run_dir)
        _without_empty_folders(run_dir / ASIDE)


def remove_aside(run_dir: Path) -> None:
    """Remove what was set aside, apart from files of others, which earlier versions set aside, too."""
    if (run_dir / ASIDE).is_dir() and not (run_dir / ASIDE).is_symlink():
        for path in own_files(run_dir / ASIDE, listed(run_dir)):
            remove(run_dir / ASIDE / path)
        _without_empty_folders(run_dir / ASIDE)
        update(run_dir, exported={})


def _without_empty_folders(folder: Path) -> None:
    """Remove those, and the folder itself if it is one."""
    for where, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # not empty
            os.rmdir(where)


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
