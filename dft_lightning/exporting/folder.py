"""A Hugging Face folder: weights in shards, tokenizer, generation config, model card."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dft_lightning.adapter_folders import CONFIG
from dft_lightning.adapter_names import of_adapter, without_adapter
from dft_lightning.disk import writing
from dft_lightning.errors import UserError
from dft_lightning.own_files import files_of, replace_folder
from dft_lightning.run_marker import listed, update

SHARD = "5GB"
"""Largest file of weights, as on the hub; one is in memory at a time."""


def stop_ids(tokenizer: Any, stop_tokens: list[str]) -> list[int]:
    """The ids of these tokens.

    Raises:
        UserError: one of them is no token of the tokenizer.
    """
    known = tokenizer.get_vocab()
    if unknown := [token for token in stop_tokens if token not in known]:
        raise UserError(f"export.stop_tokens: {unknown} are no tokens of the tokenizer")
    return [known[token] for token in stop_tokens]


def add_stops(generation: Any, stops: list[int]) -> None:
    """Let generation end at these tokens too."""
    ends = generation.eos_token_id
    ends = [*ends] if isinstance(ends, list) else [] if ends is None else [ends]
    ends += [stop for stop in dict.fromkeys(stops) if stop not in ends]
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends or None


BASE = "base"
"""Folder, within that of an adapter, of a base model that is nowhere else."""


def write_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    card: str,
    shard: str = SHARD,
    *,
    with_base: bool = False,
    run_dir: Path | None = None,
) -> None:
    """`save_pretrained` of model and tokenizer into a folder that is either whole or not there.

    Args:
        card: the text of README.md, in place of what peft would write.
        with_base: write an adapter's base model, too, within the folder.
        run_dir: the run whose export it is: files in it that are not of an earlier export stay.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    option = "OUT" if run_dir is None else "--run_dir"
    with writing(folder, option), _removed_on_error(unfinished):
        if with_base:
            _write_base(model, unfinished / BASE, shard)
        model.save_pretrained(unfinished, max_shard_size=shard, **_embeddings(model))
        if with_base:
            _name_base(unfinished / CONFIG, folder / BASE)
        tokenizer.save_pretrained(unfinished)
        (unfinished / "README.md").write_text(card)
        _all_may_read_what_the_umask_allows(unfinished, like=unfinished / "README.md")
        if run_dir is None:
            unfinished.rename(folder)
        else:
            _take_place(unfinished, folder, run_dir)


def _take_place(unfinished: Path, folder: Path, run_dir: Path) -> None:
    known, written = listed(run_dir), files_of(unfinished)
    # before the folder is replaced, so that a run that is killed in between knows the files of both
    both = sorted({*known.get(folder.name, []), *written}) if folder.name in known or not folder.exists() else None
    if both is not None:
        update(run_dir, exported=known | {folder.name: both})
    replace_folder(unfinished, folder, known.get(folder.name))
    update(run_dir, exported=known | {folder.name: written})


@contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    """What is not complete is removed: it may be what fills the disk."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _embeddings(model: Any) -> dict[str, bool]:
    """An adapter next to which the embedding and the head were trained is written with both."""
    is_trained = hasattr(model, "peft_config") and model.get_input_embeddings().weight.requires_grad
    return {"save_embedding_layers": True} if is_trained else {}


def _write_base(adapted: Any, folder: Path, shard: str) -> None:
    base = adapted.get_base_model()
    state = {without_adapter(name): weight for name, weight in base.state_dict().items() if not of_adapter(name)}
    base.save_pretrained(folder, state_dict=state, max_shard_size=shard)
    for config in adapted.peft_config.values():
        config.base_model_name_or_path, config.revision = str(folder), None


def _name_base(config: Path, base: Path) -> None:
    """Have an adapter's configuration name its base where that will be."""
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(base.absolute())}))


def _all_may_read_what_the_umask_allows(folder: Path, like: Path) -> None:
    """safetensors writes files that nobody but their owner may read."""
    mode = like.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
