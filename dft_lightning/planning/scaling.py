"""What sharded training holds on a device, by arithmetic on a model's real shapes.

Fully sharded data parallelism as torch's `fully_shard` does it: every decoder layer is one group, all else another. A
device holds a share of each weight's rows, with gradient and optimizer state. Before a layer runs, forward and
backward, its weights are gathered from all; after its backward pass the gradients are summed and each device keeps its
share. Hybrid sharding does that within groups, and sums the shares between them.

Words: D devices in nodes of 8; S of them share one copy of the states, D/S copies there are.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from dft_lightning.planning.rehearsal import MicroBatch, Setting, rehearse

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """The shapes of a model's weights by sharding group.

    Args:
        layer: of each decoder layer.
        rest: embedding, last norm and head; a tied head is not there a second time.
        layers: how many there are.
    """

    layer: tuple[Shape, ...]
    rest: tuple[Shape, ...]
    layers: int

    @property
    def total(self) -> int:
        """Numbers in all weights."""
        return self.layers * numbers(self.layer) + numbers(self.rest)


def numbers(shapes: Iterable[Shape]) -> int:
    """How many numbers tensors of such shapes have."""
    return sum(math.prod(shape) for shape in shapes)


def weights_of(config: Any) -> Weights:
    """The shapes of a transformers model whose layers are all alike, by its own code on the meta device.

    Raises:
        ValueError: its layers differ.
    """
    from transformers import AutoModelForCausalLM

    made: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = made.from_config(copy.deepcopy(config))
    layers = [tuple(layer.parameters()) for layer in model.get_decoder().layers]
    kinds = {tuple(tuple(parameter.shape) for parameter in layer) for layer in layers}
    if len(kinds) != 1:
        raise ValueError(f"expected layers that are all alike, got {len(kinds)} kinds of them")
    inside = {id(parameter) for layer in layers for parameter in layer}
    rest = tuple(tuple(p.shape) for p in model.parameters() if id(p) not in inside)
    return Weights(kinds.pop(), rest, len(layers))


@dataclass(frozen=True)
class Precision:
    """Bytes a number: as held, as gathered, as summed over devices; and of both Adam moments together."""

    name: str
    held: int
    gathered: int
    summed: int
    moments: int


MASTERS = Precision("float32 masters, bfloat16 products", held=4, gathered=2, summed=4, moments=8)
PURE = Precision("bfloat16 throughout", held=2, gathered=2, summed=2, moments=4)


@dataclass(frozen=True)
class Mesh:
    """Devices by how they share: `shards` hold one copy of the states, `copies` there are; in nodes of `node`."""

    shards: int
    copies: int = 1
    node: int = 8

    @property
    def devices(self) -> int:
        """Of all nodes."""
        return self.shards * self.copies

    @property
    def nodes(self) -> int:
        """That the devices of one copy of the states are in."""
        return math.ceil(self.shards / self.node)


def rows_held(rows: int, shards: int, rank: int = 0) -> int:
    """How many of a weight's rows a rank has: as many as all others, the last ranks fewer or none."""
    each = math.ceil(rows / shards)
    return max(0, min(each, rows - rank * each))


def held(shapes: Iterable[Shape], shards: int, rank: int = 0) -> int:
    """Numbers that a rank holds of weights of such shapes; no rank has more than the first."""
    return sum(rows_held(shape[0], shards, rank) * math.prod(shape[1:]) for shape in shapes)


def gathered(shapes: Iterable[Shape], shards: int) -> int:
    """Numbers in the buffer that a group is gathered into: every rank's share is as large as the first's."""
    return held(shapes, shards) * shards


@dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Args:
        states: its share of weights, gradients and moments.
        whole: weights and gradients that are there in full for a while.
        activations: of a micro-batch.
        beside: what a CUDA context and the allocator's gaps take: an assumption.
    """

    states: int
    whole: int
    activations: int
    beside: int

    @property
    def total(self) -> int:
        """Of all."""
        return self.states + self.whole + self.activations + self.beside


@dataclass(frozen=True)
class Group:
    """Bytes of a group while it is whole.

    Args:
        weights: gathered.
        gradients: of those that are trained.
        sent: the buffer in which gradients are summed over devices.
    """

    weights: int
    gradients: int
    sent: int


def at_once(layer: Group, rest: Group) -> int:
    """Most bytes of weights and gradients that are there in full at one moment.

    What is around the layers stays gathered from the forward pass on. Beside it are two layers, that which runs and the
    next, with their gradients, and what is sent of one; or, at the end of the backward pass, its own gradients and what
    is sent of them.
    """
    around = rest.weights + rest.gradients
    return max(around + 2 * (layer.weights + layer.gradients) + layer.sent, around + rest.sent)


def memory(weights: Weights, mesh: Mesh, precision: Precision, activations: int, beside: int = 3 * 2**29) -> Memory:
    """What a device holds."""
    share = weights.layers * held(weights.layer, mesh.shards) + held(weights.rest, mesh.shards)
    layer, rest = (
        Group(whole * precision.gathered, whole * precision.gathered, whole * precision.summed)
        for whole in (gathered(weights.layer, mesh.shards), gathered(weights.rest, mesh.shards))
    )
    return Memory(share * (2 * precision.held + precision.moments), at_once(layer, rest), activations, beside)


def activations(config: Any, shape: MicroBatch, setting: Setting) -> int:
    """Bytes that a micro-batch holds beside weights and gradients, however many layers there are.

    Each layer adds as much as any other: two and three of them are rehearsed.
    """
    two, three = (rehearse(_with_layers(config, count), None, shape, setting).peak for count in (2, 3))
    layers: int = config.num_hidden_layers
    return two + (three - two) * (layers - 2)


def _with_layers(config: Any, count: int) -> Any:
    """The configuration with another number of layers."""
    given = config.to_dict() | {"num_hidden_layers": count}
    return type(config)(**{name: value for name, value in given.items() if name != "layer_types"})
