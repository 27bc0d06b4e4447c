"""Results on disk: whole, or not there."""

import os
from pathlib import Path

from dft_lightning.errors import UserError


def writable(path: Path) -> None:
    """Find out early whether `write` will be able to.

    Raises:
        UserError: it will not.
    """
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"cannot write {path}: {folder} is no folder to write in; name another place by --output")


def write(path: Path, text: str) -> None:
    """Write beside the file's place, and move it there when it is whole.

    Raises:
        UserError: it cannot be written there.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        unfinished.rename(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; name another place by --output") from error
