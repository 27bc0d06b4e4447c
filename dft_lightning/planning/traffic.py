"""What sharded training moves between devices, and how long it takes, by arithmetic on a model's real shapes.

Words: D devices in nodes of 8; S of them share one copy of the states, D/S copies there are; "near" is within a node,
over NVLink, "far" between nodes, over a network adapter that each device has to itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from dft_lightning.planning.scaling import Mesh, Precision, Shape, Weights, gathered, held


@dataclass(frozen=True)
class Traffic:
    """What a collective, or several, bring to a device.

    Args:
        near: bytes that come over NVLink, within the node.
        far: bytes that come over the device's own network adapter.
        steps_near: hops within a node that the last byte waits for.
        steps_far: hops between nodes.
        calls: how many collectives.
    """

    near: float = 0.0
    far: float = 0.0
    steps_near: int = 0
    steps_far: int = 0
    calls: int = 0

    @property
    def total(self) -> float:
        """Bytes that come in, by whichever way."""
        return self.near + self.far

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def times(self, count: int) -> "Traffic":
        """The same so often."""
        return Traffic(*(value * count for value in vars(self).values()))


def ring(size: float, ranks: int, nodes: int) -> Traffic:
    """An all-gather or reduce-scatter of a buffer of so many bytes around rings.

    Each rank gets what it does not have, size·(ranks − 1)/ranks. What a node does not have, size·(nodes − 1)/nodes,
    comes into it once, spread over the adapters of its ranks, and goes round within by NVLink.
    """
    if ranks == 1:
        return Traffic()
    every, far = size * (ranks - 1) / ranks, size * (nodes - 1) / nodes / (ranks / nodes)
    return Traffic(every - far, far, ranks - nodes, nodes - 1, 1)


def moved_by_group(shapes: Iterable[Shape], mesh: Mesh, precision: Precision, gathers: int) -> Traffic:
    """Of one group in a forward and backward pass: weights gathered so often, gradients summed once."""
    whole = gathered(shapes := tuple(shapes), mesh.shards)
    gather = ring(whole * precision.gathered, mesh.shards, mesh.nodes)
    scatter = ring(whole * precision.summed, mesh.shards, mesh.nodes)
    return gather.times(gathers) + scatter


def moved_between_copies(shapes: Iterable[Shape], mesh: Mesh, precision: Precision) -> Traffic:
    """Of one group in a backward pass: the shares of gradients summed over the copies, an all-reduce.

    Copies are in nodes of their own, each device has its partners behind its own adapter; copies within one node have
    them behind NVLink.
    """
    size = held(shapes, mesh.shards) * precision.summed
    within = max(1, min(mesh.copies, mesh.node // mesh.shards))
    return ring(size, mesh.copies, mesh.copies // within).times(2)


def moved(weights: Weights, mesh: Mesh, precision: Precision, micro_batches: int = 1) -> Traffic:
    """What a device gets in an optimizer step.

    In each micro-batch the layers are gathered twice, forward and backward, and what is around them once; gradients are
    summed within the group, and between the copies.
    """
    layer = moved_by_group(weights.layer, mesh, precision, gathers=2).times(weights.layers)
    rest = moved_by_group(weights.rest, mesh, precision, gathers=1)
    between = moved_between_copies(weights.layer, mesh, precision).times(weights.layers)
    between += moved_between_copies(weights.rest, mesh, precision)
    return (layer + rest + between).times(micro_batches)


@dataclass(frozen=True)
class Links:
    """How fast bytes come to a device, and what each hop and each collective costs beside.

    Args:
        near: bytes a second over NVLink.
        far: bytes a second over a device's network adapter.
        hop_near: seconds a hop within a node.
        hop_far: seconds a hop between nodes.
        call: seconds a collective.
    """

    near: float
    far: float
    hop_near: float
    hop_far: float
    call: float

    def seconds(self, traffic: Traffic) -> float:
        """That a traffic takes: both ways are in use at once, the slower one counts."""
        waiting = traffic.steps_near * self.hop_near + traffic.steps_far * self.hop_far + traffic.calls * self.call
        return max(traffic.near / self.near, traffic.far / self.far) + waiting


#: An H200 in a node of 8. NVLink 4 has 900 GB/s by NVIDIA's data sheet, 450 in each direction, of which all-gathers on
#: eight H100s were reported to reach 350 (github.com/NVIDIA/nccl issue 1281). A 400 Gb/s adapter a device has 50 GB/s,
#: of which NCCL's maintainers expect 46 to 48 (github.com/NVIDIA/nccl-tests issue 290). The delays are those by which
#: NCCL itself foretells a ring's time (src/graph/tuning.cc, protocol "simple").
H200 = Links(near=350e9, far=46e9, hop_near=3.4e-6, hop_far=14e-6, call=8.4e-6)


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step.

    Args:
        computing: of the devices' products.
        moving: of all collectives.
        alone: of those that nothing is computed beside: what is around the layers comes first and is summed last.
    """

    computing: float
    moving: float
    alone: float

    @property
    def total(self) -> float:
        """Moving is hidden behind computing, or the other way round."""
        return max(self.computing, self.moving - self.alone) + self.alone

    @property
    def efficiency(self) -> float:
        """The share of the time in which products are computed."""
        return self.computing / self.total


def step_time(
    weights: Weights, mesh: Mesh, precision: Precision, links: Links, computing: float, micro_batches: int = 1
) -> StepTime:
    """Of a step in which each device computes for so many seconds."""
    around = links.seconds(moved_by_group(weights.rest, mesh, precision, gathers=1))
    around += links.seconds(moved_between_copies(weights.rest, mesh, precision))
    return StepTime(computing, links.seconds(moved(weights, mesh, precision, micro_batches)), around * micro_batches)


def tokens_to_hide(weights: Weights, mesh: Mesh, precision: Precision, links: Links, a_token: float) -> float:
    """How many tokens a device and micro-batch it takes until moving the layers is hidden behind computing.

    The weights cancel while bytes count, as both grow with them: 1,500 tokens, or so, suit a large model as a small
    one. Where delays count, a small model's groups are too small.

    Args:
        a_token: seconds that a device computes for a token.
    """
    layers = moved_by_group(weights.layer, mesh, precision, gathers=2).times(weights.layers)
    return links.seconds(layers) / a_token


def tensor_parallel(tokens: int, hidden: int, layers: int, ranks: int) -> Traffic:
    """Of a micro-batch whose layers are split within a node: four all-reduces a layer of all states, in bfloat16."""
    return ring(2 * tokens * hidden, ranks, 1).times(2).times(4 * layers)


def context_parallel(tokens: int, keys: int, layers: int, ranks: int, nodes: int) -> Traffic:
    """Of a micro-batch whose sequences are split: keys and values go around forward and, with gradients, backward.

    Args:
        keys: numbers of a token's keys; its values have as many.
    """
    return ring(2 * 2 * tokens * keys, ranks, nodes).times(3).times(layers)
