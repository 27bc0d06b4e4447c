"""Which files of a run's folder are ours: nothing else is moved, replaced or removed.

Ours are the files with the names below, in a folder that has the run's marker (see `run_marker`), and of an exported
model those that the marker lists. Links to other folders are never followed.
"""

import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from dft_lightning.errors import UserError

EXPORTS = ("export", "export-merged")
#: Names of a run's files, by their folder.
_NAMES = {
    "": r"config\.yaml|environment\.json(\.unreadable)?|skipped_steps\.jsonl|\.(config\.yaml|environment\.json"
    r"|skipped_steps\.jsonl)\.unfinished|\.lr_find_[\w-]+\.ckpt|\.(export|export-merged)\.(unfinished|before)",
    "tensorboard": r"events\.out\.tfevents\..+|hparams\.yaml",
    "tensorboard/probe": r"\.?initial-\d+\.npy(\.unfinished)?",
    "checkpoints": r"\.?(last|best|stopped)\.ckpt(\.unfinished|\.before\d*)?",
    "predictions": r"part-\d{5}\.parquet|\.part-\d{5}\.parquet\.unfinished",
}
#: Names that a Hugging Face folder gives its files, where no list says which were written.
_EXPORTED = re.compile(
    r"(base/)?((config|generation_config|adapter_config|tokenizer\w*|special_tokens_map|added_tokens|vocab|processor_config"
    r"|preprocessor_config)\.json|(model|adapter_model)[\w-]*\.safetensors(\.index\.json)?|tokenizer\.model|merges\.txt"
    r"|vocab\.txt|chat_template\.jinja|README\.md)"
)


def files_of(folder: Path) -> list[str]:
    """All files of a folder, relative to it; a link counts as one, whatever it leads to."""
    found = []
    for where, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(where, name))]
        found += [os.path.relpath(os.path.join(where, name), folder) for name in [*files, *links]]
    return sorted(found)


def is_our_export(folder: Path) -> bool:
    """Whether a folder has a model card of ours."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return bool(re.match(r"---\n(?:.*\n)*?- dft-lightning\n", text.partition("\n---\n")[0] + "\n"))


def exported(folder: Path, listed: Collection[str] | None) -> list[str]:
    """The files of an exported model that we wrote, relative to its folder.

    Args:
        listed: those that were written, where that is known. Else they are known by their names, if the card is ours.
    """
    if folder.is_symlink() or not folder.is_dir():
        return []
    if listed is None:
        known = is_our_export(folder)
        return [name for name in files_of(folder) if known and _EXPORTED.fullmatch(name)]
    return [name for name in files_of(folder) if name in listed]


def own_files(run_dir: Path, listed: dict[str, list[str]]) -> Iterator[Path]:
    """What a run has left in its folder, relative to it: files, and folders that are ours as a whole.

    Args:
        listed: the files of each exported model, by the name of its folder.

    Raises:
        UserError: one of its folders is a link, which is not followed.
    """
    for name, pattern in _NAMES.items():
        folder = run_dir / name
        check_no_link(folder if name else None)
        if folder.is_dir():
            yield from (Path(name, found) for found in sorted(os.listdir(folder)) if re.fullmatch(pattern, found))
    for name in EXPORTS:
        check_no_link(run_dir / name)
        yield from (Path(name, found) for found in exported(run_dir / name, listed.get(name)))


def check_no_link(folder: Path | None) -> None:
    """Refuse to move or remove files in a folder outside the run's own."""
    if folder is not None and folder.is_symlink():
        raise UserError(
            f"{folder} is a link to {os.readlink(folder)}: files there are not replaced or removed. Remove the link, "
            "or choose another --run_dir"
        )


def move(paths: Collection[Path], source: Path, target: Path) -> None:
    """Move files and folders to the same places below another folder, in place of what is there."""
    for path in paths:
        to = target / path
        to.parent.mkdir(parents=True, exist_ok=True)
        if to.is_dir() and not to.is_symlink():
            shutil.rmtree(to)
        os.replace(source / path, to)
    for folder in sorted({parent for path in paths for parent in path.parents if parent.name}, reverse=True):
        if not os.listdir(source / folder):
            (source / folder).rmdir()


def replace_folder(new: Path, folder: Path, listed: Collection[str] | None) -> None:
    """Put a folder that is complete in another one's place; files in that which are not ours stay.

    Args:
        listed: see `exported`.
    """
    before = folder.with_name(f".{folder.name}.before")
    check_no_link(folder)
    if folder.exists():
        _keep_others(folder, new, set(exported(folder, listed)))
        shutil.rmtree(before, ignore_errors=True)
        os.replace(folder, before)
    os.replace(new, folder)
    shutil.rmtree(before, ignore_errors=True)


def _keep_others(folder: Path, new: Path, ours: Collection[str]) -> None:
    """Move to the new folder what others have put into the old one; under another name where that is taken."""
    for name in files_of(folder):
        if name in ours:
            continue
        to = new / name
        while os.path.lexists(to):
            to = to.with_name(f"{to.name}.kept")
            rank_zero_warn(f"{folder / name} was not written by dft: it is {to.name} now")
        to.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / name, to)
