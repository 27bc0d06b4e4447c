"""A trainer and a data module brought into line: both count in optimizer steps, whatever the geometry."""

from types import SimpleNamespace

import lightning.pytorch as pl

from dft_lightning.data.steps import StepSampler, steps_an_epoch
from dft_lightning.errors import UserError


def align(trainer: pl.Trainer, sampler: StepSampler, accumulation: int, interval: int | float | None) -> None:
    """Set the trainer's accumulation and validation interval.

    Args:
        accumulation: what the user gave the trainer.
        interval: the same, as a share of an epoch (below 1) or in optimizer steps.
    """
    if accumulation != 1:
        raise UserError(
            f"trainer.accumulate_grad_batches is {accumulation}: leave it out; it follows from "
            "data.global_batch_size, data.micro_batch_size and the number of devices"
        )
    refuse_no_step(sampler)
    trainer.accumulate_grad_batches = sampler.micro_batches
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # whole steps, of which Lightning does so many
        trainer.limit_train_batches = sampler.micro_batches * int(trainer.max_steps)
    if isinstance(interval, float) and interval < 1.0:
        interval = max(1, int(interval * sampler.steps))
    if isinstance(interval, int):
        if interval > sampler.steps and trainer.check_val_every_n_epoch is not None:
            raise UserError(
                f"trainer.val_check_interval is {interval} optimizer steps, an epoch has {sampler.steps}: lower it, or "
                "set trainer.check_val_every_n_epoch to null to count over epochs"
            )
        trainer.val_check_interval = interval * sampler.micro_batches


def refuse_limits(trainer: pl.Trainer) -> None:
    """Lightning counts these in micro-batches, or in minutes, and would cut optimizer steps to pieces."""
    limited = trainer.limit_train_batches not in (None, 1.0) or trainer.overfit_batches  # type: ignore[attr-defined]
    if limited and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise UserError(
            "trainer.limit_train_batches and trainer.overfit_batches would cut optimizer steps: use data.num_samples, "
            "or trainer.max_steps"
        )
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        raise UserError(
            "trainer.val_check_interval is a time; expected a number of optimizer steps, or a share of an epoch below 1"
        )


def epochs_of(trainer: pl.Trainer | None, rows: int, options: SimpleNamespace) -> int:
    """For how many epochs there is something to plan: those of the run."""
    if trainer is None:
        return 1
    known = [trainer.max_epochs] if trainer.max_epochs is not None and trainer.max_epochs > 0 else []
    if trainer.max_steps > 0:
        steps = steps_an_epoch(rows, options.global_batch_size, options.drop_last)
        known.append(-(-trainer.max_steps // max(steps, 1)))
    return max(min(known, default=1), 1)


def refuse_resampling(trainer: pl.Trainer) -> None:
    """Lightning's own sampler would shuffle and repeat rows behind our back."""
    if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
        raise UserError(
            "several devices: set Trainer(use_distributed_sampler=False); the data module deals out the rows"
        )


def refuse_options(options: SimpleNamespace) -> None:
    """Options that contradict each other or make no sense, before anything is read."""
    if (options.path is None) == (options.dataset is None):
        raise UserError("say what to train on: either data.path (local files) or data.dataset (a set on the hub)")
    for key in ("global_batch_size", "micro_batch_size", "max_length"):
        if getattr(options, key) < 1:
            raise UserError(f"data.{key} is {getattr(options, key)}; expected 1 or more")
    if options.packing not in (True, False, "padding_free"):
        raise UserError(f"data.packing is {options.packing!r}; expected true, false or padding_free")
    if options.pack_length is not None and options.pack_length < options.max_length:
        raise UserError(
            f"data.pack_length is {options.pack_length}, shorter than data.max_length {options.max_length}: no "
            "sequence is ever split, so raise the one or lower the other"
        )
    if options.num_samples is not None and options.num_samples < 1:
        raise UserError(f"data.num_samples is {options.num_samples}; expected 1 or more, or null for all rows")
    if options.seed is not None and options.seed < 0:
        raise UserError(f"data.seed is {options.seed}; expected 0 or more, or null for that of seed_everything")
    if options.num_workers < 0:
        raise UserError(f"data.num_workers is {options.num_workers}; expected 0 or more")
    if options.val_size < 0:
        raise UserError(f"data.val_size is {options.val_size}; expected a count, or a share below 1")


def refuse_no_step(sampler: StepSampler) -> None:
    """There has to be something to do."""
    if sampler.steps == 0:
        raise UserError(
            f"{len(sampler.lengths)} training rows do not fill one step of data.global_batch_size "
            f"{sampler.geometry.global_batch_size}: lower it, or set data.drop_last to false"
        )
