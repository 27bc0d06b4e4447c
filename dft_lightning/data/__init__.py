"""From rows of a hub set or a local file to batches of supervised tokens."""

from dft_lightning.data.datamodule import ChatDataModule
from dft_lightning.data.numina import NuminaMathDataModule
from dft_lightning.data.practice import PracticeDataModule

__all__ = ["ChatDataModule", "NuminaMathDataModule", "PracticeDataModule"]
