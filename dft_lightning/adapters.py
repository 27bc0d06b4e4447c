"""Low-rank adapters by peft: plain, rank-stabilised, and with magnitudes of their own (DoRA)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from dft_lightning.adapter_names import of_adapter
from dft_lightning.errors import UserError
from dft_lightning.lora_targets import ALL_LINEAR, choose, covered, report
from dft_lightning.quantization import weight_of

AdapterDtype = Literal["auto", "float64", "float32", "bfloat16", "float16"]


@dataclass
class LoRA:
    """Low-rank adapters by peft; the defaults are those of the DFT paper's LoRA runs (arXiv 2508.05629).

    Args:
        rank: rank of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: dropout on the adapters' input.
        target_modules: names of the layers to adapt; "all-linear" means every linear layer except the output head and
            those that cannot be adapted. What has an adapter, and what has none and why, is reported at the start.
        rslora: scale by alpha / √rank, so that an update does not shrink as its rank grows (arXiv 2312.03732).
        dora: learn each row's length beside its direction (arXiv 2402.09353); slower, as it needs the length of all
            rows of weight and update in every pass.
        modules_to_save: names of modules of which a copy is trained in full and stored with the adapter, such as
            embed_tokens, lm_head or norm. As in peft, a name stands for every module whose name ends with it.
        dtype: precision in which the adapters (and the copies of modules_to_save) are stored and trained, whatever that
            of the base model; auto is float32, or float64 for a base model in float64.
        rank_pattern: other ranks for some layers, by name or regular expression.
        alpha_pattern: other alphas for some layers, by name or regular expression.
        layers_to_transform: indices of the decoder layers to adapt; by default all.
        exclude_modules: names of layers that are not adapted though target_modules names them.
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    rslora: bool = False
    dora: bool = False
    modules_to_save: list[str] | None = None
    dtype: AdapterDtype = "auto"
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, int] | None = None
    layers_to_transform: list[int] | None = None
    exclude_modules: str | list[str] | None = None


def described(lora: LoRA) -> str:
    """The settings in one line; a long list of layers by the last part of their names."""
    given = {name: value for name, value in vars(lora).items() if value not in (None, False, "auto")}
    layers = given["target_modules"]
    if not isinstance(layers, str) and len(layers) > 8:
        given["target_modules"] = f"{sorted({name.rpartition('.')[2] for name in layers})} ({len(layers)} layers)"
    return "LoRA, " + ", ".join(f"{name} {value}" for name, value in given.items())


def _adapting(lora: LoRA) -> Callable[[Any, str | list[str]], Any]:
    """What adds adapters to a model, given the names of the layers.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("LoRA needs peft: install it with pip install 'dft-lightning[peft]'") from error

    def adapt(model: Any, target_modules: str | list[str]) -> Any:
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=target_modules,
            use_rslora=lora.rslora,
            use_dora=lora.dora,
            modules_to_save=lora.modules_to_save,
            rank_pattern=lora.rank_pattern or {},
            alpha_pattern=lora.alpha_pattern or {},
            layers_to_transform=lora.layers_to_transform,
            exclude_modules=lora.exclude_modules,
            task_type="CAUSAL_LM",
        )
        with _float32_by_default():
            return get_peft_model(model, config)

    return adapt


def all_linear(model: Any, lora: LoRA) -> set[str]:
    """The names of the layers that "all-linear" stands for in a model without adapters (a `PreTrainedModel`)."""
    lora = replace(lora, target_modules=ALL_LINEAR)
    return covered(model, choose(model, ALL_LINEAR, _adapting(lora), repr(lora)))


def add_lora(model: Any, lora: LoRA, *, of: str | None = None) -> Any:
    """The model with adapters to train and everything else frozen (a `peft.PeftModel`).

    The adapters' first values do not depend on the precision of the model.

    Args:
        of: the adapter folder that the settings come from; None where the user gives them.

    Raises:
        UserError: peft is not installed, or the model cannot be adapted like this.
    """
    adapt = _adapting(lora)
    tied, choice = _is_tied(model), choose(model, lora.target_modules, adapt, repr(lora))
    try:
        adapted = adapt(model, choice.modules)
    except (ValueError, TypeError) as error:
        options = "--model.lora.target_modules and --model.lora.modules_to_save" if of is None else f"the adapter {of}"
        raise UserError(f"LoRA cannot be added: {error} — see {options}") from error
    _refuse_full_copies(adapted, lora)
    _refuse_tied(adapted, tied, of)
    adapted.lora_targets = report(adapted, choice)
    _store_in(adapted, lora.dtype)
    begin_at_the_model(adapted)
    return adapted


def merged(adapted: Any) -> Any:
    """The model with its adapters merged into the weights, in the base model's precision, all of them trainable."""
    base = adapted.get_base_model()
    dtype = base.dtype
    model = adapted.merge_and_unload()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(True)
    if hasattr(model, "peft_config"):  # of older versions of peft: another adapter would be taken for a second one
        del model.peft_config
    return model


def adapter_dtype(choice: AdapterDtype, weights: torch.dtype) -> torch.dtype:
    """In what adapters of a model with such weights are stored and trained."""
    if choice != "auto":
        found: torch.dtype = getattr(torch, choice)
        return found
    return torch.promote_types(weights, torch.float32)


def _is_tied(model: Any) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", head)


