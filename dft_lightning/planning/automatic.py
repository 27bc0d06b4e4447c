"""`model.activation_checkpointing auto`: the lightest recomputation that fits the device at hand."""

import os
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_info

from dft_lightning.attention import implementation_of
from dft_lightning.errors import UserError
from dft_lightning.planning.dealt import Dealing
from dft_lightning.planning.memory import GIB, KINDS, Load, lightest, targets_of
from dft_lightning.planning.work import largest_micro_batch
from dft_lightning.recomputation import Recomputation

if TYPE_CHECKING:
    from dft_lightning.data import ChatDataModule
    from dft_lightning.module import FineTuner


def choose(module: "FineTuner", data: "ChatDataModule") -> Recomputation:
    """Look at none, selective and full in turn, and say what each needs; "full" where nothing fits.

    All ranks look at the largest micro-batch of any and have the same kind of device, so that they choose alike.
    """
    kind, looked = lightest(load_of(module, data))
    told = ", ".join(f"{name} {need.peak / GIB:.1f} GiB" for name, need in looked.items())
    chosen = kind or KINDS[-1]
    fits = "fits" if kind else "does not fit either, as far as can be foreseen"
    rank_zero_info(f"Activation checkpointing: {chosen} {fits} {capacity_of(module.device) / GIB:.1f} GiB ({told})")
    return chosen


def recomputation_of(module: "FineTuner", data: "ChatDataModule | None") -> Recomputation:
    """What is in force, where it is to be found out too."""
    if module.activation_checkpointing != "auto":
        return module.activation_checkpointing
    if data is None:
        raise UserError("model.activation_checkpointing auto goes by micro-batches: train with a data module")
    return choose(module, data)


def load_of(module: "FineTuner", data: "ChatDataModule") -> Load:
    """What each device of a fit that is about to begin has to do."""
    from dft_lightning.callbacks.lightnings import averages_on_device  # it imports this file's users

    assert module.network is not None
    assert data.train_rows is not None
    trainer, base = module.trainer, module.network.base
    return Load(
        config=base.config,
        lora=module.lora,
        dtype=module.source.dtype,
        precision=str(trainer.precision),
        attention=implementation_of(module.network.decoder),
        optimizer=module.optimization.make,
        muon_adamw=module.optimization.muon_adamw,
        freezing=module.freezing,
        shape=largest_micro_batch(data.train_rows, data.sampler(), fixed=data.fixed_shape),
        accumulates=trainer.accumulate_grad_batches > 1,
        ranks=trainer.world_size,
        cuda=module.device.type == "cuda",
        capacity=capacity_of(module.device) // (1 if module.device.type == "cuda" else trainer.num_devices),
        chunk_rows=module.chunk_rows,
        logits=module.logits,
        together=module.weighting.scope == "sequence",
        compared=module.reference_in_force == "copy",
        targets=targets_of(module.weighting),
        dealing=Dealing.of(trainer),
        four_bits=module.source.quantization is not None,
        embeddings_trained=module.resize_embeddings is not False,
        router=module.router is not None,
        averaged=averages_on_device(trainer.callbacks, cuda=module.device.type == "cuda"),  # type: ignore[attr-defined]
    )


def capacity_of(device: torch.device) -> int:
    """Bytes of a device; of a CPU, the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
