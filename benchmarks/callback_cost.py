"""What `TokenProbabilities` costs at its defaults: time spent in it, as a share of the training time.

python benchmarks/callback_cost.py [--steps 50 --rows 8]

The share falls as steps get longer: a report scores 16 rows, a step of the paper's recipe trains 256.
"""

import argparse
import tempfile
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from dft_lightning import FineTuner
from dft_lightning.callbacks import TokenProbabilities
from dft_lightning.data import PracticeDataModule
from dft_lightning.weighting import DFT


class Timed(TokenProbabilities):
    """Counts the seconds spent in its hooks during training."""

    seconds = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        began = time.perf_counter()
        super().on_train_batch_start(*args)
        self.seconds += time.perf_counter() - began

    def on_train_batch_end(self, *args: Any) -> None:
        began = time.perf_counter()
        super().on_train_batch_end(*args)
        self.seconds += time.perf_counter() - began


class Clock(pl.Callback):
    """Times the training, from the first step on."""

    def on_train_start(self, *_: Any) -> None:
        self.began = time.perf_counter()

    def on_train_end(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--model_name", default="smollm2-135m-instruct")
    options = parser.parse_args()
    pl.seed_everything(0)
    timed, clock = Timed(), Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=options.steps,
            max_epochs=-1,
            accelerator="cpu",
            precision="bf16-true",
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
            log_every_n_steps=1,
            callbacks=[timed, clock],
        )
        data = PracticeDataModule(
            problems=options.rows * options.steps, global_batch_size=options.rows, micro_batch_size=options.rows
        )
        trainer.fit(FineTuner(options.model_name, DFT()), data)
    share = 100 * timed.seconds / clock.seconds
    print(f"{options.steps} steps of {options.rows} rows: {timed.seconds:.2f} of {clock.seconds:.1f} s, {share:.2f} %")
    print(f"(a report every {timed.every_n_steps} steps on {timed.probe_rows} probe rows)")


if __name__ == "__main__":
    main()
