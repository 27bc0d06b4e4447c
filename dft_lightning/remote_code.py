"""Whether a model or a tokenizer comes with Python code of its own, which `trust_remote_code` would run."""

import json
from typing import TYPE_CHECKING

from dft_lightning.adapter_folders import file_of

if TYPE_CHECKING:
    from dft_lightning.loading import ModelSource


def has_code(source: "ModelSource", name: str) -> bool:
    """Whether `config.json` or `tokenizer_config.json` of a folder or repository names code (`auto_map`)."""
    path = file_of(source, name)
    if path is None:
        return False
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError):
        return False  # who loads it next says so
    return isinstance(config, dict) and bool(config.get("auto_map"))
