"""Layers in 4 bits as bitsandbytes holds and multiplies them, in shapes; it need not be there for a plan."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dft_lightning.adapters import LoRA
from dft_lightning.errors import UserError
from dft_lightning.quantization import BLOCK

_SCALES_A_SCALE = 256


class PackedLinear(nn.Linear):
    """Two weights a byte, a byte a scale, and a float32 a scale of scales; weights are read out for each product.

    Args:
        plain: the layer in whole precision.
        compute: in what products are computed.
    """

    def __init__(self, plain: nn.Linear, compute: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.compute = plain.in_features, plain.out_features, compute
        scales = math.ceil(plain.weight.numel() / BLOCK)
        self.weight = _bytes(math.ceil(plain.weight.numel() / 2), 1)
        self.scales, self.bias = _bytes(scales), plain.bias
        self.scales_of_scales = _frozen(torch.empty(math.ceil(scales / _SCALES_A_SCALE), device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out)."""
        bias = None if self.bias is None else self.bias.to(self.compute)
        shape = self.out_features, self.in_features
        made: Tensor = _Product.apply(x.to(self.compute), shape, len(self.scales), bias)  # type: ignore[no-untyped-call]
        return made.to(x.dtype)


class _Product(torch.autograd.Function):
    """Keeps nothing for the backward pass, which reads the weights out once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], scales: int, bias: Tensor | None) -> Tensor:
        ctx.shape, ctx.scales = shape, scales
        return nn.functional.linear(x, _read_out(x, shape, scales), bias)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return upstream @ _read_out(upstream, ctx.shape, ctx.scales), None, None, None


def _read_out(like: Tensor, shape: tuple[int, int], scales: int) -> Tensor:
    _ = like.new_empty(scales, dtype=torch.float32)
    return like.new_empty(shape)


def pack(model: Any, compute: torch.dtype) -> None:
    """Put such layers in place of all linear ones of a model on the meta device but its head."""
    head = model.get_output_embeddings()
    plain = [(name, layer) for name, layer in model.named_modules() if type(layer) is nn.Linear and layer is not head]
    for name, layer in plain:
        model.set_submodule(name, PackedLinear(layer, compute))


def refuse_dora(lora: LoRA | None) -> None:
    """DoRA's passes read the weights out in another way."""
    if lora is not None and lora.dora:
        raise UserError(
            "model.lora.dora is true and model.quantization is set, whose memory together is not foreseen: set "
            "model.activation_checkpointing to none, selective or full for a fit, and plan without dora"
        )


def _bytes(*shape: int) -> nn.Parameter:
    return _frozen(torch.empty(shape, dtype=torch.uint8, device="meta"))


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
