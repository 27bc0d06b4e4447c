"""The model as it is before any training, as the trainer's strategy holds it."""

from contextlib import nullcontext
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from dft_lightning.errors import UserError
from dft_lightning.loading import ModelSource
from dft_lightning.models import WeightedLM
from dft_lightning.sharding.strategy import FSDP2Strategy

if TYPE_CHECKING:
    from dft_lightning.scoring import WeightedModule


def initial_network(module: "WeightedModule", *, frozen: bool = False) -> WeightedLM:
    """The initial model: on the module's device, or with each rank's part on its own where the strategy deals it out.

    Args:
        frozen: in evaluation mode, and without gradients.
    """
    strategy = module.trainer.strategy if module._trainer is not None else None
    sharded = isinstance(strategy, FSDP2Strategy)
    if sharded:
        refuse_quantized(module.source)

    def build(empty: bool) -> WeightedLM:
        with torch.device("meta") if empty else nullcontext():
            model = module.initial_model(empty=empty)
        network = WeightedLM(model if sharded else model.to(module.device))
        return network.requires_grad_(False).eval() if frozen else network

    return strategy.load_network(build) if isinstance(strategy, FSDP2Strategy) else build(False)


def refuse_quantized(source: ModelSource) -> None:
    """Refuse weights in 4 bits on a sharded model."""
    if source.quantization is not None:
        raise UserError(
            f"model.quantization is {source.quantization}, and trainer.strategy deals out weights in whole "
            "precision only: set trainer.strategy ddp or auto, or leave quantization out"
        )


def refuse_strategy(trainer: pl.Trainer | None) -> None:
    """Refuse strategies under which the loss would not be the sharded model's forward, or norms those of a part.

    Raises:
        UserError: names the strategy, and the one to take.
    """
    strategy = None if trainer is None else trainer.strategy
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy) and not isinstance(
        strategy, FSDP2Strategy
    ):
        raise UserError(
            f"trainer.strategy is {type(strategy).__name__}, under which gradients would not be exact here (tensor "
            "parallelism, FSDP1 and DeepSpeed are not supported); expected fsdp2 to shard the model, ddp or auto"
        )


def refuse_name(name: str) -> None:
    """The same by name, before there is a strategy: its own errors would send the user further the wrong way."""
    if name.startswith(("fsdp", "deepspeed")) and name.lower() != "fsdp2":
        raise UserError(
            f"trainer.strategy is {name}, which is not supported here; expected fsdp2 to shard the model, ddp or auto"
        )
