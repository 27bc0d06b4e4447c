"""Tensors of which each rank holds a part, and plain ones: looked at and changed alike."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all ranks, which all have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor) -> Tensor:
    """What this rank holds of it: shares memory, and may be empty."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def parts_of_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """This rank's part of each gradient there is."""
    return [part(parameter.grad) for parameter in parameters if parameter.grad is not None]


def like(tensor: Tensor, found: Tensor) -> Tensor:
    """`found`, which is whole and the same on all ranks, dealt out as `tensor` is."""
    if not isinstance(tensor, DTensor):
        return found
    mesh = tensor.device_mesh
    return distribute_tensor(found.to(mesh.device_type), mesh, tensor.placements, src_data_rank=None)


def common_norm(tensors: list[Tensor]) -> Tensor:
    """Their common L2 norm, (), in at least float32 whatever their own precision, over the parts of all ranks."""
    if not tensors:
        return torch.zeros(())
    dealt = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    own = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    if not dealt:
        return _norm(own)
    squares = _norm([tensor.to_local() for tensor in dealt]).double().square()
    together = _added_up(squares, dealt[0]) + (_norm(own).double().square() if own else 0.0)
    return together.sqrt().to(torch.promote_types(tensors[0].dtype, torch.float32))


def _norm(tensors: list[Tensor]) -> Tensor:
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2.0, dtype=wide)))
    return norm


def _added_up(value: Tensor, example: DTensor) -> Tensor:
    """The sum of a scalar over the ranks that share tensors like this one; copies of a part are counted once."""
    placements = [Partial("sum") if placement.is_shard() else Replicate() for placement in example.placements]
    return DTensor.from_local(value, example.device_mesh, placements, run_check=False).full_tensor()


def state_of(module: nn.Module, keep: bool | None) -> dict[str, Any]:
    """The module's state, gathered (see `gathered`); with None this rank's part, in the memory that it has.

    A tensor that has two names is one under both.
    """
    found: dict[str, Any] = {}
    known: dict[int, Any] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if id(value) not in known:
            known[id(value)] = value.detach() if keep is None else gathered(value, keep)
        found[name] = known[id(value)]
    return found


def gathered(state: Any, keep: bool) -> Any:
    """A nested state with its tensors whole and on the host; all ranks have to ask, and without `keep` get None.

    One tensor after another, so that no device holds more than one that is whole.
    """
    if isinstance(state, Tensor):
        found = whole(state.detach())
        return found.cpu() if keep else None
    if isinstance(state, dict):
        return {key: gathered(value, keep) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gathered(value, keep) for value in state)
    return state
