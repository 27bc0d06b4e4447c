"""Activation checkpointing of a decoder's layers: what the backward pass recomputes in place of keeping it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dft_lightning.decoder import layers_of
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


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether an operator changes in place what "selective" keeps: the backward pass would change it again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: dict[int, Any] = {}  # storages stay alive, so that no other gets their address
        self.changed = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given, declared in zip(args, func._schema.arguments, strict=False):
            written = declared.alias_info is not None and declared.alias_info.is_write
            if written and isinstance(given, Tensor) and given.untyped_storage()._cdata in self.kept:
                self.changed = str(func)
        made = func(*args, **(kwargs or {}))
        if keeps(func):
            for tensor in made if isinstance(made, tuple | list) else (made,):
                if isinstance(tensor, Tensor):
                    self.kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return made


@torch.no_grad()
def changes_products(run: Callable[[], Any]) -> str:
    """The operator by which a forward pass changes in place a product that "selective" keeps; "" if there is none."""
    with _Watch() as watch:
        run()
    return str(watch.changed)


def refuse_selective(decoder: nn.Module, operator: str) -> None:
    """Refuse "selective" on a decoder of which `changes_products` names an operator."""
    if operator:
        raise UserError(
            f"model.activation_checkpointing is selective, but {type(decoder).__name__} changes products in place "
            f"({operator}), which the backward pass would use changed twice: set it to full or none"
        )


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
