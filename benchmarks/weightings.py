"""`dft fit` with each weighting on the same rows in the same order: what each makes of them, and at what speed.

python benchmarks/weightings.py [--path rows.parquet] [--steps 20 --rows 16] [--model_name smollm2-135m-instruct]

Without --path it trains on the embedded practice problems. The last weighting comes from a file outside the package.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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
WEIGHTINGS = ("Uniform", "DFT", "ImportanceWeighted", "my_weighting.Confident")
SHOWN = ("nll", "p_mean", "weight_mean", "effective_sample_size", "grad_norm")


def fit(options: argparse.Namespace, weighting: str, folder: Path) -> dict[str, list[float]]:
    """One run in a process of its own; every step's scalars."""
    run = folder / weighting
    data = ["--data", "PracticeDataModule"]
    if options.path:
        data = ["--data", "NuminaMathDataModule", "--data.path", str(Path(options.path).absolute())]
    command = [sys.executable, "-m", "dft_lightning", "fit", "--run_dir", str(run), "--model.weighting", weighting]
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
    command += ["--checkpoints.save_best", "false"]
    subprocess.run(command, check=True, cwd=folder, stdout=sys.stderr)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(("train/", "throughput/"))]
    return {tag.split("/")[1]: [event.value for event in events.Scalars(tag)] for tag in tags}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--model_name", default="smollm2-135m-instruct")
    parser.add_argument("--precision", default="bf16-true")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    print("| weighting | NLL step 1 | " + " | ".join(f"{name}, last" for name in SHOWN) + " | tokens/s, median |")
    print("|---" * (len(SHOWN) + 3) + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "my_weighting.py").write_text(OWN)
        for weighting in WEIGHTINGS:
            found = fit(options, weighting, Path(folder))
            speed = sorted(found["tokens_per_second"])[len(found["tokens_per_second"]) // 2]
            values = [f"{found['nll'][0]:.6f}", *(f"{found[name][-1]:.4f}" for name in SHOWN), f"{speed:.0f}"]
            print(f"| {weighting} | " + " | ".join(values) + " |", flush=True)


if __name__ == "__main__":
    main()
