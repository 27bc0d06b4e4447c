"""In which precision weights and logits are held, and products computed, by the options of model and trainer."""

from typing import cast

import lightning.pytorch as pl
import torch

from dft_lightning.errors import UserError
from dft_lightning.models import Precision
from dft_lightning.sharding import FSDP2Strategy


def computed_in(trainer: pl.Trainer | None) -> torch.dtype | None:
    """What the strategy rounds the weights to before it computes; None where it takes them as they are held."""
    strategy = None if trainer is None else trainer.strategy
    return strategy.compute if isinstance(strategy, FSDP2Strategy) else None


def precision_of(trainer: pl.Trainer) -> str:
    """`trainer.precision`, and what the strategy computes in where that is something else."""
    compute = computed_in(trainer)
    return f"{trainer.precision}" if compute is None else f"{trainer.precision}, computed in {_name(compute)}"


def refuse_logits(logits: str, dtype: torch.dtype, precision: str) -> None:
    """Logits in bfloat16 are refused where the products of weights that come in `dtype` are not in bfloat16."""
    mixed = dtype == torch.float32 and precision == "bf16-mixed"
    if logits == "bfloat16" and dtype != torch.bfloat16 and not mixed:
        raise UserError(
            f"model.logits is bfloat16, but the products are in {dtype}: leave it out, or set trainer.precision to "
            "bf16-true or bf16-mixed, or trainer.strategy.compute (of fsdp2) to bfloat16"
        )


def weights_dtype(choice: Precision, precision: str) -> torch.dtype:
    """In what the weights are held, by `model.dtype` and `trainer.precision`."""
    if choice != "auto":
        return cast(torch.dtype, getattr(torch, choice))
    true = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
    return true.get(precision, torch.float32)


def held_and_computed(choice: Precision, precision: str) -> tuple[torch.dtype, torch.dtype]:
    """In what the weights are held, and in what products with them are computed."""
    held = weights_dtype(choice, precision)
    return held, {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision, held)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
