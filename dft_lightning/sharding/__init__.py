"""Training with weights, gradients and optimizer states dealt over all ranks: `--trainer.strategy fsdp2`."""

from dft_lightning.sharding.strategy import FSDP2Strategy

__all__ = ["FSDP2Strategy"]
