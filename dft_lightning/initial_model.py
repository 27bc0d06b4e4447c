"""The model as it is before any training: a base model, with or without a new adapter, or with one from a folder."""

from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.utilities import rank_zero_info

from dft_lightning.adapter_folders import AdapterFolder, adapter_of, name_base
from dft_lightning.adapters import LoRA, add_lora, all_linear, described
from dft_lightning.embedding_rows import train_embeddings
from dft_lightning.errors import UserError
from dft_lightning.loading import load_model
from dft_lightning.lora_targets import ALL_LINEAR, adapted_layers
from dft_lightning.refusals import refuse_adapter_options
from dft_lightning.weighting.base import REF_DISTRIBUTION

if TYPE_CHECKING:
    from dft_lightning.scoring import WeightedModule

Reference = Literal["auto", "cache", "adapter_off", "copy"]


def read_adapter(module: "WeightedModule") -> AdapterFolder | None:
    """The adapter that model_name stands for, if any; where it is trained further, the LoRA settings become its own.

    Raises:
        UserError: see `adapter_of` and `agreed`; or these settings do not go with other options.
    """
    folder = adapter_of(module.source, module.adapter)
    if folder is None:
        return None
    if module.adapter == "merge":
        rank_zero_info(f"The adapter {folder.name} is merged into {folder.base}: {described(folder.lora())}")
        return folder
    module.asked_lora, module.lora = module.lora, agreed(folder, module.lora)
    module.hparams["lora"] = asdict(module.lora)
    rank_zero_info(f"The adapter {folder.name} on {folder.base} is trained further: {described(module.lora)}")
    refuse_adapter_options(module)
    return folder


def build(module: "WeightedModule", *, empty: bool = False) -> Any:
    """The initial model, adapters included; or its shape alone, see `load_model`."""
    folder, source = module.adapter_folder, module.base_source
    model = load_model(source, empty=empty)
    if folder is not None and module.adapter == "continue":
        assert module.lora is not None
        asked = None if module.asked_lora is None else module.asked_lora.target_modules
        wanted = all_linear(model, module.lora) if asked == ALL_LINEAR else set()
        model = folder.add_to(model, module.lora, empty=empty)
        refuse_other_layers(folder, model, wanted)
    else:
        if folder is not None and not empty:
            model = folder.merge_into(model).train()
        model = model if module.lora is None else add_lora(model, module.lora)
    if module.lora is not None:
        name_base(model, source)
    return model if module.resize_embeddings is False else train_embeddings(model)


def reference_in_force(module: "WeightedModule") -> Reference | None:
    """Where the reference, which is the initial model, comes from; None where the weighting needs none."""
    needed = {"ref_logp", REF_DISTRIBUTION} & module.weighting.needs
    if not needed or module.reference != "auto":
        return module.reference if needed else None
    is_initial_without = module.adapter != "continue" and module.resize_embeddings is False
    if module.lora is not None and is_initial_without:
        return "adapter_off"
    return "copy" if REF_DISTRIBUTION in needed else "cache"


def agreed(folder: AdapterFolder, given: LoRA | None) -> LoRA:
    """The settings with which the adapter is trained further: its own, and no others.

    "all-linear" stands for the list of layers that it was once resolved to; see `refuse_other_layers`.

    Raises:
        UserError: `given` names others.
    """
    own = folder.lora("auto" if given is None else given.dtype)
    for field in fields(LoRA) if given is not None else ():
        asked, has = getattr(given, field.name), getattr(own, field.name)
        if field.name == "target_modules" and asked == "all-linear":
            continue
        if _plain(asked) != _plain(has):
            raise UserError(
                f"model.lora.{field.name} is {asked!r}, but the adapter {folder.name!r}, which model.adapter continue "
                f"trains further, has {has!r}: leave model.lora out (its settings come from the adapter), or take "
                "model.adapter merge, which trains a new adapter on the merged model"
            )
    return own


def refuse_other_layers(folder: AdapterFolder, adapted: Any, wanted: set[str]) -> None:
    """Refuse an adapter that leaves out layers which "all-linear" stands for, where that was asked for."""
    without = sorted(wanted - {name for name, _ in adapted_layers(adapted.get_base_model())})
    if without:
        raise UserError(
            f"model.lora.target_modules is 'all-linear', but the adapter {folder.name!r}, which model.adapter "
            f"continue trains further, leaves {without[0]} alone: leave model.lora out (its settings come from the "
            "adapter), or take model.adapter merge, which trains a new adapter on the merged model"
        )


def _plain(value: Any) -> Any:
    """For comparison: the order of names does not count, and nothing given is nothing, however it is written."""
    return sorted(value, key=str) if isinstance(value, list | tuple | set) else value or None
