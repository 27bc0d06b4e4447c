"""The model of a checkpoint, built from the checkpoint alone and the base model's configuration: no base weights."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
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
            trust_remote_code=options["trust_remote_code"],
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
        options, source = self.options, tokenizer_of(self._named(model_name))
        if options["tokenizer_name"] is not None and model_name is None:
            source = ModelSource(options["tokenizer_name"], trust_remote_code=source.trust_remote_code)
        return load_tokenizer(source, options["chat_template"])

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


def read_stored(checkpoint: Path, which: Which | None = None) -> Stored:
    """Open a checkpoint of a run without reading its tensors, the optimizer's least of all.

    Args:
        which: of a run that averaged its weights, the averages or the weights trained last; by default the averages.

    Raises:
        UserError: there is no such file, it is damaged, no run of ours has written it, or it has no averages.
    """
    content = read(checkpoint, weights_only=True)
    if not isinstance(content, dict) or not {CHECKPOINT_KEY, "hyper_parameters", "state_dict"} <= content.keys():
        raise UserError(f"{checkpoint} was not written by a training run of dft-lightning")
    options, weights = dict(content["hyper_parameters"]), weights_of(state_of(content, which, checkpoint))
    return Stored(options, weights, int(content["global_step"]), content[CHECKPOINT_KEY])


def weights_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those of the transformers or peft model, by its own names, out of the state of a `FineTuner`."""
    return {key.removeprefix(_PREFIX): value for key, value in state.items() if key.startswith(_PREFIX)}
