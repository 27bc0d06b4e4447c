"""`torch.compile` of a decoder's layers, one by one, for batches that all have one shape.

All layers share what is compiled, so that it takes seconds and not minutes. Only the pass that makes gradients is
compiled: validation has other shapes. The loss and the embedding stay outside.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from dft_lightning.decoder import layers_of
from dft_lightning.errors import UserError
from dft_lightning.weighting import Uniform

if TYPE_CHECKING:
    from dft_lightning.data.batch import Batch
    from dft_lightning.models import WeightedLM

#: No shape may become a variable, and dropout draws what it draws without compilation.
_OPTIONS: dict[str, Any] = {"dynamic": False, "fullgraph": True, "options": {"fallback_random": True}}


def refuse_changing_shapes(data: Any) -> None:
    """Batches of one shape come from a `ChatDataModule` that packs rows."""
    packing = getattr(getattr(data, "options", None), "packing", None)
    if packing is not True:
        raise UserError(
            f"model.compile needs batches of one shape, and data.packing is {packing}: set --data.packing true"
        )


def compile_layers(decoder: nn.Module) -> None:
    """Let each layer of a transformers decoder run compiled while it trains; call `rehearse` before the first step.

    What was compiled for an earlier model of this process is forgotten: layers of all models share one function, whose
    variants torch limits to eight.
    """
    torch.compiler.reset()
    for layer in layers_of(decoder):
        layer.forward = _Chosen(layer, layer.forward).run


class _Chosen:
    """A layer's forward, compiled while it trains. A deep copy of the layer has one of its own, not the original's."""

    def __init__(self, layer: nn.Module, plain: Callable[..., Any]) -> None:
        self.layer, self.plain = layer, plain
        self.compiled = torch.compile(plain, **_OPTIONS)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        chosen = self.compiled if self.layer.training and torch.is_grad_enabled() else self.plain
        return chosen(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Chosen":
        return _Chosen(copy.deepcopy(self.layer, memo), copy.deepcopy(self.plain, memo))


def rehearse(network: "WeightedLM", batch: "Batch", precision: AbstractContextManager[Any]) -> None:
    """Compile forward and backward for batches of this shape; leaves no gradient behind.

    Raises:
        UserError: the model's layers cannot be compiled here.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        with torch.enable_grad(), precision:
            loss, _ = network(batch, Uniform())
        if isinstance(network, FSDPModule):  # its parameters are not those of the graph
            loss.backward()
            network.zero_grad()
        else:
            torch.autograd.grad(loss, parameters, allow_unused=True)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # dynamo, inductor and the compilers below them share no class of error
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model.compile: the layers of {type(network.base).__name__} cannot be compiled here: {reason} — set "
            "--model.compile false"
        ) from error
