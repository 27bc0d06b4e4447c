"""`ChatDataModule`: from rows to the batches of each optimizer step."""

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset, Sampler

from dft_lightning.data.alignment import align, epochs_of, refuse_limits, refuse_options, refuse_resampling
from dft_lightning.data.batch import Batch, Collator
from dft_lightning.data.packing import Grouping, Layout, Packed, Padded, Row
from dft_lightning.data.rows import StageRows, split_rows
from dft_lightning.data.sources import Columns
from dft_lightning.data.steps import Geometry, StepSampler
from dft_lightning.data.store import TokenizedRows
from dft_lightning.errors import UserError
from dft_lightning.signals import only_from_the_parent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dft_lightning.data.rendering import ChatRenderer
    from dft_lightning.module import FineTuner


class ChatDataModule(pl.LightningDataModule):
    """Chats from the hub or from local files, rendered by the model's chat template; the assistant's text is learnt.

    Args:
        path: parquet, jsonl or json file, folder or glob. Either this or dataset.
        dataset: name of a set on the hub.
        name: configuration of that set.
        split: split of that set to train on.
        revision: branch, tag or commit on the hub.
        messages: column that holds the list of messages.
        prompt: column of the user's text, in place of messages.
        completion: column of the assistant's text, with prompt.
        weight: column of the row's weight, a number, or of a list with one for each supervised token; for a weighting
            such as DataWeighted.
        message_weights: the key weight of an assistant message is its weight; false to pass over such keys.
        system_prompt: put before chats that have no system message.
        end_of_response: how the last answer ends: with the template's own stop token, or with the tokenizer's eos.
        template_kwargs: further arguments of the chat template.
        max_length: most tokens of a sequence.
        overlength: what happens to longer ones: truncate on the right, or drop.
        num_samples: rows to train on; null for all.
        subset: which rows these are, if there are more: random ones (by seed), or the first.
        val_path: file, folder or glob to validate on.
        val_size: without val_path: rows to keep out of training for validation, as a count, or (below 1) a share of
            those trained on.
        test_path: file, folder or glob for `dft test`.
        global_batch_size: sequences of an optimizer step, over all ranks; accumulation follows from it.
        micro_batch_size: most rows a device holds at a time: sequences, or packed rows.
        packing: lay several sequences of a step into one row: true for rows of a fixed number of tokens, padding_free
            for one row a micro-batch, of at most micro_batch_size times as many and without any padding.
        pack_length: tokens of a packed row; by default max_length.
        grouping: without packing, sequences of similar length of a step share a micro-batch (length), or they stay in
            order (plain).
        shuffle: a new order every epoch, by seed.
        drop_last: leave out an epoch's last step where it is not full.
        seed: of the shuffle, the subset and the validation split.
        num_workers: processes that prepare batches.
        tokenize_workers: processes that tokenise; null for what suits machine and data.
        max_unusable_share: stop where more than this share of the rows cannot be used.
        cache_dir: where tokenised rows are kept; by default $DFT_CACHE or ~/.cache/dft-lightning.
    """

    def __init__(
        self,
        path: str | None = None,
        dataset: str | None = None,
        name: str | None = None,
        split: str = "train",
        revision: str | None = None,
        messages: str | None = "messages",
        prompt: str | None = None,
        completion: str | None = None,
        weight: str | None = None,
        message_weights: bool = True,
        system_prompt: str | None = None,
        end_of_response: Literal["template", "eos"] = "template",
        template_kwargs: dict[str, Any] | None = None,
        max_length: int = 2048,
        overlength: Literal["truncate", "drop"] = "truncate",
        num_samples: int | None = None,
        subset: Literal["random", "first"] = "random",
        val_path: str | None = None,
        val_size: int | float = 0,
        test_path: str | None = None,
        global_batch_size: int = 256,
        micro_batch_size: int = 4,
        packing: bool | Literal["padding_free"] = False,
        pack_length: int | None = None,
        grouping: Grouping = "length",
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        tokenize_workers: int | None = None,
        max_unusable_share: float = 0.1,
        cache_dir: str | None = None,
    ) -> None:
        self.options = SimpleNamespace(
            **{key: value for key, value in locals().items() if key not in {"self", "__class__"}}
        )
        super().__init__()
        self.columns = Columns(messages, prompt, completion, weight)
        self.tokenizer: PreTrainedTokenizerBase | None = None
        """Set this to use the module without a trainer; in a trainer it is the model's."""
        self.train_rows: TokenizedRows | None = None
        self.val_rows: TokenizedRows | None = None
        self.test_rows: TokenizedRows | None = None
        self.reference: dict[str, Any] = {}
        """log-probabilities under the reference, by stage ("train", "val", "test") and row; see `Collator`."""
        self.fixed_shape = False
        """Whether all training batches are to have one shape (packed rows only); a module that compiles sets this."""
        self._rows_reader: StageRows | None = None
        self._sampler: StepSampler | None = None
        self._resume = {"epoch": 0, "steps": 0}
        self._given: tuple[int, int | float | None] | None = None
        refuse_options(self.options)

    # -- rows -------------------------------------------------------------------------------------------------------

    @property
    def _stage_rows(self) -> StageRows:
        if self._rows_reader is None:
            if self.tokenizer is None:
                assert self.trainer is not None, "set `tokenizer`, or use the module in a trainer"
                self.tokenizer = cast("FineTuner", self.trainer.lightning_module).tokenizer
            self._rows_reader = StageRows(self.options, self.columns, self.tokenizer)
        return self._rows_reader

    @property
    def renderer(self) -> "ChatRenderer":
        """How conversations become tokens."""
        return self._stage_rows.renderer

    @property
    def origin(self) -> dict[str, np.ndarray]:
        """Which row of its source each row of a stage ("train", "val") is."""
        return self._stage_rows.origin

    def prepare_data(self) -> None:
        """Tokenise everything once, into the cache, before the other processes of the node read it."""
        self._load(None if self.trainer is None else self.trainer.state.fn)

    def setup(self, stage: str) -> None:
        """Open the tokenised rows, and derive the trainer's accumulation from the batch sizes."""
        loaded = self._load(stage)
        for name, rows in loaded.items():
            rank_zero_info(f"{name}: {rows.report}")
        self.train_rows, self._sampler = loaded.get("train", self.train_rows), None
        self.val_rows = loaded.get("val", self.val_rows)
        self.test_rows = loaded.get("test", self.test_rows)
        if self.trainer is not None:
            refuse_resampling(self.trainer)
        if self.trainer is not None and stage == "fit":
            self._align(self.trainer)

    def _load(self, command: str | None) -> dict[str, TokenizedRows]:
        """The rows that a command of the trainer needs, as far as there are such rows."""
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("train",)}
        stages = wanted.get(str(getattr(command, "value", command)), ("train", "val", "test"))
        return self._stage_rows.load(stages)

    def split_rows(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sorted indices of the rows to train and to validate on, out of `count`; the two never meet."""
        return split_rows(count, self.options)

    # -- batches ----------------------------------------------------------------------------------------------------

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
        self._sampler, self._resume = None, {"epoch": 0, "steps": 0}
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
                seed=options.seed if options.shuffle else None,
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
        sampler = self.sampler()
        sampler.epoch, sampler.start = self._resume["epoch"], self._resume["steps"] * sampler.micro_batches
        return self._loader(self._rows("train"), sampler, "train")

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
        return DataLoader(
            dataset,
            batch_sampler=cast("Sampler[Any]", sampler),
            collate_fn=self._collator(sampler, stage),
            num_workers=workers,
            worker_init_fn=only_from_the_parent if workers else None,
            generator=torch.Generator(),  # it draws from the global one otherwise
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
            "seed": options.seed,
            "shuffle": options.shuffle,
            "drop_last": options.drop_last,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue there; `FineTuner` refuses another `identity`."""
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        self._resume = {"epoch": state_dict["epoch"], "steps": min(state_dict["steps"], self.sampler().steps)}


class _Sequences(Dataset[list[dict[str, Any]]]):
    """Rows of sequences, which the collator makes batches of."""

    def __init__(self, rows: TokenizedRows) -> None:
        self.rows = rows

    def __getitem__(self, row: Row) -> list[dict[str, Any]]:
        return [self.rows[sequence] for sequence in row]
