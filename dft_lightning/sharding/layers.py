"""Which parts of a model are gathered together: each decoder layer, and all else with the root."""

from itertools import chain
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from dft_lightning.decoder import layers_of, refuse_shared
from dft_lightning.models import WeightedLM

#: What runs the model beside `forward`, and wants its weights gathered as well.
_RUN_THE_MODEL = (
    *("logp", "reference", "own_loss"),
    *("check_borders", "check_adapters", "check_recomputation", "packs_with"),
)


def shard(network: WeightedLM, mesh: DeviceMesh, compute: torch.dtype | None, prefetch: int) -> None:
    """Deal the parameters of a network over the ranks of a mesh, in place.

    Embedding, last norm and output head stay gathered from the root's forward to the end of its backward, so that the
    loss has a plain head weight in all its chunks, and a tied one is one parameter of one group.

    Args:
        compute: in what the layers compute; gradients are then reduced in float32. None: as the weights are held.
        prefetch: layers that are gathered ahead of the one that computes.
    """
    # inputs are not cast: beside hidden states, which are in `compute` by then, there are float32 statistics
    policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=None if compute is None else torch.float32, cast_forward_inputs=False
    )
    refuse_shared(network.decoder)
    layers = layers_of(network.decoder)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for name in _RUN_THE_MODEL:
        register_fsdp_forward_method(network, name)
    if prefetch > 1:  # one is what it does by itself
        _look_ahead(layers, prefetch)
        _look_ahead(layers[::-1], prefetch, backward=True)


def _look_ahead(layers: list[nn.Module], prefetch: int, *, backward: bool = False) -> None:
    for index, layer in enumerate(layers):
        assert isinstance(layer, FSDPModule)
        following = cast(list[FSDPModule], layers[index + 1 : index + 1 + prefetch])
        if backward:
            layer.set_modules_to_backward_prefetch(following)
        else:
            layer.set_modules_to_forward_prefetch(following)


def reduce_each_time(network: nn.Module | None, reduce: bool) -> None:
    """Whether the next backward pass sums gradients over the ranks, or adds them to what waits on this rank."""
    assert isinstance(network, FSDPModule)
    network.set_requires_gradient_sync(reduce)
    network.set_is_last_backward(reduce)


def let_go(*networks: nn.Module, around: bool = False) -> None:
    """Forget what is gathered: it is about to change, or is not wanted any more.

    Args:
        around: only what is around the layers, which let go of themselves after each forward pass.
    """
    for module in networks if around else chain.from_iterable(network.modules() for network in networks):
        if isinstance(module, FSDPModule):
            module.reshard()
