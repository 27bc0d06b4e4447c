"""Steps whose loss or gradient is not finite: passed over, counted, and their rows named."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dft_lightning.disk import writing

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from dft_lightning.data.batch import Batch
    from dft_lightning.weighting import TokenStats


@dataclass
class SkippedSteps:
    """Counts them over the run, and remembers which rows the present step has.

    Args:
        limit: so many in a row end the run.
    """

    limit: int
    total: int = 0
    in_a_row: int = 0
    this_one: bool = False
    """Whether the present step is passed over."""
    _rows: list[Tensor] = field(default_factory=list)
    _bad: list[Tensor] = field(default_factory=list)

    def see(self, batch: "Batch", tokens: "TokenStats") -> None:
        """Remember a micro-batch of the present step; without waiting for the device."""
        bad = ~torch.isfinite(tokens.logp) | ~torch.isfinite(tokens.need("weight"))
        self._rows.append(batch.row)
        self._bad.append(torch.where(bad, batch.row[batch.sequence], -1))

    def judge(self, finite: bool, trainer: "pl.Trainer", facts: dict[str, float]) -> None:
        """Take note of how the present step came out; its rows go to `run_dir/skipped_steps.jsonl` if it is skipped."""
        self.this_one = not finite
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if not finite:
            self.total += 1
            self._report(trainer, facts)
        self._rows, self._bad = [], []

    @property
    def too_many(self) -> bool:
        """Whether the run is to end, after the present step."""
        return self.this_one and self.in_a_row >= self.limit

    def forget_later(self, trainer: "pl.Trainer") -> None:
        """Take out of the file what an earlier process has named of steps that are yet to come."""
        path = self._file(trainer)
        if trainer.is_global_zero and path.exists():
            lines = path.read_text().splitlines(keepends=True)
            # a last line without its end was cut off by a kill
            whole = [line for line in lines if line.endswith("\n")]
            unfinished = path.with_name(f".{path.name}.unfinished")
            with writing(path, "--run_dir"):
                unfinished.write_text("".join(line for line in whole if json.loads(line)["step"] < trainer.global_step))
                os.replace(unfinished, path)

    @staticmethod
    def _file(trainer: "pl.Trainer") -> Path:
        return Path(trainer.default_root_dir) / "skipped_steps.jsonl"

    def _report(self, trainer: "pl.Trainer", facts: dict[str, float]) -> None:
        mine = [torch.cat(parts).cpu().tolist() for parts in (self._rows, self._bad)]
        every: list[Any] = [mine]
        if trainer.world_size > 1:
            every = [None] * trainer.world_size
            torch.distributed.all_gather_object(every, mine)
        if not trainer.is_global_zero:
            return
        origin = getattr(getattr(trainer, "datamodule", None), "origin", {}).get("train")
        rows, bad = (sorted({row for part in every for row in part[which] if row >= 0}) for which in (0, 1))
        named = [[int(row if origin is None else origin[row]) for row in some] for some in (rows, bad)]
        path = self._file(trainer)
        line = {"step": trainer.global_step, **{key: repr(value) for key, value in facts.items()}}
        with writing(path, "--run_dir"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(line | {"rows_with_a_non_finite_token": named[1], "rows": named[0]}) + "\n")
        rank_zero_warn(
            f"step {trainer.global_step} is skipped: its loss or gradient is not finite "
            f"({', '.join(f'{key} {value}' for key, value in facts.items())}); weights, optimizer and schedule stay as "
            f"they are. {self.in_a_row} in a row, {self.limit} end the run. Its rows: {path}"
        )

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load(self, state: dict[str, int]) -> None:
        """Go on counting."""
        self.total, self.in_a_row = state["total"], state["in_a_row"]
