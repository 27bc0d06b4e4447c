"""A frozen base model in 4 bits under adapters in full precision (QLoRA), by bitsandbytes.

The weights of all linear layers but the head become one of 16 numbers each ("NormalFloat", nf4), times a scale that 64
of them share; the scales are held in 8 bits ("double quantization"): 4.13 bits a weight in all. Dettmers, Pagnoni,
Holtzman, Zettlemoyer, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, section 3. Products are
computed in the run's precision, with the weights as they are read out of those 4 bits.

A checkpoint leaves this base out: it is read again, and is the same then, as the name of the model still stands for the
same weights: their sha256 is kept, and compared.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from dft_lightning.adapter_names import of_adapter
from dft_lightning.errors import UserError

Quantization = Literal["nf4"]

#: Weights that share a scale. A row has to be a multiple of it: on a CPU, a scale that goes over the end of a row is
#: read out wrongly (bitsandbytes 0.50).
BLOCK = 64
_EXTRA = "pip install 'dft-lightning[qlora]'"


def loading_options(quantization: Quantization, compute: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is to be told.

    On the CPU whatever the device, so that export and restart find the same 4 bits elsewhere.

    Raises:
        UserError: bitsandbytes is not there, or does not know the precision.
    """
    from transformers import BitsAndBytesConfig, utils

    if not utils.is_bitsandbytes_available():  # type: ignore[attr-defined]
        raise UserError(f"model.quantization {quantization} needs bitsandbytes: install it with {_EXTRA}")
    if compute not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(
            f"model.quantization is {quantization}, which bitsandbytes computes in 16 or 32 bits, not in {compute}: "
            "set trainer.precision to bf16-true, bf16-mixed or 32-true, and leave model.dtype out"
        )
    make: Any = BitsAndBytesConfig
    how = make(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": how, "device_map": {"": "cpu"}}


def make_exact(model: Any) -> None:
    """Have each layer compute alike in training and in evaluation, and refuse those that it would compute wrongly.

    On some CPUs bitsandbytes computes in bfloat16 whatever the precision once a layer is evaluated, and lets no
    gradient through from then on.
    """
    for name, layer in quantized_layers(model):
        layer.support_avx512bf16_for_cpu = False
        if layer.in_features % BLOCK:
            raise UserError(
                f"model.quantization: rows of {name} have {layer.in_features} weights, expected a multiple of {BLOCK}, "
                "which share a scale: leave it out for this model"
            )


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The linear layers that are held in 4 bits, by name."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and getattr(layer.weight, "quant_state", None) is not None:
            yield name, layer


def numbers(model: nn.Module) -> int:
    """How many numbers the parameters of a model stand for; in 4 bits two are in one byte."""
    packed = {id(layer.weight): layer.in_features * layer.out_features for _, layer in quantized_layers(model)}
    return sum(packed.get(id(parameter), parameter.numel()) for parameter in model.parameters())


def weight_of(layer: Any) -> torch.Tensor:
    """A linear layer's weight (out, in), as its products see it."""
    if getattr(layer.weight, "quant_state", None) is None:
        weight: torch.Tensor = layer.weight
        return weight
    from bitsandbytes.functional import dequantize_4bit

    found: torch.Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return found


def read_out(model: Any) -> Any:
    """The model with plain layers of the very weights that its 4 bits stand for; changed in place."""
    for name, layer in [*quantized_layers(model)]:
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(weight_of(layer), requires_grad=False), layer.bias
        model.set_submodule(name, plain)
    model.hf_quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = False
    return model


def leave_out_of_states(network: nn.Module) -> None:
    """Let the state of the network be that of its adapters alone, and a base that a state has not got stay as it is."""

    def without(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        for name in [name for name in state if name.startswith(prefix) and not of_adapter(name)]:
            del state[name]

    def not_missed(_: nn.Module, found: Any) -> None:
        found.missing_keys[:] = [name for name in found.missing_keys if of_adapter(name)]

    hooked: Any = network
    hooked.register_state_dict_post_hook(without)
    hooked.register_load_state_dict_post_hook(not_missed)
