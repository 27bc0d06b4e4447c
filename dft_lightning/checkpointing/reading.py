"""Reading a checkpoint of either form, and finding the latest that is whole."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from dft_lightning.checkpointing import checksums, folder, place
from dft_lightning.errors import UserError

#: Checkpoints that this process has found damaged: they are not kept as previous ones.
DAMAGED: set[Path] = set()


def skeleton(path: Path, verify: bool = True) -> dict[str, Any]:
    """A checkpoint of which no tensor of the model or the optimizer is loaded: those of a file stay on disk until they
    are used, those of a folder are shapes on the meta device.

    Args:
        verify: read all files, unless this process has done so, and compare them with their checksums.

    Raises:
        UserError: it is not there, not whole, or no checkpoint.
    """
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}; runs write theirs to RUN_DIR/checkpoints/last.ckpt")
    if path.is_dir() and not (path / folder.REST).exists():
        raise UserError(
            f"cannot read checkpoint {path}: it is a folder without {folder.REST}, so no checkpoint, or none that is "
            "whole; expected one such as RUN_DIR/checkpoints/last.ckpt"
        )
    try:
        if path.is_dir():
            found = folder.read_rest(path, verify)
        else:
            checksums.is_sealed(path, verify)
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # zip, pickle and file system have no common class
        reason = " ".join(str(error).split())[:200]
        previous = f"; the previous one is {place.before(path)}" if place.before(path).exists() else ""
        raise UserError(
            f"cannot read checkpoint {path} ({reason}): it is damaged, or no checkpoint{previous}"
        ) from error
    if not isinstance(found, dict) or "state_dict" not in found:
        raise UserError(f"{path} is no checkpoint: it holds no state of a module")
    return found


def read(path: Path, weights_only: bool = False) -> dict[str, Any]:
    """A whole checkpoint, on the host.

    Args:
        weights_only: the optimizer's state is neither read nor returned.
    """
    found = skeleton(path)
    if weights_only:
        found.pop("optimizer_states", None)
    return folder.read_whole(path, found) if path.is_dir() else found


def newest_whole(path: Path) -> Path | None:
    """The checkpoint of this name; where it is missing or damaged, the newest of the previous ones that is not.

    Raises:
        UserError: there are some, and none of them is whole.
    """
    failures = []
    for candidate in (path, *_previous(path)):
        if not candidate.exists():
            continue
        try:
            skeleton(candidate)
        except UserError as error:
            failures.append(str(error))
            DAMAGED.add(candidate.resolve())
            continue
        for failure in failures:
            rank_zero_warn(f"{failure}. Taking the one before it, {candidate}")
        return candidate
    if failures:
        best = path.with_name("best.ckpt")
        other = (
            f"go on from {best} with --ckpt_path best" if best.exists() and best != path else "give another ckpt_path"
        )
        raise UserError(f"{'; '.join(failures)}: {other}, or start anew with --overwrite true")
    return None


def _previous(path: Path) -> Iterator[Path]:
    """From the newest; a process that was killed may have left out the first."""
    yield place.before(path)
    for number in count(2):
        if not place.before(path, number).exists():
            return
        yield place.before(path, number)
