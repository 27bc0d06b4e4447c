"""The rows of each stage: picked from their source, split, rendered and tokenised."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from dft_lightning.data.sources import Columns, load_rows
from dft_lightning.data.store import TokenizedRows
from dft_lightning.data.tokenized import tokenize
from dft_lightning.embedded import cache_dir as default_cache_dir
from dft_lightning.errors import UserError
from dft_lightning.seeds import run_seed

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from dft_lightning.data.rendering import ChatRenderer


class StageRows:
    """Reads and tokenises what a data module's options name.

    Args:
        options: those of `ChatDataModule`.
        columns: where a conversation is in a row.
        tokenizer: with its chat template.
    """

    def __init__(self, options: SimpleNamespace, columns: Columns, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.options, self.columns, self.tokenizer = options, columns, tokenizer
        self.origin: dict[str, np.ndarray] = {}
        """Which row of its source each row of a stage is."""

    @cached_property
    def renderer(self) -> "ChatRenderer":
        """How conversations become tokens."""
        from dft_lightning.data.rendering import ChatRenderer

        options = self.options
        return ChatRenderer(
            self.tokenizer,
            system_prompt=options.system_prompt,
            end_of_response=options.end_of_response,
            template_kwargs=options.template_kwargs,
        )

    def load(self, stages: Sequence[str]) -> dict[str, TokenizedRows]:
        """The tokenised rows of these stages ("train", "val", "test"), as far as there are such rows."""
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
        seed = run_seed() if options.seed is None else options.seed
        train, val = split_rows(len(source), options, seed)
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
            message_weights=options.message_weights,
        )


def split_rows(count: int, options: SimpleNamespace, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of the rows to train and to validate on, out of `count`; the two never meet.

    Validation rows come from the end of the order (shuffled for subset="random"), so that the training rows stay the
    same whatever `val_size` is, as long as there are rows enough.
    """
    order = np.arange(count)
    if options.subset == "random":
        order = np.random.default_rng(seed).permutation(count)
    size, most = 0 if options.val_path else options.val_size, min(options.num_samples or count, count)
    val = int(size) if size >= 1 else max(round(size * most), 1 if size else 0)  # one at least, where asked for
    if val >= count:
        raise UserError(f"data.val_size {size} leaves nothing to train on: there are {count} rows")
    train = order[: min(options.num_samples or count, count - val)]
    return np.sort(train), np.sort(order[count - val :])
