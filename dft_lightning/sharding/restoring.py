"""A checkpoint's state into sharded modules and optimizers: each rank takes its part, of a file or of a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dft_lightning.checkpointing import folder
from dft_lightning.errors import UserError
from dft_lightning.sharding.layers import let_go
from dft_lightning.sharding.tensors import like, state_of


@torch.no_grad()
def take_over(network: nn.Module, state: Mapping[str, Any], strict: bool) -> None:
    """Load a whole state, alike on all ranks, into a network with sharded parts."""
    let_go(network)
    own = network.state_dict()
    dealt = {name: like(own[name], value) if name in own else value for name, value in state.items()}
    network.load_state_dict(dealt, strict=strict)


@torch.no_grad()
def fill_module(network: nn.Module, shapes: Mapping[str, Tensor], path: Path) -> None:
    """Load a state out of a folder, in place.

    Args:
        shapes: of the folder's tensors, by the names of the network's state.

    Raises:
        UserError: the network has other names or shapes.
    """
    let_go(network)
    own = state_of(network, keep=None)
    theirs, ours = ({name: tuple(value.shape) for name, value in state.items()} for state in (shapes, own))
    if different := sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)):
        raise UserError(
            f"{path} is of another model: {different[0]} is {theirs.get(different[0], 'not there')}, expected "
            f"{ours.get(different[0], 'not')} (and {len(different) - 1} more)"
        )
    names = {id(shape): name for name, shape in shapes.items()}
    stored = folder.tensors_of({"state_dict": shapes})
    folder.fill(path, {name: own[names[id(shape)]] for name, shape in stored.items()})


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any], number: int, path: Path | None) -> None:
    """Load a state whose tensors are whole, or shapes of those in a folder.

    Args:
        number: which of the run's optimizers it is.
        path: the folder.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    own = {
        index: {name: _dealt(parameters[index], value, path is None) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    if path is not None:
        states: list[Mapping[str, Any]] = [{"state": {}}] * number + [{"state": own}]
        folder.fill(path, folder.tensors_of({"state_dict": {}, "optimizer_states": states}))
    optimizer.load_state_dict({"state": own, "param_groups": state["param_groups"]})


def _dealt(parameter: nn.Parameter, value: Any, is_whole: bool) -> Any:
    """This rank's part of a value of a parameter's state; room for it, where the value is a shape alone."""
    if not isinstance(value, Tensor):
        return value
    belongs = value.shape == parameter.shape
    if is_whole:
        return like(parameter, value) if belongs else value
    return torch.zeros_like(parameter, dtype=value.dtype) if belongs else torch.zeros_like(value, device="cpu")
