"""The model of a checkpoint, built from the checkpoint alone and the base model's configuration: no base weights."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from dft_lightning.adapter_folders import model_of, name_base, tokenizer_of
from dft_lightning.adapters import merged
from dft_lightning.averaging import Which, state_of
from dft_lightning.checkpointing import read
from dft_lightning.embedding_rows import config_with_rows, rows_stored, train_embeddings
from dft_lightning.errors import UserError
from dft_lightning.loading import ModelSource, load_model, load_tokenizer, loading
from dft_lightning.models import LoRA, add_lora
from dft_lightning.quantization import Quantization, leave_out_of_states, read_out
from dft_lightning.reference import fingerprint_of_base
from dft_lightning.remote_code import has_code
from dft_lightning.resume import CHECKPOINT_KEY

_PREFIX = "network.model."


@dataclass(frozen=True)
class Stored:
    """What an export needs of a checkpoint; the weights stay on disk until they are used."""

    options: dict[str, Any]
    """Those of the run's `FineTuner`."""
    weights: dict[str, Tensor]
    step: int
    facts: dict[str, Any]
    """See `resume.facts_of`."""
    trust_remote_code: bool = False
    """Whether the user allows a model's own code to run: never what a checkpoint says."""

    @property
    def quantization(self) -> Quantization | None:
        """How the base was held; if at all, `weights` are those of the adapter alone."""
        found: Quantization | None = self.options.get("quantization")
        return found

    @property
    def base_is_merged(self) -> bool:
        """Whether the adapter belongs to a model that no folder holds: one that another adapter was merged into."""
        return self.options.get("adapter") == "merge" and self.options["lora"] is not None

    def source(self, model_name: str | None = None) -> ModelSource:
        """Where the configuration is; `model_name` stands for the run's own, and an adapter for its base."""
        return model_of(self._named(model_name))

    def _named(self, model_name: str | None) -> ModelSource:
        options = self.options
        dtype = next(iter(self.weights.values())).dtype
        if self.quantization is not None:
            dtype = getattr(torch, self.facts["settings"]["dtype"].removeprefix("torch."))
        return ModelSource(
            model_name or options["model_name"],
            dtype,
            revision=None if model_name else options["revision"],
            trust_remote_code=self.trust_remote_code,
            quantization=self.quantization,
            compute=dtype,
            allow_missing=options.get("allow_missing") or [],
            seed=int(self.facts["settings"]["seed"]),
        )

    @property
    def trains_embeddings(self) -> bool:
        """Whether embedding and head were enlarged, and trained next to an adapter."""
        return bool(self.options.get("resize_embeddings"))

    def tokenizer(self, model_name: str | None = None) -> Any:
        """The run's tokenizer, with the chat template it had."""
        return load_tokenizer(self._tokenizer_source(model_name), self.options["chat_template"])

    def _tokenizer_source(self, model_name: str | None) -> ModelSource:
        if self.options["tokenizer_name"] is not None and model_name is None:
            return ModelSource(self.options["tokenizer_name"], trust_remote_code=self.trust_remote_code)
        return tokenizer_of(self._named(model_name))

    def refuse_code(self, model_name: str | None = None) -> None:
        """Refuse to build, without its own code, a model or tokenizer that was trained with it.

        Raises:
            UserError: the run had `trust_remote_code`, there is such code, and the user does not allow it here.
        """
        if self.trust_remote_code or not self.options.get("trust_remote_code"):
            return
        sources = {"config.json": self.source(model_name), "tokenizer_config.json": self._tokenizer_source(model_name)}
        for name, source in sources.items():
            if has_code(source, name):
                raise UserError(
                    f"the run had model.trust_remote_code true, and {source.name!r} has code of its own (auto_map in "
                    f"its {name}): a checkpoint cannot allow it to run. If you trust that code, give "
                    "--trust_remote_code true"
                )

    def model(self, model_name: str | None = None) -> Any:
        """The transformers model with these weights, in a peft model where the run trained an adapter.

        A base that was quantized stays without weights: an adapter is written without it.

        Raises:
            UserError: the configuration cannot be loaded, or is not of these weights.
        """
        source = self.source(model_name)
        if self.trains_embeddings:
            source.embedding_rows = rows_stored(_without_weights(source), self.weights)
        model = self._filled(_without_weights(source), source)
        if self.quantization is None:
            (model if self.options["lora"] is None else model.get_base_model()).tie_weights()
        return model.eval()

    def merged(self, model_name: str | None = None) -> Any:
        """The transformers model with the adapter's product added to its weights.

        To those that a quantized base stands for, since they are what the adapter has learnt beside.

        Raises:
            UserError: as in `model`; or the base was quantized, and is another by now.
        """
        if self.quantization is None:
            return merged(self.model(model_name)).eval()
        source = self.source(model_name)
        packed = load_model(source)
        now, then = fingerprint_of_base(packed), self.facts["identity"]["model"]["weights left out of checkpoints"]
        if now != then:
            raise UserError(
                f"the weights of {source.name!r} are no longer those that the adapter was trained beside: --model_name "
                "names the folder where they are"
            )
        return merged(self._filled(read_out(packed), source)).eval()

    def _filled(self, model: Any, source: ModelSource) -> Any:
        """The model with these weights, in a peft model where there was one."""
        lora = self.options["lora"]
        if lora is not None:
            with torch.device(model.device):
                model = add_lora(model, LoRA(**lora))
            name_base(model, source)
        if self.trains_embeddings:
            train_embeddings(model)
        if self.quantization is not None:
            leave_out_of_states(model)
        try:
            model.load_state_dict(self.weights, assign=True)
        except RuntimeError as error:
            raise UserError(
                f"the weights are not those of a model like {source.name!r} ({' '.join(str(error).split())[:200]}): "
                "has its config.json changed since the run? --model_name names another folder"
            ) from error
        return model


