"""`dft fit` as anyone runs it, with a meter among its callbacks.

python benchmarks/peers/ours.py RESULT.json WARMUP fit OPTION …        (`step_vs_peers.py` starts this)
"""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from meter import Meter

from dft_lightning.cli import CommandLine, run


class Watch(pl.Callback):
    """Tells the meter of steps, losses and real tokens."""

    def __init__(self, meter: Meter) -> None:
        self.meter, self.tokens, self.pending = meter, [], 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.meter.loaded(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.pending += batch.tokens
        if trainer.global_step > self.meter.steps:
            self.meter.step_done()
            self.meter.losses.append(float(trainer.callback_metrics["train/objective"]))
            self.tokens.append(self.pending)
            self.pending = 0


def main() -> int:
    result, warmup, *options = sys.argv[1:]
    watch = Watch(Meter(int(warmup)))

    class Watched(CommandLine):
        """The command, with the watch beside its own callbacks."""

        def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks.insert(0, watch)  # before any checkpoint is written
            return trainer

    status = run(Watched, options)
    if status == 0:
        watch.meter.write(Path(result), watch.tokens)
    return status


if __name__ == "__main__":
    sys.exit(main())
