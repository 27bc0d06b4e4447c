"""Activation checkpointing of a decoder's layers: what the backward pass recomputes in place of keeping it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dft_lightning.errors import UserError

Recomputation = Literal["none", "selective", "full"]
"""What is computed a second time, in the backward pass.

"none": nothing. "selective": all of a layer but its matrix products and attention (norms, rotary positions, activation
functions, casts: cheap to compute, and most of the memory). "full": each whole layer, of which only its input is kept.
"""

#: Words in the names of operators whose results "selective" keeps.
_KEPT = (
    *("::mm", "::addmm", "::bmm", "::baddbmm", "::linear"),
    *("scaled_dot_product", "flash_attn", "flash_attention", "varlen_attn", "efficient_attention"),
)


def recompute(decoder: nn.Module, kind: Recomputation) -> None:
    """Let each layer of a transformers decoder recompute by `kind` while it trains.

    Gradients are those without it, to the bit; dropout is the same in both computations.

    Raises:
        UserError: the decoder has no list of layers.
    """
    if kind == "none":
        return
    options: dict[str, Any] = {} if kind == "full" else {"context_fn": _selective}
    for layer in layers_of(decoder):
        layer.forward = _Checkpointed(layer, layer.forward, options).run


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    """The decoder's layers, which all transformers decoders of Llama's kind have under one name.

    Raises:
        UserError: there are none.
    """
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(
            f"{type(decoder).__name__} has no list of layers: set model.activation_checkpointing to none, "
            "model.compile to false, and trainer.strategy to another than fsdp2"
        )
    return list(layers)


@dataclass
class _Checkpointed:
    """A layer's forward that recomputes. No closure: a deep copy of the layer has one of its own."""

    layer: nn.Module
    forward: Callable[..., Any]
    options: dict[str, Any]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.layer.training and torch.is_grad_enabled()):
            return self.forward(*args, **kwargs)
        return checkpoint(partial(self.forward, **kwargs), *args, use_reentrant=False, **self.options)


def _selective() -> Any:
    return cast(Any, create_selective_checkpoint_contexts)(_policy)


def _policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keeps(operator) else CheckpointPolicy.PREFER_RECOMPUTE


def keeps(operator: Any) -> bool:
    """Whether "selective" keeps an operator's results (beside autograd's saved tensors, in a store of its own)."""
    name = str(getattr(operator, "_schema", operator)).partition("(")[0]
    return any(word in name for word in _KEPT)