def _without_weights(source: ModelSource) -> Any:
    """The model on the meta device, with its generation config."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    options: dict[str, Any] = {"revision": source.revision}
    with loading("configuration", source):
        config = AutoConfig.from_pretrained(source.path(), trust_remote_code=source.trust_remote_code, **options)
        config = config_with_rows(config, source.embedding_rows)
        with torch.device("meta"):
            build: Any = AutoModelForCausalLM.from_config
            model = build(config, dtype=source.dtype, trust_remote_code=source.trust_remote_code)
    with suppress(OSError):  # where it has none, that of the configuration stays
        model.generation_config = GenerationConfig.from_pretrained(source.path(), **options)
    return model


def read_stored(checkpoint: Path, which: Which | None = None, trust_remote_code: bool = False) -> Stored:
    """Open a checkpoint of a run without reading its tensors, the optimizer's least of all.

    Args:
        which: of a run that averaged its weights, the averages or the weights trained last; by default the averages.
        trust_remote_code: whether the user allows a model's own code; what the checkpoint says about it is ignored.

    Raises:
        UserError: there is no such file, it is damaged, no run of ours has written it, or it has no averages.
    """
    content = read(checkpoint, weights_only=True)
    _check_content(content, checkpoint)
    options, weights = dict(content["hyper_parameters"]), weights_of(state_of(content, which, checkpoint))
    if not weights:
        raise UserError(f"{checkpoint} has no weights of a model")
    return Stored(options, weights, int(content["global_step"]), content[CHECKPOINT_KEY], trust_remote_code)


#: What an export reads of a checkpoint, and what each has to be: a file may hold anything.
_TYPES: dict[tuple[str, ...], type | tuple[type, ...]] = {
    ("state_dict",): Mapping,
    ("global_step",): int,
    ("hyper_parameters",): Mapping,
    ("hyper_parameters", "model_name"): str,
    ("hyper_parameters", "revision"): (str, NoneType),
    ("hyper_parameters", "tokenizer_name"): (str, NoneType),
    ("hyper_parameters", "chat_template"): (str, NoneType),
    ("hyper_parameters", "lora"): (Mapping, NoneType),
    ("hyper_parameters", "weighting"): object,
    ("hyper_parameters", "normalize"): str,
    (CHECKPOINT_KEY, "settings"): Mapping,
    (CHECKPOINT_KEY, "settings", "dtype"): str,
    (CHECKPOINT_KEY, "settings", "seed"): int,
    (CHECKPOINT_KEY, "settings", "steps"): int,
    (CHECKPOINT_KEY, "identity", "model"): Mapping,
    (CHECKPOINT_KEY, "identity", "data"): Mapping,
}


def _check_content(content: Any, checkpoint: Path) -> None:
    for keys, kind in _TYPES.items():
        value = content
        for key in keys:
            if not isinstance(value, Mapping) or key not in value:
                raise UserError(
                    f"{checkpoint} was not written by a training run of dft-lightning: it has no {'.'.join(keys)}"
                )
            value = value[key]
        if not isinstance(value, kind):
            found = f"{'.'.join(keys)} of type {type(value).__name__}"
            raise UserError(f"{checkpoint} was not written by a training run of dft-lightning: it has {found}")


def weights_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those of the transformers or peft model, by its own names, out of the state of a `FineTuner`."""
    return {key.removeprefix(_PREFIX): value for key, value in state.items() if key.startswith(_PREFIX)}
