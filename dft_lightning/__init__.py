"""Fine-tuning of causal language models in which what each token is worth is a pluggable weighting."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dft_lightning.data import ChatDataModule, NuminaMathDataModule
    from dft_lightning.module import FineTuner

__all__ = ["ChatDataModule", "FineTuner", "NuminaMathDataModule"]


def __getattr__(name: str) -> Any:  # imported on first use, so that `dft --help` need not wait for torch
    if name == "FineTuner":
        return import_module("dft_lightning.module").FineTuner
    if name in __all__:
        return getattr(import_module("dft_lightning.data"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
