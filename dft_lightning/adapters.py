"""Low-rank adapters by peft: plain, rank-stabilised, and with magnitudes of their own (DoRA)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dft_lightning.errors import UserError
from dft_lightning.lora_targets import choose, report
from dft_lightning.quantization import weight_of


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
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    rslora: bool = False
    dora: bool = False


def add_lora(model: Any, lora: LoRA) -> Any:
    """The model with adapters to train and everything else frozen (a `peft.PeftModel`)."""
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
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config)

    choice = choose(model, lora.target_modules, adapt, repr(lora))
    try:
        adapted = adapt(model, choice.modules)
    except ValueError as error:
        raise UserError(f"LoRA cannot be added: {error} — see --model.lora.target_modules") from error
    adapted.lora_targets = report(adapted, choice)
    begin_at_the_model(adapted)
    return adapted


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
        factor = layer.lora_A[name].weight
        weight = weight_of(layer.get_base_layer()).to(factor.dtype)
        length = magnitude.get_weight_norm(weight, torch.zeros_like(weight), 1.0)
        magnitude.weight.copy_(length)


def _magnitudes(model: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """Each adapted layer, its adapter's name, and DoRA's part of it."""
    for layer in model.modules():
        held = getattr(layer, "lora_magnitude_vector", None)
        if isinstance(held, nn.ModuleDict):
            yield from ((layer, name, magnitude) for name, magnitude in held.items())
