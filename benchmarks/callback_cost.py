"""What `TokenProbabilities` costs at its defaults: time spent in a report, as a share of the time from one to the next.

python benchmarks/callback_cost.py [--steps 50 --rows 8]

The share falls as steps get longer: a report scores 16 rows, a step of the paper's recipe trains 256. Seconds of the
clock and of the processor: where other work keeps the machine busy, the latter are to be believed. The report at the
end, the one that counts here with the defaults, has all pictures; as a rule every fifth has.
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


def now() -> tuple[float, float]:
    """Seconds of the clock, and of this process's processors."""
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float]) -> tuple[float, float]:
    ended = now()
    return ended[0] - began[0], ended[1] - began[1]


class Timed(TokenProbabilities):
    """Counts the seconds spent in its hooks during training."""

    clock = processor = 0.0

    def on_train_start(self, *args: Any) -> None:
        began = now()
        super().on_train_start(*args)
        self.at_start = since(began)

    def on_train_batch_start(self, *args: Any) -> None:
        began = now()
        super().on_train_batch_start(*args)
        self._add(since(began))

    def on_train_batch_end(self, *args: Any) -> None:
        began = now()
        super().on_train_batch_end(*args)
        self._add(since(began))

    def _add(self, seconds: tuple[float, float]) -> None:
        self.clock += seconds[0]
        self.processor += seconds[1]


class Clock(pl.Callback):
    """Times the training, from the first step on."""

    def on_train_start(self, *_: Any) -> None:
        self.began = now()

    def on_train_end(self, *_: Any) -> None:
        self.clock, self.processor = since(self.began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--model_name", default="smollm2-135m-instruct")
    options = parser.parse_args()
    pl.seed_everything(0)
    timed, whole = Timed(), Clock()
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
            callbacks=[timed, whole],
        )
        data = PracticeDataModule(
            problems=options.rows * options.steps, global_batch_size=options.rows, micro_batch_size=options.rows
        )
        trainer.fit(FineTuner(options.model_name, DFT()), data)
    every, steps = timed.every_n_steps, options.steps
    print(
        f"{steps} steps of {options.rows} rows, and a report of {timed.probe_rows} rows; a report every {every} steps:"
    )
    for name, spent, total in (
        ("clock", timed.clock, whole.clock),
        ("processor", timed.processor, whole.processor),
    ):
        training = (total - spent) / steps * every
        share = 100 * spent / (spent + training)
        print(f"{name}: {spent:.2f} s for {training:.1f} s of training, {share:.2f} %")
    print("once, before the first step: {:.2f} s of the clock, {:.2f} of the processor".format(*timed.at_start))


if __name__ == "__main__":
    main()
