"""From tokenised rows to the batches of each step, and of a pass over all rows; and where a run is in them."""

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dft_lightning.data.alignment import align, epochs_of, refuse_limits
from dft_lightning.data.batch import Batch, Collator
from dft_lightning.data.deferred import DeferredCollate, DeferredLoader
from dft_lightning.data.packing import Layout, Packed, Padded, Row
from dft_lightning.data.rows import StageRows
from dft_lightning.data.steps import Geometry, StepSampler
from dft_lightning.data.store import TokenizedRows
from dft_lightning.errors import UserError
from dft_lightning.seeds import run_seed
from dft_lightning.signals import only_from_the_parent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dft_lightning.module import FineTuner


class StepLoaders(pl.LightningDataModule, ABC):
    """Batches of rows that a subclass reads."""

    options: SimpleNamespace
    """Those of `ChatDataModule`."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer: PreTrainedTokenizerBase | None = None
        """Set this to use the module without a trainer; in a trainer it is the model's."""
        self.train_rows: TokenizedRows | None = None
        self.val_rows: TokenizedRows | None = None
        self.test_rows: TokenizedRows | None = None
        self.reference: dict[str, Any] = {}
        """log-probabilities under the reference, by stage ("train", "val", "test") and row; see `Collator`."""
        self.fixed_shape = False
        """Whether all training batches are to have one shape (packed rows only); a module that compiles sets this."""
        self._sampler: StepSampler | None = None
        self._given: tuple[int, int | float | None] | None = None

    @property
    @abstractmethod
    def _stage_rows(self) -> StageRows:
        """What reads them."""

    @property
    def seed(self) -> int:
        """Of the shuffle, the subset and the validation split: `data.seed`, by default the run's."""
        own: int | None = self.options.seed
        return run_seed() if own is None else own

    def geometry(self) -> Geometry:
        """How an optimizer step is cut up on this trainer's ranks."""
        options, trainer = self.options, self.trainer
        ranks, rank = (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
        return Geometry(options.global_batch_size, options.micro_batch_size, ranks, rank)

    def _align(self, trainer: pl.Trainer) -> None:
        """Plan the run's steps, and let the trainer count by them."""
        if self._given is None:  # a trainer that fits twice brings what was set here
            refuse_limits(trainer)
            self._given = trainer.accumulate_grad_batches, trainer.val_check_interval
        self._sampler = None
        align(trainer, self.sampler(), *self._given)

    @property
    def is_packed(self) -> bool:
        """Whether a row may have several sequences."""
        return bool(self.options.packing)

    def sampler(self) -> StepSampler:
        """The training steps, planned for the whole run."""
        if self._sampler is None:
            options, layout = self.options, self.layout
            shape = self.geometry()
            if options.packing == "padding_free":  # a micro-batch is one row
                shape = replace(shape, micro_batch_size=1)
            self._sampler = StepSampler(
                self._rows("train").lengths,
                shape,
                seed=self.seed if options.shuffle else None,
                layout=layout,
                drop_last=options.drop_last,
                epochs=epochs_of(self.trainer, len(self._rows("train")), options),
            )
        return self._sampler

    @property
    def layout(self) -> Layout:
        """How the sequences of a step are laid into rows."""
        options = self.options
        if not options.packing:
            return Padded(options.grouping)
        width = options.pack_length or options.max_length
        return Packed(width) if options.packing is True else Packed(width * options.micro_batch_size, fill=False)

    def _rows(self, stage: str) -> TokenizedRows:
        rows: TokenizedRows | None = {"train": self.train_rows, "val": self.val_rows, "test": self.test_rows}[stage]
        assert rows is not None, f"no {stage} rows"
        return rows

    def train_dataloader(self) -> "DataLoader[Batch]":
        """Micro-batches of the training steps; after a resume, from where the checkpoint was written."""
        return self._loader(self._rows("train"), self.sampler(), "train")

    def step(self, epoch: int, number: int) -> "list[Batch]":
        """This rank's micro-batches of one training step, as the loader gives them."""
        sequences, collate = _Sequences(self._rows("train")), self._collator(self.sampler(), "train")
        return [collate([sequences[row] for row in rows]) for rows in self.sampler().step(epoch, number)]

    def transfer_batch_to_device(self, batch: "Batch", device: torch.device, dataloader_idx: int) -> "Batch":
        """Without waiting for the device; Lightning does so for tensors only."""
        return batch.to(device, non_blocking=device.type == "cuda")

    def samples(self) -> "list[Batch]":
        """Training batches of every kind that a model may tell apart: without sequences, and with two in a row."""
        collate = Collator(packed=True, width=self.layout.width, fixed=self._fixed(self.sampler(), "train"))
        pair = [{"row": -1, "input_ids": [0, 0], "supervised": [False, True]}] * 2
        return [collate([]), collate([pair])]

    def val_dataloader(self) -> "DataLoader[Batch] | list[Any]":
        """All validation rows once; in a fit, nothing where there are none."""
        if self.val_rows is None and self.trainer is not None and self.trainer.state.fn == "validate":
            raise UserError("there is nothing to validate on: set data.val_size or data.val_path")
        return [] if self.val_rows is None else self.scoring_loader(self.val_rows, "val")

    def test_dataloader(self) -> "DataLoader[Batch]":
        """All test rows once."""
        if self.test_rows is None:
            raise UserError("there is nothing to test on: set data.test_path")
        return self.scoring_loader(self.test_rows, "test")

    def predict_dataloader(self) -> "DataLoader[Batch]":
        """All training rows once, in order of length."""
        return self.scoring_loader(self._rows("train"), "train")

    def rows_used(self, stage: str) -> TokenizedRows | None:
        """The rows that this run reads: for training, those of its steps; None where there are none."""
        rows: TokenizedRows | None = {"train": self.train_rows, "val": self.val_rows, "test": self.test_rows}[stage]
        if rows is None or stage != "train" or self.trainer is None or self.trainer.state.fn != "fit":
            return rows
        steps = cast("FineTuner", self.trainer.lightning_module).total_steps
        return rows.select(self.sampler().sequences_of_steps(steps))

    def scoring_loader(self, rows: TokenizedRows, stage: str, workers: int | None = None) -> "DataLoader[Batch]":
        """Every row once, dealt over the ranks without repeats; ranks get equally many batches, empty ones included."""
        shape = self.geometry()
        whole = Geometry(max(len(rows), 1), shape.micro_batch_size, shape.ranks, shape.rank)
        return self._loader(rows, StepSampler(rows.lengths, whole), stage, workers)

    def _loader(
        self, rows: TokenizedRows, sampler: StepSampler, stage: str, workers: int | None = None
    ) -> "DataLoader[Batch]":
        workers = self.options.num_workers if workers is None else workers
        dataset: Any = _Sequences(rows)
        return DeferredLoader(
            dataset,
            batch_sampler=cast("Sampler[Any]", sampler),
            collate_fn=DeferredCollate(partial(self._collator, sampler, stage)),
            num_workers=workers,
            worker_init_fn=only_from_the_parent if workers else None,
            generator=torch.Generator().manual_seed(self.seed),  # it draws from the global one otherwise
            persistent_workers=workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    def _collator(self, sampler: StepSampler, stage: str) -> Collator:
        pad = self._stage_rows.tokenizer.pad_token_id
        packed = isinstance(sampler.layout, Packed)
        width, fixed = sampler.layout.width, self._fixed(sampler, stage)
        return Collator(0 if pad is None else pad, self.reference, stage, packed, width, fixed)

    def _fixed(self, sampler: StepSampler, stage: str) -> tuple[int, int] | None:
        is_fixed = self.fixed_shape and stage == "train" and sampler.layout.width is not None
        documents = max(sampler.fullest, 2) + 1  # of a row: padding is one, and `samples` has two
        return (sampler.height, sampler.height * documents) if is_fixed else None

    # -- resuming ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where in the data the run is: right at the end of an optimizer step, when checkpoints are written."""
        assert self.trainer is not None
        sampler = self.sampler()
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready // sampler.micro_batches
        epoch = self.trainer.current_epoch
        return {"epoch": epoch + done // sampler.steps, "steps": done % sampler.steps}

    def identity(self) -> dict[str, Any]:
        """What decides which rows each optimizer step has."""
        options = self.options
        return {
            "rows": self._rows("train").fingerprint,
            "global_batch_size": options.global_batch_size,
            "seed": self.seed,
            "shuffle": options.shuffle,
            "drop_last": options.drop_last,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue there; `FineTuner` refuses another `identity`."""
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        sampler = self.sampler()  # the one that the training loader has, or will have
        steps = min(state_dict["steps"], sampler.steps)
        sampler.epoch, sampler.start = state_dict["epoch"], steps * sampler.micro_batches


class _Sequences(Dataset[list[dict[str, Any]]]):
    """Rows of sequences, which the collator makes batches of."""

    def __init__(self, rows: TokenizedRows) -> None:
        self.rows = rows

    def __getitem__(self, row: Row) -> list[dict[str, Any]]:
        return [self.rows[sequence] for sequence in row]
