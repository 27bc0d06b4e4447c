"""`dft predict`: one row of parquet for every supervised token."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

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
        """Make the folder, without what an earlier run, maybe on more ranks, has left there."""
        if trainer.is_global_zero:
            shutil.rmtree(self.folder(trainer), ignore_errors=True)
        trainer.strategy.barrier()
        self.folder(trainer).mkdir(parents=True, exist_ok=True)

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
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._part(trainer), table.schema)
        self._writer.write_table(table)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the file and give it its name."""
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
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
