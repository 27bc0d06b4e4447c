"""In which precision weights and logits are held, by `model.dtype`, `model.logits` and `trainer.precision`."""

from typing import cast

import torch

from dft_lightning.errors import UserError
from dft_lightning.models import Precision


def refuse_logits(logits: str, dtype: torch.dtype, precision: str) -> None:
    """Logits in bfloat16 are refused where the products of weights in `dtype` are not in bfloat16."""
    mixed = dtype == torch.float32 and precision == "bf16-mixed"
    if logits == "bfloat16" and dtype != torch.bfloat16 and not mixed:
        raise UserError(
            f"model.logits is bfloat16, but the products are in {dtype}: leave it out, or set trainer.precision to "
            "bf16-true or bf16-mixed"
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
