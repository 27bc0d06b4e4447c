"""A LoRA adapter, as a folder or a repository of the hub, in place of a model: its base, its settings, its weights.

Such a folder has an adapter_config.json, which names the base model, and the adapter's weights.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from dft_lightning.adapter_names import of_adapter
from dft_lightning.adapters import AdapterDtype, LoRA, add_lora, merged
from dft_lightning.errors import UserError

if TYPE_CHECKING:
    from dft_lightning.loading import ModelSource

Adapter = Literal["continue", "merge"]
"""What becomes of the adapter: it is trained further, or merged into its base model before the training."""

CONFIG = "adapter_config.json"
_TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
#: Our options by peft's names.
_OPTIONS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "target_modules",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "modules_to_save": "modules_to_save",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "layers_to_transform": "layers_to_transform",
    "exclude_modules": "exclude_modules",
}
#: What says nothing about what a loaded adapter computes.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",  # peft finds it out from the layers
    "inference_mode",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
    "ensure_weight_tying",  # tied modules that an adapter changes are refused
}


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter that stands where a model is expected.

    Args:
        name: of the folder or repository.
        revision: of the repository.
        config: its adapter_config.json.
        base: folder or hub name of its base model.
    """

    name: str
    revision: str | None
    config: Mapping[str, Any]
    base: str

    def base_of(self, source: "ModelSource") -> "ModelSource":
        """Where the base model is, held as `source` says."""
        said = f", the base of the adapter {self.name!r} by its {CONFIG}"
        return replace(source, name=self.base, revision=self.config.get("revision"), named_by=said)

    def lora(self, dtype: AdapterDtype = "auto") -> LoRA:
        """Its settings as our options."""
        given = {ours: self.config.get(theirs) for theirs, ours in _OPTIONS.items()}
        kept = {name: value for name, value in given.items() if value not in (None, {}, [])}
        layers = kept.get("layers_to_transform")
        if isinstance(layers, int):
            kept["layers_to_transform"] = [layers]
        return LoRA(**(kept | {"dtype": dtype}))

    def add_to(self, base: Any, lora: LoRA, *, empty: bool = False) -> Any:
        """The base model with this adapter (a `peft.PeftModel`), to be trained further.

        Args:
            empty: the base is a shape alone: the weights are not read.

        Raises:
            UserError: the weights cannot be read, or are not those of these settings.
        """
        adapted = add_lora(base, lora, of=self.name)
        if not empty:
            self._fill(adapted)
        return adapted

    def merge_into(self, base: Any) -> Any:
        """The base model with this adapter merged into its weights, all of them trainable."""
        return merged(self.add_to(base, self.lora()))

    def _fill(self, adapted: Any) -> None:
        from peft import set_peft_model_state_dict
        from peft.utils import load_peft_weights

        try:
            weights = load_peft_weights(self.name, device="cpu", revision=self.revision)
            found: Any = set_peft_model_state_dict(adapted, weights)
        except Exception as error:  # safetensors, the hub, peft and torch share no class of error
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"cannot load the weights of the adapter {self.name!r} ({reason})") from error
        missing = [name for name in found.missing_keys if of_adapter(name)]
        if missing or found.unexpected_keys:
            raise UserError(
                f"the weights of the adapter {self.name!r} are not those of its {CONFIG} on {self.base!r}: missing "
                f"{missing[:3] or 'none'}, unexpected {found.unexpected_keys[:3] or 'none'}"
            )


def adapter_of(source: "ModelSource", choice: Adapter | None) -> AdapterFolder | None:
    """The adapter that a model's name stands for; None where it is a model.

    Raises:
        UserError: it is an adapter and `choice` is missing, or the other way round; or it is none that is known here.
    """
    config = _config_of(source)
    if config is None:
        if choice is not None:
            raise UserError(
                f"model.adapter is {choice}, but {source.name!r} is not an adapter: it has no {CONFIG}. Leave "
                "model.adapter out, or give the adapter as --model.model_name"
            )
        return None
    if choice is None:
        raise _undecided(source.name)
    _refuse_kind(source.name, config)
    return AdapterFolder(source.name, source.revision, config, _base_of(source.name, config))


def refuse_adapter(source: "ModelSource") -> None:
    """Refuse an adapter where a model is to be loaded: transformers would load the base, and the adapter or not."""
    if _config_of(source) is not None:
        raise _undecided(source.name)


def model_of(source: "ModelSource") -> "ModelSource":
    """The source itself, or the base model's where it is an adapter: both have the same configuration."""
    config = _config_of(source)
    if config is None:
        return source
    return AdapterFolder(source.name, source.revision, config, _base_of(source.name, config)).base_of(source)


