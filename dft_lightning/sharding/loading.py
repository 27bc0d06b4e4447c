"""A sharded model of which one rank reads the weights: all others begin with none, and are sent their parts.

One rank of the whole run, not one a node: in all the hosts' memory there is one copy, and the file system is read once,
for the price of sending every node each weight over the network, a tensor at a time.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from dft_lightning.errors import UserError
from dft_lightning.models import WeightedLM

#: The rank that reads.
_READER = 0


def load(build: Callable[[bool], WeightedLM], shard: Callable[[WeightedLM], None], device: torch.device) -> WeightedLM:
    """The network, dealt over the ranks.

    Args:
        build: the network on the host; with True its shape alone, on the meta device.
        shard: deals out the parameters of a network.

    Raises:
        UserError: on all ranks, where the one that reads cannot.
    """
    network = build(True)
    shard(network)
    network.to_empty(device=device)
    network.base.tie_weights()
    read = _read(build)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(network, {} if read is None else dict(read.state_dict()), options=options)
    _send_buffers(network, read)
    network.base.generation_config = _sent(None if read is None else read.base.generation_config)
    return network


def _read(build: Callable[[bool], WeightedLM]) -> WeightedLM | None:
    """The whole network on the rank that reads; nothing on others. They wait for it, and for its error."""
    network, failure = None, ""
    if dist.get_rank() == _READER:
        try:
            network = build(False)
        except UserError as error:
            failure = str(error)
        except Exception as error:  # the others would wait for what has failed
            failure = f"rank {_READER} could not load the model: {type(error).__name__}: {error}"
    if failure := _sent(failure):
        raise UserError(failure)
    return network


def _sent(value: Any) -> Any:
    """The reader's value, on all ranks."""
    held = [value]
    dist.broadcast_object_list(held, _READER)
    return held[0]


def _send_buffers(network: nn.Module, read: nn.Module | None) -> None:
    """Those too that no state has: rotary frequencies are computed where the model is built, and not on meta."""
    known: dict[str, Tensor] = {} if read is None else dict(read.named_buffers())
    for name, buffer in network.named_buffers():
        if read is not None:
            buffer.copy_(known[name])
        dist.broadcast(buffer, _READER)
