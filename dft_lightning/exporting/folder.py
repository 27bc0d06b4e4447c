"""A Hugging Face folder: weights in shards, tokenizer, generation config, model card."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dft_lightning.adapter_folders import CONFIG
from dft_lightning.adapter_names import of_adapter, without_adapter
from dft_lightning.errors import UserError

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
    model: Any, tokenizer: Any, folder: Path, card: str, shard: str = SHARD, *, with_base: bool = False
) -> None:
    """`save_pretrained` of model and tokenizer into a folder that is either whole or not there.

    Args:
        card: the text of README.md, in place of what peft would write.
        with_base: write an adapter's base model, too, within the folder.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        if with_base:
            _write_base(model, unfinished / BASE, shard)
        model.save_pretrained(unfinished, max_shard_size=shard, **_embeddings(model))
        if with_base:
            _name_base(unfinished / CONFIG, folder / BASE)
        tokenizer.save_pretrained(unfinished)
        (unfinished / "README.md").write_text(card)
        _all_may_read_what_the_umask_allows(unfinished, like=unfinished / "README.md")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(f"{folder} could not be written ({error}): make room, or choose another place") from error
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


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