def tokenizer_of(source: "ModelSource") -> "ModelSource":
    """Where the tokenizer is: with the adapter if it has one, else with its base."""
    if _config_of(source) is None or any(file_of(source, name) for name in _TOKENIZERS):
        return source
    return model_of(source)


def name_base(adapted: Any, source: "ModelSource") -> None:
    """Have an adapter's configuration name its base model so that it is found from any directory."""
    name = source.path()
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = os.path.abspath(name) if os.path.isdir(name) else name
        config.revision = source.revision


def _undecided(name: str) -> UserError:
    return UserError(
        f"{name!r} is an adapter ({CONFIG}), not a model: say --model.adapter continue to train it further, or "
        "--model.adapter merge to merge it into its base model before the training"
    )


def file_of(source: "ModelSource", name: str) -> str | None:
    """Path of a file of a folder or repository; None where there is none, or it cannot be had."""
    from dft_lightning import embedded

    if source.name == embedded.NAME:
        return None
    if os.path.isdir(source.name):
        path = os.path.join(source.name, name)
        return path if os.path.isfile(path) else None
    from transformers.utils.hub import cached_file

    try:
        found: str | None = cached_file(source.name, name, revision=source.revision)
    except (OSError, ValueError):  # nothing there, or no network: who loads it next says so
        return None
    return found


def _config_of(source: "ModelSource") -> dict[str, Any] | None:
    path = file_of(source, CONFIG)
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the {CONFIG} of {source.name!r}: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"the {CONFIG} of {source.name!r} is a {type(config).__name__}; expected a mapping")
    if any(file_of(source, name) for name in _WEIGHTS) and file_of(source, "config.json"):
        raise UserError(
            f"{source.name!r} holds both a model (config.json and weights) and an adapter ({CONFIG}), so that it is "
            "not clear what to train: keep them in two folders, and name one of them"
        )
    return config


def _refuse_kind(name: str, config: Mapping[str, Any]) -> None:
    """Refuse adapters that are not LoRA, and settings of LoRA that are not known here."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError("an adapter needs peft: install it with pip install 'dft-lightning[peft]'") from error
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind != "LORA":
        raise UserError(f"the adapter {name!r} is of peft_type {kind}; expected LORA, the only one supported here")
    if task not in (None, "CAUSAL_LM"):
        raise UserError(f"the adapter {name!r} is of task_type {task}; expected CAUSAL_LM")
    usual = {field.name: _default(field) for field in fields(LoraConfig)} | {"use_dora": False}
    usual["init_lora_weights"] = config.get("init_lora_weights", True)
    if isinstance(usual["init_lora_weights"], str) and usual["init_lora_weights"] not in ("gaussian", "orthogonal"):
        usual["init_lora_weights"] = True  # the others change the base model's weights
    for key, value in config.items():
        if key not in _OPTIONS and key not in _HARMLESS and (value or None) != (usual.get(key) or None):
            raise UserError(
                f"the adapter {name!r} has {key} {value!r} in its {CONFIG}, which is not supported here: expected "
                f"{usual.get(key)!r}"
            )


def _default(field: Any) -> Any:
    if field.default is not MISSING:
        return field.default
    return None if field.default_factory is MISSING else field.default_factory()


def _base_of(name: str, config: Mapping[str, Any]) -> str:
    """The base model's folder or hub name.

    A relative path is looked for from the adapter's folder and from the working directory.
    """
    base = config.get("base_model_name_or_path")
    how = f"set base_model_name_or_path in {os.path.join(name, CONFIG)} to the base model's folder or hub name"
    if not isinstance(base, str) or not base:
        raise UserError(f"the adapter {name!r} does not name its base model: {how}")
    around = (name, os.curdir) if os.path.isdir(name) else (os.curdir,)
    places = [os.path.join(folder, os.path.expanduser(base)) for folder in around]
    found = sorted({os.path.realpath(place) for place in places if os.path.isdir(place)})
    if len(found) > 1:
        raise UserError(f"the base model {base!r} of the adapter {name!r} could be any of {', '.join(found)}: {how}")
    if found:
        return found[0]
    if os.path.isabs(base) or base.startswith((".", "~")) or base.count("/") > 1:
        looked = base if os.path.isabs(base) else ", ".join(map(os.path.abspath, places))
        raise UserError(f"the base model {base!r} of the adapter {name!r} is not there (looked for {looked}): {how}")
    return base
