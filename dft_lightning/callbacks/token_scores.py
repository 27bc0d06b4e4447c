"""`dft predict`: one row of parquet for every supervised token."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from dft_lightning.disk import writing

if TYPE_CHECKING:
    import pyarrow.parquet as pq
    from torch import Tensor

    from dft_lightning.data.batch import Batch


class TokenScores(Callback):
    """Writes `run_dir/predictions/part-<rank>.parquet` as the batches are scored.

    Columns: `row` (of the source), `position` (in its response), `token_id`, `token` (its text), `logp` (nats), `p`,
    `entropy` (nats), `rank` (0: the likeliest), `weight` (NaN for one that looks at whole steps: there are none
    here). Read the folder as one table. It appears when all is written.
    """

    def __init__(self) -> None:
        self._writer: pq.ParquetWriter | None = None

    @staticmethod
    def folder(trainer: pl.Trainer) -> Path:
        """Where the scores go."""
        return Path(trainer.default_root_dir) / "predictions"

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the folder, without what a predict that was cut off has left there."""
        if trainer.is_global_zero:
            self._remove(trainer, r"\.part-\d{5}\.parquet\.unfinished")
        trainer.strategy.barrier()
        with writing(self.folder(trainer), "--run_dir"):
            self.folder(trainer).mkdir(parents=True, exist_ok=True)

    def _remove(self, trainer: pl.Trainer, name: str) -> None:
        """Of our own files alone, maybe those of more ranks."""
        for path in [*self.folder(trainer).glob("*")]:
            if re.fullmatch(name, path.name) and (path.is_file() or path.is_symlink()):
                path.unlink()

    def _part(self, trainer: pl.Trainer) -> Path:
        return self.folder(trainer) / f".part-{trainer.global_rank:05d}.parquet.unfinished"

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: "tuple[Batch, dict[str, Tensor]]",
        *_: Any,
    ) -> None:
        """Append the batch's tokens; a rank with less to do than others gets empty batches."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        batch, tokens = outputs
        if not len(tokens["logp"]):
            return
        table = pa.table(_columns(batch, tokens, trainer.datamodule.origin["train"], pl_module.tokenizer))  # type: ignore[attr-defined]
        with writing(self._part(trainer), "--run_dir"):
            if self._writer is None:
                self._writer = pq.ParquetWriter(self._part(trainer), table.schema)
            self._writer.write_table(table)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the files and give them their names, in place of those of an earlier predict."""
        written, self._writer = self._writer, None
        if written is not None:
            with writing(self._part(trainer), "--run_dir"):
                written.close()
        trainer.strategy.barrier()  # all are complete
        if trainer.is_global_zero:
            self._remove(trainer, r"part-\d{5}\.parquet")
        trainer.strategy.barrier()
        if written is None:
            return
        part = self._part(trainer)
        part.rename(part.with_name(part.name.removeprefix(".").removesuffix(".unfinished")))
        rank_zero_info(f"Token scores written to {self.folder(trainer)}")


def _columns(batch: "Batch", tokens: "dict[str, Tensor]", origin: np.ndarray, tokenizer: Any) -> dict[str, np.ndarray]:
    """One value a token."""
    numbers = {name: value.cpu().numpy() for name, value in tokens.items()}
    ids, which = np.unique(numbers["target"], return_inverse=True)
    rows = batch.row.cpu().numpy()[numbers["sequence"]]
    return {
        "row": origin[rows],
        "position": numbers["position"],
        "token_id": numbers["target"],
        "token": np.array([tokenizer.decode([token]) for token in ids], dtype=object)[which],
        "logp": numbers["logp"],
        "p": np.exp(numbers["logp"]),
        "entropy": numbers["entropy"],
        "rank": numbers["rank"],
        "weight": numbers["weight"],
    }
