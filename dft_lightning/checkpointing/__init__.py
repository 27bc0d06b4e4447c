"""How a run's checkpoints lie on disk: as one file or as a folder of many ranks' parts, and always whole."""

from dft_lightning.checkpointing.io import RunCheckpoints
from dft_lightning.checkpointing.reading import read, skeleton

__all__ = ["RunCheckpoints", "read", "skeleton"]
