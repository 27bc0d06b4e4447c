"""How much there is to do: the shape of the largest micro-batch, and tokens and FLOPs of an optimizer step."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from dft_lightning.data.alignment import refuse_no_step
from dft_lightning.data.packing import Packed
from dft_lightning.data.steps import StepSampler
from dft_lightning.errors import UserError
from dft_lightning.planning.flops import ModelFlops
from dft_lightning.planning.rehearsal import MicroBatch

if TYPE_CHECKING:
    from dft_lightning.data import ChatDataModule
    from dft_lightning.data.store import TokenizedRows


@dataclass(frozen=True)
class Work:
    """What a run does; means over the steps of the first epoch.

    Args:
        largest: the largest micro-batch of a device.
        micro_batches: of a step, a device.
        tokens: read in a step, over all devices.
        supervised: of these.
        flops: of a step, over all devices; None where they are not known.
        steps: of the run.
        source: where these figures are from.
    """

    largest: MicroBatch
    micro_batches: int
    tokens: float
    supervised: float
    flops: float | None
    steps: int | None
    source: str


def work_of(data: "ChatDataModule", tokenizer: Any, limits: SimpleNamespace, flops: ModelFlops | None) -> Work:
    """By the data's own tokens, or where they cannot be had, by rows that are full.

    Args:
        tokenizer: gives the tokenizer.
        limits: world_size, global_rank, max_epochs and max_steps, as a trainer has them.
    """
    data.trainer = cast(Any, limits)
    try:
        data.tokenizer = tokenizer()
        data.prepare_data()
        loaded = data._load("fit")
    except (UserError, OSError) as error:
        if data.tokenizer is not None and data.options.path is not None:  # a file that a fit could not read either
            raise
        reason = " ".join(str(error).split())[:200]
        return _assumed(data, limits, flops, f"assumed, every row full to max_length and supervised: {reason}")
    rows = loaded["train"]
    data.train_rows, data.val_rows = rows, loaded.get("val")
    refuse_no_step(data.sampler())
    return _measured(rows, data.sampler(), limits, flops, fixed=data.fixed_shape)


def _measured(
    rows: "TokenizedRows", sampler: StepSampler, limits: SimpleNamespace, flops: ModelFlops | None, *, fixed: bool
) -> Work:
    steps = max(sampler.steps, 1)
    used = sampler.sequences_of_steps(steps)
    lengths, supervised = rows.lengths[used].tolist(), int(rows.targets[used].sum())
    epochs = limits.max_epochs if limits.max_epochs and limits.max_epochs > 0 else None
    known = [limits.max_steps] if limits.max_steps > 0 else []
    known += [] if epochs is None else [epochs * steps]
    return Work(
        largest=largest_micro_batch(rows, sampler, fixed=fixed),
        micro_batches=sampler.micro_batches,
        tokens=sum(lengths) / steps,
        supervised=supervised / steps,
        flops=None if flops is None else flops.of(lengths, supervised) / steps,
        steps=min(known, default=None),
        source=f"{len(rows):,} rows of the data, as tokenised",
    )


def largest_micro_batch(rows: "TokenizedRows", sampler: StepSampler, *, fixed: bool = False) -> MicroBatch:
    """The run's micro-batch with most positions, of any rank, with as many supervised tokens as any has.

    Args:
        fixed: whether all have the shape of the largest.
    """
    most, largest, supervised = 0, [[0]], 0
    for part in _micro_batches(sampler):
        if not part:
            continue
        wide = sampler.layout.width or max(int(rows.lengths[row].sum()) for row in part)
        supervised = max(supervised, int(rows.targets[np.concatenate(part)].sum()))
        if wide * len(part) > most:
            most, largest = wide * len(part), part
    documents: list[tuple[int, ...]] = [tuple(rows.lengths[row].tolist()) for row in largest]
    if fixed:
        documents += [()] * (sampler.height - len(documents))
    return MicroBatch(tuple(documents), supervised, isinstance(sampler.layout, Packed), sampler.layout.width)


def _micro_batches(sampler: StepSampler) -> Iterator[list[list[int]]]:
    for epoch in range(sampler.epochs):
        for number in range(sampler.steps):
            yield from sampler.parts(epoch, number)


def _assumed(data: "ChatDataModule", limits: SimpleNamespace, flops: ModelFlops | None, source: str) -> Work:
    options = data.options
    width, size = options.max_length, options.global_batch_size
    rows = min(options.micro_batch_size, -(-size // limits.world_size))
    shape = MicroBatch.full(rows, width)
    if data.is_packed:
        row = (options.pack_length or width) * (options.micro_batch_size if options.packing == "padding_free" else 1)
        documents = (width,) * max(row // width, 1)
        count = 1 if options.packing == "padding_free" else rows
        shape = MicroBatch((documents,) * count, count * len(documents) * (width - 1), packed=True, width=row)
    every = [width] * size
    return Work(
        largest=shape,
        micro_batches=-(-size // (max(len(shape.rows) * len(shape.rows[0]), 1) * limits.world_size)),
        tokens=float(size * width),
        supervised=float(size * (width - 1)),
        flops=None if flops is None else float(flops.of(every, size * (width - 1))),
        steps=limits.max_steps if limits.max_steps > 0 else None,
        source=source,
    )
