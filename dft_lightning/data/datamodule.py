"""`ChatDataModule`: which rows a run trains and validates on, and how they become tokens."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from dft_lightning.data.alignment import refuse_options, refuse_resampling
from dft_lightning.data.loaders import StepLoaders
from dft_lightning.data.packing import Grouping
from dft_lightning.data.rows import StageRows, split_rows
from dft_lightning.data.sources import Columns
from dft_lightning.data.store import TokenizedRows
from dft_lightning.data.unsupported import unused_line

if TYPE_CHECKING:
    from dft_lightning.data.rendering import ChatRenderer
    from dft_lightning.module import FineTuner


class ChatDataModule(StepLoaders):
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
        ignore: columns, and keys of messages, to pass over on purpose, for instance [tools, train]: those that would be
            refused because they say what is shown or trained on, and those that would be listed as not used.
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
        seed: of the shuffle, the subset and the validation split; by default that of seed_everything.
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
        ignore: list[str] | None = None,
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
        seed: int | None = None,
        num_workers: int = 0,
        tokenize_workers: int | None = None,
        max_unusable_share: float = 0.1,
        cache_dir: str | None = None,
    ) -> None:
        self.options = SimpleNamespace(
            **{key: value for key, value in locals().items() if key not in {"self", "__class__"}}
        )
        super().__init__()
        self.columns = Columns(messages, prompt, completion, weight, tuple(ignore or ()))
        self._rows_reader: StageRows | None = None
        self._said: set[str] = set()  # what was listed as not used
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
        names = {name for rows in loaded.values() for name in rows.report.unused}
        if line := unused_line(names - self._said, self.columns.ignore):
            rank_zero_info(line)
        self._said |= names
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
        return split_rows(count, self.options, self.seed)
