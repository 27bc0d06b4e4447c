"""Checkpoints of one name take each other's place, so that at any moment there is a whole one.

A new one is written beside, under another name. A file then replaces the old one in one step. For folders there is no
such step: the old one is set aside first, and removed when the new one is in its place.
"""

import os
import shutil
from pathlib import Path


def unfinished(path: Path) -> Path:
    """Where a checkpoint is written before it is whole."""
    return path.with_name(f".{path.name}.unfinished")


def before(path: Path) -> Path:
    """Where the one before it waits until the new one is in its place; else nothing is there."""
    return path.with_name(f".{path.name}.before")


def begin(path: Path) -> Path:
    """A place to write at, cleared of what an earlier process has left there."""
    place = unfinished(path)
    remove(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def finish(path: Path) -> None:
    """Put what is written into its place, and only then remove what was there."""
    on_disk(unfinished(path))
    if path.exists() and (path.is_dir() or unfinished(path).is_dir()):
        remove(before(path))
        os.replace(path, before(path))
    os.replace(unfinished(path), path)
    on_disk(path.parent)
    remove(before(path))


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
