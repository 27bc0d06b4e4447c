"""In which precision weights and logits are held, and products computed, by the options of model and trainer."""

from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch

from dft_lightning.adapters import adapter_dtype
from dft_lightning.errors import UserError
from dft_lightning.loading import Precision
from dft_lightning.sharding import FSDP2Strategy

if TYPE_CHECKING:
    from dft_lightning.scoring import WeightedModule

_TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


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
    return _TRUE.get(precision, torch.float32)


def trained_dtype(module: "WeightedModule", precision: str) -> torch.dtype:
    """In what the weights that are trained are stored, and with them gradients and optimizer states."""
    weights = weights_dtype(module.dtype_choice, precision)
    return weights if module.lora is None else adapter_dtype(module.lora.dtype, weights)


def refuse_precision(module: "WeightedModule", precision: str) -> None:
    """Refuse precisions of which `trainer.precision` would not leave what was asked for.

    Raises:
        UserError: names both options.
    """
    refuse_precision_name(precision)
    choice, trained = module.dtype_choice, trained_dtype(module, precision)
    true = _TRUE.get(precision)
    if true is not None and choice != "auto" and getattr(torch, choice) != true:
        raise UserError(
            f"model.dtype is {choice}, but trainer.precision {precision} holds all weights in {_name(true)}: leave "
            f"model.dtype out, or set trainer.precision 32-true, which leaves them in {choice}"
        )
    if precision not in _MIXED:
        return
    adapters = module.lora is not None and module.lora.dtype == "float64"
    if choice == "float64" or adapters:
        option = "model.dtype" if choice == "float64" else "model.lora.dtype"
        raise UserError(
            f"{option} is float64, whose products trainer.precision {precision} leaves in float64: set float32, or "
            "trainer.precision 64-true"
        )
    if precision == "16-mixed" and trained != torch.float32:
        option = "model.dtype" if module.lora is None else "model.lora.dtype"
        raise UserError(
            f"{option} is {_name(trained)}, but trainer.precision 16-mixed scales gradients, which works for weights "
            "in float32 only: leave it out, or set trainer.precision bf16-mixed"
        )


def refuse_precision_name(precision: str, accelerator: Any = None) -> None:
    """Refuse a `trainer.precision` under which something else would be computed.

    Args:
        accelerator: as `trainer.accelerator`, where the trainer does not exist yet.
    """
    if precision.startswith("transformer-engine"):
        raise UserError(
            f"trainer.precision is {precision}, which replaces the model's layers and is not supported here; expected "
            "32-true, 64-true, bf16-true, 16-true, bf16-mixed or 16-mixed"
        )
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    if precision == "16-mixed" and on_cpu:
        raise UserError(
            "trainer.precision is 16-mixed, which needs a GPU (on a CPU Lightning would take bf16-mixed in its place): "
            "set trainer.precision bf16-mixed or 32-true"
        )


def held_and_computed(choice: Precision, precision: str) -> tuple[torch.dtype, torch.dtype]:
    """In what the weights are held, and in what products with them are computed."""
    held = weights_dtype(choice, precision)
    return held, _MIXED.get(precision, held)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
