"""Results on disk: whole, or not there."""

from pathlib import Path

from dft_lightning.errors import UserError


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
