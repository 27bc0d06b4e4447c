"""The marker of a run's folder: a file that is written first, and without which a folder with other files is refused.

It is JSON: what is known of the run's own files, and whatever other parts of the program want to keep of the run. An
empty file is a marker, too, so that a user can make one by `touch`.
"""

import json
import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from dft_lightning.checkpointing import skeleton
from dft_lightning.disk import writing
from dft_lightning.errors import UserError
from dft_lightning.own_files import EXPORTS, check_no_link
from dft_lightning.resume import CHECKPOINT_KEY

FILE = ".dft-run.json"
_UNFINISHED = f"{FILE}.unfinished"
#: Top-level files that launchers, shells, editors and file systems put into a folder before its run: no name of ours.
TOLERATED = ("*.log", "*.out", "*.err", ".gitignore", ".gitkeep", ".nfs*", ".DS_Store", ".lock", _UNFINISHED)


def read(run_dir: Path) -> dict[str, Any]:
    """What the marker says; nothing where there is none, or it is empty or of another form."""
    with suppress(OSError, ValueError):
        found = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def write(run_dir: Path, content: Mapping[str, Any]) -> None:
    """Replace the marker; a whole one is there at any moment."""
    with writing(run_dir / FILE, "--run_dir"):
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / _UNFINISHED).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(run_dir / _UNFINISHED, run_dir / FILE)


def update(run_dir: Path, **changes: Any) -> None:
    """Change some of what a run's marker says; nothing where the folder has none (a trainer without `dft`)."""
    if (run_dir / FILE).is_file():
        write(run_dir, read(run_dir) | changes)


def listed(run_dir: Path) -> dict[str, list[str]]:
    """The files that were written of each exported model, by the name of its folder."""
    found = read(run_dir).get("exported")
    if not isinstance(found, dict):
        return {}
    return {
        name: files
        for name, files in found.items()
        if name in EXPORTS and isinstance(files, list) and all(isinstance(file, str) for file in files)
    }


def check(run_dir: Path) -> None:
    """Refuse a folder that has files of others, and is not that of a run.

    All ranks may call: what the first one writes meanwhile makes no difference.

    Raises:
        UserError: the folder is not to be written to.
    """
    try:
        names = os.listdir(run_dir)  # once: the marker comes before any other file
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"--run_dir {run_dir} cannot be used ({error.strerror}): choose another") from error
    foreign = sorted(name for name in names if not any(fnmatch(name, pattern) for pattern in TOLERATED))
    if FILE not in names and foreign and not is_earlier_run(run_dir):
        shown = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
        raise UserError(
            f"--run_dir {run_dir} has other files ({shown}) and is not the folder of a run (it has no {FILE}): choose "
            "a new or an empty folder. If a run may replace what has the names of its files there (config.yaml, "
            f"checkpoints/last.ckpt, export/, …): touch {shlex.quote(str(run_dir / FILE))}"
        )
    for name in (*EXPORTS, "predictions"):
        check_no_link(run_dir / name)


def is_earlier_run(run_dir: Path) -> bool:
    """Whether a folder is that of a run by a version which wrote no marker: its files say so, not their names."""
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        ours = {"run_dir", "model", "data", "trainer"} <= config.keys() and "weighting" in config["model"]
    except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError, KeyError):
        return False
    return ours and (_has_starts(run_dir) or any(map(_is_checkpoint, (run_dir / "checkpoints").glob("*.ckpt"))))


def _has_starts(run_dir: Path) -> bool:
    try:
        starts = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))["starts"]
        return bool(starts) and all("versions" in start and "ranks" in start for start in starts)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_checkpoint(path: Path) -> bool:
    with suppress(Exception):  # damaged files, and those of others, raise errors of many classes
        return CHECKPOINT_KEY in skeleton(path, verify=False)
    return False


class Claim:
    """The first rank's right to a run's folder: the marker is there, or taken away again if nothing came of the run."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._made = False

    def take(self, run_dir: Path) -> None:
        """Write the marker, before anything else.

        Raises:
            UserError: see `check`; or the folder cannot be written to.
        """
        check(run_dir)
        if (run_dir / FILE).exists():
            return
        self._folder, self._made = run_dir, not run_dir.exists()
        write(run_dir, {"dft_run": 1})

    def release(self) -> None:
        """Leave nothing behind where nothing was written."""
        folder, self._folder = self._folder, None
        if folder is None:
            return
        with suppress(OSError):
            (folder / _UNFINISHED).unlink(missing_ok=True)
            others = [name for name in os.listdir(folder) if name != FILE]
            if all(any(fnmatch(name, pattern) for pattern in TOLERATED) for name in others):
                (folder / FILE).unlink(missing_ok=True)
            if self._made:
                folder.rmdir()
