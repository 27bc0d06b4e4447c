"""`ChatDataModule` and `NuminaMathDataModule`: from rows to the batches of each optimizer step."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from dft_lightning.data.batch import Batch, Collator
from dft_lightning.data.sources import Columns, load_rows
from dft_lightning.data.steps import Geometry, Grouping, StepSampler
from dft_lightning.data.tokenized import TokenizedRows, tokenize
from dft_lightning.embedded import cache_dir as default_cache_dir
from dft_lightning.errors import UserError

if TYPE_CHECKING:
    import datasets
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
        micro_batch_size: most sequences a device holds at a time.
        grouping: sequences of similar length of a step share a micro-batch (length), or they stay in order (plain).
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
        self.columns = Columns(messages, prompt, completion)
        self.tokenizer: PreTrainedTokenizerBase | None = None
        """Set this to use the module without a trainer; in a trainer it is the model's."""
        self.train_rows: TokenizedRows | None = None
        self.val_rows: TokenizedRows | None = None
        self.test_rows: TokenizedRows | None = None
        self.reference: dict[str, Any] = {}
        """log-probabilities under the reference, by stage ("train", "val", "test") and row; see `Collator`."""
        self.origin: dict[str, np.ndarray] = {}
        """Which row of its source each row of a stage is."""
        self._resume = {"epoch": 0, "batches": 0}
        self._accumulation: int | None = None
        _refuse(self.options)

    # -- rows -------------------------------------------------------------------------------------------------------

    @property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        if self.tokenizer is None:
            assert self.trainer is not None, "set `tokenizer`, or use the module in a trainer"
            self.tokenizer = cast("FineTuner", self.trainer.lightning_module).tokenizer
        return self.tokenizer

    @cached_property
    def renderer(self) -> "ChatRenderer":
        """How conversations become tokens."""
        from dft_lightning.data.rendering import ChatRenderer

        options = self.options
        return ChatRenderer(
            self._tokenizer,
            system_prompt=options.system_prompt,
            end_of_response=options.end_of_response,
            template_kwargs=options.template_kwargs,
        )

    def prepare_data(self) -> None:
        """Tokenise everything once, into the cache, before the other processes of the node read it."""
        self._load(None if self.trainer is None else self.trainer.state.fn)

    def setup(self, stage: str) -> None:
        """Open the tokenised rows, and derive the trainer's accumulation from the batch sizes."""
        loaded = self._load(stage)
        for name, rows in loaded.items():
            rank_zero_info(f"{name}: {rows.report}")
        self.train_rows = loaded.get("train", self.train_rows)
        self.val_rows = loaded.get("val", self.val_rows)
        self.test_rows = loaded.get("test", self.test_rows)
        if self.trainer is not None:
            _refuse_resampling(self.trainer)
        if self.trainer is not None and stage == "fit":
            self._align(self.trainer)

    def _load(self, command: str | None) -> dict[str, TokenizedRows]:
        """The rows that a command of the trainer needs, as far as there are such rows."""
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("train",)}
        stages = wanted.get(str(getattr(command, "value", command)), ("train", "val", "test"))
        return {stage: self._tokenize(rows) for stage, rows in self._pick(stages).items()}

    def _pick(self, stages: Sequence[str]) -> "dict[str, datasets.Dataset]":
        options, picked = self.options, {}
        for stage, split, path in (("val", "validation", options.val_path), ("test", "test", options.test_path)):
            if path is not None and stage in stages:
                picked[stage] = load_rows(dataset=None, path=path, split=split, cache_dir=options.cache_dir)
        if set(stages) <= picked.keys() | {"test"}:
            return picked
        source = load_rows(
            dataset=options.dataset,
            path=options.path,
            name=options.name,
            split=options.split,
            revision=options.revision,
            cache_dir=options.cache_dir,
        )
        train, val = self.split_rows(len(source))
        self.origin = {"train": train, "val": val}
        if "train" in stages:
            picked["train"] = source.select(train)
        if "val" in stages and len(val):
            picked["val"] = source.select(val)
        return picked

    def _tokenize(self, rows: "datasets.Dataset") -> TokenizedRows:
        options = self.options
        return tokenize(
            rows,
            self.renderer,
            self.columns,
            max_length=options.max_length,
            overlength=options.overlength,
            cache_dir=Path(options.cache_dir or default_cache_dir()) / "tokens",
            workers=options.tokenize_workers,
            max_unusable_share=options.max_unusable_share,
        )

    def split_rows(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sorted indices of the rows to train and to validate on, out of `count`; the two never meet.

        Validation rows come from the end of the order (shuffled for subset="random"), so that the training rows stay
        the same whatever `val_size` is, as long as there are rows enough.
        """
        options = self.options
        order = np.arange(count)
        if options.subset == "random":
            order = np.random.default_rng(options.seed).permutation(count)
        size, most = 0 if options.val_path else options.val_size, min(options.num_samples or count, count)
        val = int(size) if size >= 1 else max(round(size * most), 1 if size else 0)  # one at least, where asked for
        if val >= count:
            raise UserError(f"data.val_size {size} leaves nothing to train on: there are {count} rows")
        train = order[: min(options.num_samples or count, count - val)]
        return np.sort(train), np.sort(order[count - val :])

    # -- batches ----------------------------------------------------------------------------------------------------

    def geometry(self) -> Geometry:
        """How an optimizer step is cut up on this trainer's ranks."""
        options, trainer = self.options, self.trainer
        ranks, rank = (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
        return Geometry(options.global_batch_size, options.micro_batch_size, ranks, rank)

    def _align(self, trainer: pl.Trainer) -> None:
        """Accumulation and validation interval count in optimizer steps, whatever the geometry."""
        if trainer.accumulate_grad_batches not in (1, self._accumulation):
            raise UserError(
                f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}: leave it out; it follows from "
                "data.global_batch_size, data.micro_batch_size and the number of devices"
            )
        steps = self.sampler().steps
        if steps == 0:
            raise UserError(
                f"{len(self._rows('train'))} training rows do not fill one step of data.global_batch_size "
                f"{self.options.global_batch_size}: lower it, or set data.drop_last to false"
            )
        if trainer.accumulate_grad_batches == self._accumulation:  # a second fit of the same trainer
            return
        trainer.accumulate_grad_batches = self._accumulation = self.geometry().micro_batches
        interval = trainer.val_check_interval
        if isinstance(interval, float) and interval < 1.0:
            interval = max(1, int(interval * steps))
        if isinstance(interval, int):
            if interval > steps and trainer.check_val_every_n_epoch is not None:
                raise UserError(
                    f"trainer.val_check_interval is {interval} optimizer steps, an epoch has {steps}: lower it, or set "
                    "trainer.check_val_every_n_epoch to null to count over epochs"
                )
            trainer.val_check_interval = interval * trainer.accumulate_grad_batches

    def sampler(self) -> StepSampler:
        """The training steps."""
        options = self.options
        return StepSampler(
            self._rows("train").lengths,
            self.geometry(),
            seed=options.seed if options.shuffle else None,
            grouping=options.grouping,
            drop_last=options.drop_last,
        )

    def _rows(self, stage: str) -> TokenizedRows:
        rows: TokenizedRows | None = {"train": self.train_rows, "val": self.val_rows, "test": self.test_rows}[stage]
        assert rows is not None, f"no {stage} rows"
        return rows

    def train_dataloader(self) -> "DataLoader[Batch]":
        """Micro-batches of the training steps; after a resume, from where the checkpoint was written."""
        sampler = self.sampler()
        sampler.epoch, sampler.start = self._resume["epoch"], self._resume["batches"]
        return self._loader(self._rows("train"), sampler, "train")

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
        return rows.select(self.sampler().rows_of_steps(steps))

    def scoring_loader(self, rows: TokenizedRows, stage: str, workers: int | None = None) -> "DataLoader[Batch]":
        """Every row once, dealt over the ranks without repeats; ranks get equally many batches, empty ones included."""
        shape = self.geometry()
        whole = Geometry(max(len(rows), 1), shape.micro_batch_size, shape.ranks, shape.rank)
        return self._loader(rows, StepSampler(rows.lengths, whole), stage, workers)

    def _loader(
        self, rows: TokenizedRows, sampler: StepSampler, stage: str, workers: int | None = None
    ) -> "DataLoader[Batch]":
        workers = self.options.num_workers if workers is None else workers
        tokenizer = self._tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        dataset: Any = rows  # of dictionaries, which the collator makes batches of
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=Collator(pad, self.reference, stage),
            num_workers=workers,
            generator=torch.Generator(),  # it draws from the global one otherwise, and dropout would hang on validation
            persistent_workers=workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    # -- resuming ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where in the data the run is: right at the end of an optimizer step, when checkpoints are written."""
        assert self.trainer is not None
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        epoch, total = self.trainer.current_epoch, len(self.sampler())
        return {"epoch": epoch + done // total, "batches": done % total, "steps": self._identity()}

    def _identity(self) -> dict[str, Any]:
        """What decides which rows each micro-batch has."""
        options, shape = self.options, self.geometry()
        return {
            "training rows": self._rows("train").fingerprint,
            "data.global_batch_size": options.global_batch_size,
            "micro-batches a step": shape.micro_batches,
            "data.seed": options.seed,
            "data.shuffle": options.shuffle,
            "data.drop_last": options.drop_last,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue there; refused where the steps would be others than the checkpoint's.

        Raises:
            UserError: rows, batch sizes, seed or shuffle differ; it names what does.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        now = self._identity()
        then = {key: state_dict["steps"].get(key) for key in now}
        if changed := [f"{key}: {then[key]!r} → {now[key]!r}" for key in now if then[key] != now[key]]:
            raise UserError(
                f"the checkpoint's run has other steps ({'; '.join(changed)}), so that rows would be repeated or left "
                "out: give the same options and number of devices, or start a new run from its exported model"
            )
        self._resume = {"epoch": state_dict["epoch"], "batches": state_dict["batches"]}


class NuminaMathDataModule(ChatDataModule):
    """NuminaMath-CoT (Apache-2.0, 859,494 problems with solutions), rendered as the DFT paper did.

    The problem is one user turn, without a suffix; the answer is the raw solution and the tokenizer's eos token.
    Arguments are those of `ChatDataModule`; `path` takes local files of the same columns in place of the hub set.
    """

    def __init__(
        self,
        path: str | None = None,
        dataset: str | None = None,
        messages: str | None = None,
        prompt: str | None = "problem",
        completion: str | None = "solution",
        end_of_response: Literal["template", "eos"] = "eos",
        **kwargs: Any,
    ) -> None:
        if path is None and dataset is None:
            dataset = "AI-MO/NuminaMath-CoT"
        super().__init__(
            path,
            dataset,
            messages=messages,
            prompt=prompt,
            completion=completion,
            end_of_response=end_of_response,
            **kwargs,
        )


def _refuse_resampling(trainer: pl.Trainer) -> None:
    """Lightning's own sampler would shuffle and repeat rows behind our back."""
    if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
        raise UserError(
            "several devices: set Trainer(use_distributed_sampler=False); the data module deals out the rows"
        )


def _refuse(options: SimpleNamespace) -> None:
    """Options that contradict each other or make no sense, before anything is read."""
    if (options.path is None) == (options.dataset is None):
        raise UserError("say what to train on: either data.path (local files) or data.dataset (a set on the hub)")
    for key in ("global_batch_size", "micro_batch_size", "max_length"):
        if getattr(options, key) < 1:
            raise UserError(f"data.{key} is {getattr(options, key)}; expected 1 or more")
    if options.num_samples is not None and options.num_samples < 1:
        raise UserError(f"data.num_samples is {options.num_samples}; expected 1 or more, or null for all rows")
    if options.num_workers < 0:
        raise UserError(f"data.num_workers is {options.num_workers}; expected 0 or more")
    if options.val_size < 0:
        raise UserError(f"data.val_size is {options.val_size}; expected a count, or a share below 1")
