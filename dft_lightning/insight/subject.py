"""The model and the rows of a fit, brought together without a trainer."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.fabric.connector import _convert_precision_to_unified_args

from dft_lightning.models import WeightedLM
from dft_lightning.precision import held_and_computed, refuse_logits, refuse_precision
from dft_lightning.recomputation import recompute
from dft_lightning.row_limits import check_limits

if TYPE_CHECKING:
    from dft_lightning.data import ChatDataModule
    from dft_lightning.data.store import TokenizedRows
    from dft_lightning.module import FineTuner

_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Args:
        module: as `dft fit` would train it; its weights are loaded by `load`.
        data: with the rows.
        device: where the model computes.
        precision: that of the trainer.
    """

    module: "FineTuner"
    data: "ChatDataModule"
    device: torch.device
    precision: str

    @staticmethod
    def of(module: "FineTuner", data: "ChatDataModule", trainer: Any) -> "Subject":
        """By the trainer's options; without the accelerator that they name, the CPU does."""
        gpu = trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        precision = _convert_precision_to_unified_args(trainer.precision) or "32-true"
        return Subject(module, data, torch.device("cuda" if gpu else "cpu"), precision)

    @cached_property
    def rows(self) -> "TokenizedRows":
        """The training rows in tokens."""
        data = self.data
        data.tokenizer = self.module.tokenizer
        data.trainer = cast(Any, SimpleNamespace(state=SimpleNamespace(fn="predict")))  # of all rows, the training ones
        data.prepare_data()
        data.trainer = None
        data.setup("predict")
        assert data.train_rows is not None
        return data.train_rows

    @cached_property
    def network(self) -> WeightedLM:
        """The initial model, in evaluation mode."""
        module = self.module
        refuse_precision(module, self.precision)
        assert len(self.rows)  # they are read here
        check_limits(module, self.data)
        module.source.dtype, module.source.compute = held_and_computed(module.dtype_choice, self.precision)
        refuse_logits(module.logits, module.source.dtype, self.precision)
        network = WeightedLM(module.initial_model())
        kind = module.activation_checkpointing
        kind = "full" if kind == "auto" else kind
        network.check_recomputation(kind)
        recompute(network.decoder, kind)  # while it trains only
        return network.to(self.device).eval()

    @property
    def head_options(self) -> dict[str, Any]:
        """How the loss head computes."""
        narrow = self.module.logits == "bfloat16"
        return {"chunk_rows": self.module.chunk_rows, "logits": torch.bfloat16 if narrow else None}

    def arithmetic(self) -> AbstractContextManager[Any]:
        """In what precision products are made."""
        mixed = _MIXED.get(self.precision)
        return nullcontext() if mixed is None else torch.autocast(self.device.type, mixed)
