"""What a device holds of a model that `fsdp2` deals out: its part all the time, and some of it whole for a while."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from dft_lightning.decoder import layers_of, refuse_shared
from dft_lightning.errors import UserError
from dft_lightning.models import WeightedLM
from dft_lightning.planning.scaling import Group, at_once, gathered, held
from dft_lightning.sharding import FSDP2Strategy


@dataclass(frozen=True)
class Dealing:
    """How a model is dealt out.

    Args:
        shards: ranks that share one copy of the states.
        copies: of the states.
        compute: what gathered weights are rounded to; gradients are then summed in float32. None: as they are held.
        once_a_step: whether gradients are summed over ranks once a step only.
    """

    shards: int
    copies: int = 1
    compute: torch.dtype | None = None
    once_a_step: bool = False

    @staticmethod
    def by(strategy: FSDP2Strategy, ranks: int) -> "Dealing":
        """As this strategy deals over so many ranks."""
        copies, shards = strategy.sizes(ranks)
        return Dealing(shards, copies, strategy.compute, strategy.once_a_step)

    @staticmethod
    def of(trainer: pl.Trainer) -> "Dealing | None":
        """That of a trainer; None where each rank has all."""
        strategy = trainer.strategy
        return Dealing.by(strategy, trainer.world_size) if isinstance(strategy, FSDP2Strategy) else None

    def part(self, parameters: Iterable[nn.Parameter]) -> int:
        """Bytes that the first rank holds of them; no rank holds more."""
        return sum(held([tuple(each.shape)], self.shards) * each.element_size() for each in parameters)

    def whole(self, network: WeightedLM) -> int:
        """Bytes of weights and gradients that are there in full at once."""
        *layers, rest = map(self._group, groups_of(network))
        return at_once(max(layers, key=lambda layer: layer.weights + layer.gradients + layer.sent), rest)

    def around(self, network: WeightedLM) -> int:
        """Bytes of all that is in no layer, gathered."""
        return self._group(groups_of(network)[-1]).weights

    def waiting(self, network: WeightedLM) -> int:
        """Bytes of gradients that wait, whole, for the step's last micro-batch."""
        return sum(group.sent for group in map(self._group, groups_of(network))) if self.once_a_step else 0

    def moved(self, network: WeightedLM, micro_batches: int = 1) -> float:
        """Bytes that come to a device in a step, from all others; see `traffic`.

        Layers are gathered twice, all else once; gradients are summed within the group, and between the copies.
        """
        *layers, rest = map(self._group, groups_of(network))
        gathers, sent = 2 * sum(layer.weights for layer in layers) + rest.weights, sum(g.sent for g in [*layers, rest])
        between = 2 * (self.copies - 1) / self.copies * sent / self.shards
        own = (self.shards - 1) / self.shards
        return micro_batches * own * gathers + (1 if self.once_a_step else micro_batches) * (own * sent + between)

    def _group(self, parameters: list[nn.Parameter]) -> Group:
        trained = [each for each in parameters if each.requires_grad]
        whole = self._gathered(trained)
        wide = whole if self.compute is None else whole // self.compute.itemsize * torch.float32.itemsize
        return Group(self._gathered(parameters), whole, wide)

    def _gathered(self, parameters: Iterable[nn.Parameter]) -> int:
        return sum(
            gathered([tuple(each.shape)], self.shards) * (self.compute or each.dtype).itemsize for each in parameters
        )


def groups_of(network: WeightedLM) -> list[list[nn.Parameter]]:
    """The parameters that are gathered together: those of each layer, and last all others."""
    refuse_shared(network.decoder)
    layers = [list(layer.parameters()) for layer in layers_of(network.decoder)]
    inside = set(chain.from_iterable(layers))
    return [*layers, [each for each in network.parameters() if each not in inside]]


def strategy_of(options: Any, precision: str) -> FSDP2Strategy | None:
    """The strategy that `trainer.strategy` asks for, if it deals the model out; else None.

    Args:
        options: a name, or class path and arguments as in a configuration.
        precision: as `trainer.precision`, in full.

    Raises:
        UserError: it is one that no plan is made for.
    """
    if isinstance(options, str) and options.startswith(("auto", "ddp", "single_device")):
        return None
    path = options if isinstance(options, str) else str(getattr(options, "class_path", options))
    if path != "fsdp2" and path.rpartition(".")[2] != FSDP2Strategy.__name__:
        raise UserError(f"dft plan knows trainer.strategy auto, ddp and fsdp2, not {path!r}")
    given = getattr(options, "init_args", None) or {}
    known = {name: given[name] for name in ("shard", "replicate", "compute", "reduce") if name in given}
    strategy = FSDP2Strategy(**known)
    strategy.refuse_precision(precision)
    return strategy
