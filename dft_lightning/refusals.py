"""Options of a run that would be ignored or computed wrongly: refused before anything is loaded."""

import os
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch

from dft_lightning import embedded, schedules
from dft_lightning.compilation import refuse_changing_shapes
from dft_lightning.embedding_rows import check_resize
from dft_lightning.errors import UserError
from dft_lightning.loading import ModelSource
from dft_lightning.loss_terms import check_router_option
from dft_lightning.optimizers import parts_of
from dft_lightning.sharding import FSDP2Strategy
from dft_lightning.sharding.initial import refuse_quantized, refuse_strategy
from dft_lightning.weighting import Exempt, TokenWeighting
from dft_lightning.weighting.base import REF_DISTRIBUTION
from dft_lightning.weighting.composition import nested
from dft_lightning.weighting.proof import prove

if TYPE_CHECKING:
    from dft_lightning.module import FineTuner
    from dft_lightning.scoring import WeightedModule


def refuse(module: "FineTuner") -> None:
    """What would be ignored or computed wrongly is refused before anything is loaded."""
    name = type(module.weighting).__name__
    try:
        prove(module.weighting)
    except ValueError as error:
        raise UserError(f"weighting refused: {error}") from error
    if unknown := set(module.weighting.needs) & {"reward"}:
        raise UserError(f"{name} needs {sorted(unknown)}, which no data set here provides yet")
    if module.reference == "cache" and REF_DISTRIBUTION in module.weighting.needs:
        raise UserError(
            f"{name} wants the reference's distributions; a cache holds single log-probabilities: use 'copy'"
        )
    check_resize(module)
    refuse_revision(module.source)
    refuse_adapter_options(module)
    for option, value in (("chunk_rows", module.chunk_rows), ("max_skipped_steps", module.step.skipped.limit)):
        if value is not None and value < 1:
            raise UserError(f"model.{option} is {value}; expected 1 or more")
    check_router_option(module.router_loss)
    module.optimization.check()
    schedules.check(module.lr_schedule, module.lr_schedule_kwargs, module.optimization.lr)
    if not 0.0 <= module.warmup_ratio < 1.0:
        raise UserError(f"model.warmup_ratio is {module.warmup_ratio}; expected a share from 0 to less than 1")


def refuse_combinations(module: "FineTuner", trainer: pl.Trainer, data: object, *, training: bool) -> None:
    """Model, data and trainer that do not go together: before rows are read and before other processes are started."""
    refuse_strategy(trainer)
    if training and module.compile_layers:
        refuse_changing_shapes(data)
    if isinstance(trainer.strategy, FSDP2Strategy):
        refuse_quantized(module.source)
        trainer.strategy.refuse_precision(str(trainer.precision))


def refuse_revision(source: ModelSource) -> None:
    """A folder has no revisions: transformers would ignore one."""
    if source.revision is not None and (source.name == embedded.NAME or os.path.isdir(source.name)):
        raise UserError(
            f"model.revision is {source.revision!r}, but the model {source.name!r} is not from the hub, and has no "
            "revisions: leave it out"
        )


def refuse_adapter_options(module: "WeightedModule") -> None:
    """What does not go with the adapters, or with there being none; of an adapter's own settings, once they are known.

    An adapter that is trained further has LoRA settings in its folder, which may not have been read yet.
    """
    name, lora = type(module.weighting).__name__, module.lora
    if "old_logp" in module.weighting.needs and lora is not None and lora.dropout > 0.0:
        raise UserError(
            f"{name} compares with an old policy, which has no dropout: with model.lora.dropout {lora.dropout} "
            "ratios would be noise; set it to 0"
        )
    if module.reference == "adapter_off" and module.adapter == "continue":
        raise UserError(
            "model.reference is 'adapter_off', but with model.adapter continue the initial model includes the adapter: "
            "use 'auto', 'cache' or 'copy'"
        )
    if module.reference == "adapter_off" and lora is None:
        raise UserError("model.reference is 'adapter_off', but there is no adapter: set model.lora, or use 'cache'")
    quantization = module.source.quantization
    if quantization is not None and module.adapter == "merge":
        raise UserError(
            f"model.quantization is {quantization}, but model.adapter merge needs the weights in full precision: leave "
            "model.quantization out, or set model.adapter continue"
        )
    if quantization is not None and lora is None and module.adapter is None:
        raise UserError(
            f"model.quantization is {quantization}, but weights in 4 bits are not trained: set "
            "model.lora, whose adapters are, or leave it out"
        )


def refuse_fused_scaling(trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> None:
    """Lightning leaves unscaling to such an optimizer, so that its gradients would be clipped as they are scaled."""
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    if scaled and any(getattr(part, "_step_supports_amp_scaling", False) for part in parts_of(optimizer)):
        raise UserError(
            f"precision {trainer.precision} scales gradients, and a fused {type(optimizer).__name__} unscales them too "
            "late for clipping and logging: set fused to false, or take bf16"
        )


#: Optimizers whose step looks at a whole weight, or takes operators that parts of one do not have.
_OF_WHOLE_WEIGHTS = {"Adafactor", "LBFGS", "Muon", "Rprop"}
#: Packages whose optimizers are kernels for plain tensors.
_OF_PLAIN_TENSORS = ("bitsandbytes.",)


def refuse_parts(trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> None:
    """An optimizer whose step would be another, or none, where a rank has parts of the weights."""
    classes = [kind for part in parts_of(optimizer) for kind in type(part).__mro__]
    kinds = {kind.__name__ for kind in classes if kind.__module__.startswith(("torch.", "transformers."))}
    plain = any(kind.__module__.startswith(_OF_PLAIN_TENSORS) for kind in classes)
    if isinstance(trainer.strategy, FSDP2Strategy) and (plain or kinds & _OF_WHOLE_WEIGHTS):
        name = type(parts_of(optimizer)[0]).__name__
        raise UserError(
            f"model.optimizer {name} looks at whole weights, of which trainer.strategy fsdp2 gives each rank "
            "a part: take one that goes entry by entry (AdamW, SGD, …), or trainer.strategy ddp"
        )


def refuse_ids(weighting: TokenWeighting, vocabulary: int) -> None:
    """Exempt ids that no token can have would be passed over."""
    for part in nested(weighting):
        if isinstance(part, Exempt) and (wrong := [each for each in part.token_ids if each >= vocabulary]):
            raise UserError(f"Exempt.token_ids has {wrong}; the model's vocabulary has {vocabulary:,} ids, from 0 on")
