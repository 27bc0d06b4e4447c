"""`dft fit` with every weighting on the same rows in the same order: what each makes of them, and at what price.

    python benchmarks/weightings.py [--path rows.parquet] [--steps 10 --rows 4] [--only DFT EAFT …]

Without --path it trains on the embedded practice problems. `my_weighting.Confident` comes from a file outside the
package. tokens/s, the processor's time of the training after its first step, and peak memory are relative to a run with
Uniform; one is made before every fourth weighting, and the two neighbours before and after are averaged, since speed
drifts on a shared machine. Where others keep it busy, the processor's time is to be believed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dft_lightning.weighting.catalogue import entries
from dft_lightning.weighting.composition import Modifier

OWN = '''"""A weighting of one's own."""

from dataclasses import dataclass

from torch import Tensor

from dft_lightning.weighting import TokenStats, TokenWeighting


@dataclass(frozen=True)
class Confident(TokenWeighting):
    """w = p^power."""

    power: float = 2.0

    def weights(self, tokens: TokenStats) -> Tensor:
        return tokens.p**self.power
'''
CLOCK = '''"""Processor seconds of the training after its first step."""

import time
from pathlib import Path

from lightning.pytorch import Callback


class Clock(Callback):
    began = None

    def on_train_batch_end(self, trainer, *_):
        if self.began is None and trainer.global_step:
            self.began = time.process_time()

    def on_train_end(self, trainer, *_):
        spent = time.process_time() - self.began
        (Path(trainer.default_root_dir) / "processor_seconds").write_text(str(spent))
'''
SHOWN = ("nll", "p_mean", "weight_mean", "effective_sample_size", "grad_norm")
PRICE = ("tokens_per_second", "processor", "memory")
BETWEEN = 4  # weightings from one run with Uniform to the next


OPTIONS = {"Thresholded": {"threshold": "0.1"}}  # of fields without a default
WITHOUT = {"Uniform", "DataWeighted"}  # the yardstick; and these rows have no weights


def every_weighting() -> list[str]:
    """Names of all that the package has, and one of a user's."""
    return [entry.name for entry in entries() if entry.name not in WITHOUT] + ["my_weighting.Confident"]


def options_of(name: str) -> list[str]:
    """What a weighting's fields get: by default nothing; what is modified is DFT."""
    chosen = dict(OPTIONS.get(name, {}))
    cls = next((entry.cls for entry in entries() if entry.name == name), None)
    if cls is not None and issubclass(cls, Modifier):
        chosen["of"] = "DFT"
    return [part for field, value in chosen.items() for part in (f"--model.weighting.{field}", value)]


def fit(options: argparse.Namespace, weighting: str, run: Path) -> dict[str, Any]:
    """One run in a process of its own: every step's scalars, the median speed and the peak memory."""
    data = ["--data", "PracticeDataModule"]
    if options.path:
        data = ["--data", "NuminaMathDataModule", "--data.path", str(Path(options.path).absolute())]
    command = [
        sys.executable,
        "-m",
        "dft_lightning",
        "fit",
        "--run_dir",
        str(run),
        "--model.weighting",
        weighting,
        *options_of(weighting),
    ]
    command += ["--model.model_name", options.model_name, *data, "--data.global_batch_size", str(options.rows)]
    command += ["--data.micro_batch_size", str(min(options.rows, 4)), "--data.max_length", str(options.max_length)]
    command += ["--trainer.max_steps", str(options.steps), "--trainer.precision", options.precision]
    command += [
        "--trainer.gradient_clip_val",
        "1.0",
        "--export.enabled",
        "false",
        "--token_probabilities.every_n_steps",
        "0",
    ]
    command += ["--checkpoints.save_best", "false", "--trainer.callbacks+=clock.Clock"]
    subprocess.run(command, check=True, cwd=run.parent, stdout=sys.stderr)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(("train/", "throughput/"))]
    found: dict[str, Any] = {tag.split("/")[1]: [event.value for event in events.Scalars(tag)] for tag in tags}
    memory = next(name for name in found if name.endswith("_gib"))
    price = {"tokens_per_second": statistics.median(found["tokens_per_second"]), "memory": max(found[memory])}
    processor = float((run / "processor_seconds").read_text())
    return found | price | {"processor": processor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--model_name", default="smollm2-135m-instruct")
    parser.add_argument("--precision", default="bf16-true")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    columns = [
        "weighting",
        "NLL step 1",
        *(f"{name}, last" for name in SHOWN),
        "tokens/s",
        "of Uniform's",
        "processor",
        "memory",
    ]
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "my_weighting.py").write_text(OWN)
        (Path(folder) / "clock.py").write_text(CLOCK)
        names = options.only or every_weighting()
        before = uniform(options, Path(folder), 0)
        for start in range(0, len(names), BETWEEN):
            group = [(name, fit(options, name, Path(folder) / name)) for name in names[start : start + BETWEEN]]
            after = uniform(options, Path(folder), start + 1)
            yardstick = {key: (before[key] + after[key]) / 2 for key in PRICE}
            for name, found in group:
                report(name, found, yardstick)
            before = after


def uniform(options: argparse.Namespace, folder: Path, number: int) -> dict[str, Any]:
    """A run with Uniform; the first one is reported."""
    found = fit(options, "Uniform", folder / f"uniform-{number}")
    if not number:
        report("Uniform", found, found)
    return found


def report(name: str, found: dict[str, Any], yardstick: dict[str, float]) -> None:
    """A line of the table."""
    values = [f"{found['nll'][0]:.6f}", *(f"{found[shown][-1]:.4f}" for shown in SHOWN)]
    values += [f"{found['tokens_per_second']:.0f}", *(f"{found[key] / yardstick[key]:.2f}" for key in PRICE)]
    print(f"| {name} | " + " | ".join(values) + " |", flush=True)


if __name__ == "__main__":
    main()
