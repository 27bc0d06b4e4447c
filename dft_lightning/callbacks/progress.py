"""A progress bar in a terminal, a line now and then in a log file."""

import sys
import time
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
        self._last_line = self._began = time.monotonic()
        self._first_step = 0

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

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Move the bar, or write a line where one is due."""
        super().on_train_batch_end(trainer, pl_module, *args)
        now, done, total = time.monotonic(), trainer.global_step, cast("FineTuner", pl_module).total_steps
        due = now - self._last_line >= self.line_every_s or done == total
        if sys.stdout.isatty() or not due or done == self._first_step:
            return
        self._last_line = now
        left = (now - self._began) / (done - self._first_step) * (total - done)
        metrics = ", ".join(_short(name, value) for name, value in self.get_metrics(trainer, pl_module).items())
        _say(f"step {done}/{total}, {metrics}, {left / 60:.1f} min left")


def _short(name: str, value: Any) -> str:
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


@rank_zero_only
def _say(line: str) -> None:
    print(line, flush=True)
