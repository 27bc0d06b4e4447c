"""A model's own code run on tensors that have shapes only, on any machine and in no time.

Shapes: S rows of all experts' inputs, E experts, I and O their inputs and outputs.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def shapes_only() -> Iterator[FakeTensorMode]:
    """Tensors made within have no memory, and products of experts take every precision.

    torch knows the shape of a grouped product in bfloat16 alone, although its kernels take others.
    """
    real = {(place, name): getattr(place, name) for place, name in _GROUPED if hasattr(place, name)}
    for place, name in real:
        setattr(place, name, _grouped)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        for (place, name), function in real.items():
            setattr(place, name, function)


_GROUPED: tuple[tuple[Any, str], ...] = ((F, "grouped_mm"), (torch, "_grouped_mm"))


def _grouped(mat_a: Tensor, mat_b: Tensor, offs: Tensor | None = None, **_: Any) -> Tensor:
    """Stands for `grouped_mm` (S, O) of inputs (S, I) and weights (E, I, O)."""
    made: Tensor = _GroupedProduct.apply(mat_a, mat_b)  # type: ignore[no-untyped-call]
    return made


class _GroupedProduct(torch.autograd.Function):
    """Keeps and makes the tensors that the product keeps and makes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        return rows.new_empty(rows.shape[0], weights.shape[-1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        return tuple(torch.empty_like(tensor) if needed else None for tensor, needed in saved)


@torch.no_grad()
def run_in_shapes(model: nn.Module, tokens: int = 4) -> None:
    """The model's forward on so many tokens; its parameters and buffers are not touched."""
    with torch.device("cpu"), shapes_only():  # wherever others are made
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        made: dict[int, Tensor] = {id(tensor): torch.empty(tensor.shape, dtype=tensor.dtype) for _, tensor in named}
        state = {name: made[id(tensor)] for name, tensor in named}
        ids = torch.zeros(1, tokens, dtype=torch.long)
        torch.func.functional_call(model, state, (), {"input_ids": ids, "use_cache": False})


def without_weights(model: Any) -> Any:
    """A copy on the meta device."""
    memo = fleeting(model)
    for module in model.modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and id(tensor) not in memo:
                empty = torch.empty_like(tensor, device="meta")
                wanted = tensor.requires_grad
                memo[id(tensor)] = nn.Parameter(empty, wanted) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def fleeting(model: nn.Module) -> dict[int, Any]:
    """For `deepcopy`: what layers keep of their last pass, as RecurrentGemma's its state, without its graph."""
    kept = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    return {id(value): value.detach() for value in kept if value.grad_fn is not None}