def _full_copies(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The wrappers around modules of which a copy is trained in full, by name."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict) and hasattr(module, "original_module"):
            yield name, module


def _refuse_full_copies(adapted: Any, lora: LoRA) -> None:
    """Refuse names that stand for nothing (peft would pass over them), or for what cannot be trained."""
    copies = dict(_full_copies(adapted))
    for wanted in lora.modules_to_save or []:
        if not any(name.endswith(wanted) for name in copies):
            raise UserError(
                f"model.lora.modules_to_save has {wanted!r}, but no module of "
                f"{type(adapted.get_base_model()).__name__} has a name that ends with it: "
                "give names such as embed_tokens, lm_head or norm, or leave it out"
            )
    for name, module in copies.items():
        if not all(parameter.is_floating_point() for parameter in module.parameters()):
            raise UserError(
                f"model.lora.modules_to_save names {name}, which model.quantization holds in 4 bits, where it cannot "
                "be trained in full: leave it out of modules_to_save, or leave model.quantization out"
            )


def _refuse_tied(adapted: Any, tied: bool, of: str | None) -> None:
    """Refuse to adapt one of two modules that share their weight: the merged weight could only be right for one."""
    base = adapted.get_base_model()
    changed = {
        kind: module
        for kind, module in (("embedding", base.get_input_embeddings()), ("head", base.get_output_embeddings()))
        if hasattr(module, "base_layer") or hasattr(module, "original_module")
    }
    if not tied or not changed:
        return
    modules = [name.rpartition(".")[2] for name, module in adapted.named_modules() if module in changed.values()]
    names = " and ".join(modules)
    advice = f"leave {names} out of --model.lora.target_modules and --model.lora.modules_to_save"
    whose = "LoRA" if of is None else f"the adapter {of}"
    raise UserError(
        f"{whose} changes {names}, but the output head of {type(base).__name__} "
        "shares its weight with the embedding (tie_word_embeddings), so that the adapter could not be merged exactly: "
        + (advice if of is None else f"train from an adapter that does not change {names}")
    )


@contextmanager
def _float32_by_default() -> Iterator[None]:
    """peft draws adapters in torch's default precision, which a half-precision run changes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _store_in(adapted: Any, choice: AdapterDtype) -> None:
    """Cast the adapters; modules that are trained in full take and give what the modules around them do."""
    weights = adapted.get_base_model().dtype
    dtype = adapter_dtype(choice, weights)
    for name, parameter in adapted.named_parameters():
        if of_adapter(name) and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for _, module in _full_copies(adapted):
        module.register_forward_pre_hook(_given_as_its_weights, with_kwargs=True)
        module.register_forward_hook(_returned_as_the_originals)


def _given_as_its_weights(module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    own, around = _dtypes(module)
    if own == around:
        return args, kwargs
    cast: Any = tree_map_only(torch.Tensor, lambda x: x.to(own) if x.is_floating_point() else x, (args, kwargs))
    return cast[0], cast[1]


def _returned_as_the_originals(module: Any, _args: Any, output: Any) -> Any:
    own, around = _dtypes(module)
    if own == around:
        return output
    return tree_map_only(torch.Tensor, lambda x: x.to(around) if x.is_floating_point() else x, output)


def _dtypes(module: Any) -> tuple[torch.dtype, torch.dtype]:
    """Of the copy in force, and of the module that it is a copy of."""
    around = next(module.original_module.parameters()).dtype
    return next(in_force(module).parameters()).dtype, around


def in_force(module: Any) -> Any:
    """What computes: of a module of which a copy is trained in full, that copy, or the original with adapters off."""
    if not hasattr(module, "original_module") or not hasattr(module, "modules_to_save"):
        return module
    if module.disable_adapters or not module.active_adapters:
        return module.original_module
    return module.modules_to_save[module.active_adapters[0]]


def prepare_adapters(model: nn.Module, *, initial: bool) -> None:
    """What adapters need before a fit on the device where they are by now; `initial` if nothing is learnt yet.

    Raises:
        UserError: DoRA on sharded weights, whose rows are gathered in another precision than they are held in.
    """
    if any(isinstance(magnitude.weight, DTensor) for _, _, magnitude in _magnitudes(model)):
        refuse_sharded(LoRA(dora=True))
    if initial:
        begin_at_the_model(model)


def refuse_sharded(lora: LoRA | None) -> None:
    """Refuse adapters that cannot be exact on a sharded model."""
    if lora is not None and lora.dora:
        raise UserError(
            "model.lora.dora is true, but the model is sharded, where DoRA would not begin as the model it adapts: "
            "set model.lora.dora false, or trainer.strategy ddp"
        )


@torch.no_grad()
def begin_at_the_model(model: nn.Module) -> None:
    """Set DoRA's magnitudes to the lengths of the weights' rows as the forward pass will find them.

    DoRA multiplies by magnitude / length. That is exactly 1 while nothing is learnt only if both were computed alike:
    peft computes the magnitudes of a bfloat16 model in bfloat16 and the lengths in its adapters' float32, 0.2 % apart,
    and another device adds up in another order. The adapter on and off are then not the same model at the start, and
    nothing that compares the two weighs a token with 1. Only for a model that has not learnt yet.
    """
    for layer, name, magnitude in _magnitudes(model):
        factor = layer.lora_A[name].weight if name in layer.lora_A else layer.lora_embedding_A[name]
        weight = weight_of(layer.get_base_layer()).to(factor.dtype)
        lengths = magnitude.get_weight_norm(weight, weight.new_zeros(()), 1.0)  # an embedding's is transposed
        magnitude.weight.copy_(lengths)


def _magnitudes(model: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """Each adapted layer, its adapter's name, and DoRA's part of it."""
    for layer in model.modules():
        held = getattr(layer, "lora_magnitude_vector", None)
        if isinstance(held, nn.ModuleDict):
            yield from ((layer, name, magnitude) for name, magnitude in held.items())
