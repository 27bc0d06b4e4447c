"""A progress bar in a terminal, a line now and then in a log file."""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_only

if TYPE_CHECKING:
    from dft_lightning.module import FineTuner


class Progress(TQDMProgressBar):
    """Objective, plain NLL, tokens/s and model-FLOP utilisation (by `Throughput`), and the time that is left.

    Args:
        line_every_s: where the output is no terminal, seconds between two lines.
    """

    def __init__(self, line_every_s: float = 10.0) -> None:
        super().__init__()
        self.line_every_s = line_every_s
        self._last_line = self._began = self._began_pass = time.monotonic()
        self._first_step = self._shown_step = 0

    def disable(self) -> None:
        """Called on every rank but the first."""
        super().disable()
        self.line_every_s = float("inf")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the bar or the lines."""
        super().setup(trainer, pl_module, stage)
        if not sys.stdout.isatty():
            super().disable()

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What stands behind the bar: short names, no version number."""
        shown: dict[str, Any] = {
            name.removeprefix("train/"): value for name, value in trainer.progress_bar_metrics.items()
        }
        if (speed := shown.pop("throughput/tokens_per_second", None)) is not None:
            shown["tok/s"] = round(speed)
        if (share := shown.pop("throughput/mfu", None)) is not None:
            shown["mfu"] = f"{share:.1%}"
        return cast("dict[str, int | str | float | dict[str, float]]", shown)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._began, self._first_step = time.monotonic(), trainer.global_step
        self._shown_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Move the bar, or write a line where one is due."""
        super().on_train_batch_end(trainer, pl_module, *args)
        now, done, total = time.monotonic(), trainer.global_step, cast("FineTuner", pl_module).total_steps
        due = now - self._last_line >= self.line_every_s or done == total
        if sys.stdout.isatty() or not due or done == self._shown_step:  # a step has several micro-batches
            return
        self._last_line, self._shown_step = now, done
        left = (now - self._began) / (done - self._first_step) * (total - done)
        metrics = ", ".join(_short(name, value) for name, value in self.get_metrics(trainer, pl_module).items())
        _say(f"step {done}/{total}, {metrics}, {left / 60:.1f} min left")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Move the bar, or write a line where one is due."""
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, *args)
        self._batch_line("validation", batch_idx, trainer.num_val_batches)

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Move the bar, or write a line where one is due."""
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, *args)
        self._batch_line("test", batch_idx, trainer.num_test_batches)

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Move the bar, or write a line where one is due."""
        super().on_predict_batch_end(trainer, pl_module, outputs, batch, batch_idx, *args)
        self._batch_line("prediction", batch_idx, trainer.num_predict_batches)

    def _batch_line(self, name: str, batch: int, totals: Sequence[int | float]) -> None:
        """Where no steps are counted: the batches of this pass, their rate and the time that is left."""
        now = time.monotonic()
        if batch == 0:
            self._began_pass = now  # the first batch may compile, or load
        if sys.stdout.isatty() or batch == 0 or now - self._last_line < self.line_every_s:
            return
        self._last_line = now
        total, rate = sum(totals), batch / max(now - self._began_pass, 1e-9)
        left = (total - batch - 1) / rate
        _say(f"{name}: batch {batch + 1}/{total:g}, {rate:.3g} per second, {left / 60:.1f} min left")


def _short(name: str, value: Any) -> str:
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


@rank_zero_only
def _say(line: str) -> None:
    print(line, flush=True)
