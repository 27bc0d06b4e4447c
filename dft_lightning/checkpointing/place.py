"""Checkpoints of one name take each other's place, so that at any moment there is a whole one.

A new one is written beside, under another name. A file then replaces the old one in one step. For folders there is no
such step: the old one is set aside first, and removed when the new one is in its place, or kept as the previous one.
"""

import os
import shutil
from pathlib import Path


def unfinished(path: Path) -> Path:
    """Where a checkpoint is written before it is whole."""
    return path.with_name(f".{path.name}.unfinished")


def before(path: Path, number: int = 1) -> Path:
    """Where the previous checkpoint is, while the new one is put in its place or as long as it is kept.

    Args:
        number: 1 is the previous one, 2 the one before that.
    """
    return path.with_name(f".{path.name}.before{number if number > 1 else ''}")


def begin(path: Path) -> Path:
    """A place to write at, cleared of what an earlier process has left there."""
    place = unfinished(path)
    remove(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def finish(path: Path, keep: int = 0) -> None:
    """Put what is written into its place, and only then remove what was there.

    Args:
        keep: how many of the previous ones stay.
    """
    on_disk(unfinished(path))
    if path.exists() and keep:
        _set_aside(path, keep)
    elif path.exists() and (path.is_dir() or unfinished(path).is_dir()):
        remove(before(path))
        os.replace(path, before(path))
    os.replace(unfinished(path), path)
    on_disk(path.parent)
    number = keep + 1
    remove(before(path, number))
    while before(path, number := number + 1).exists():  # more were kept at an earlier time
        remove(before(path, number))


def _set_aside(path: Path, keep: int) -> None:
    """Make the present one the first of the previous ones; there is a valid one of either name at any moment."""
    remove(before(path, keep))
    for number in range(keep, 1, -1):
        if before(path, number - 1).exists():
            os.replace(before(path, number - 1), before(path, number))
    if not path.is_dir() and not unfinished(path).is_dir():
        try:
            os.link(path, before(path))  # so that a file of its name is always there
            return
        except OSError:  # a file system without links
            remove(before(path))
    os.replace(path, before(path))


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def on_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
