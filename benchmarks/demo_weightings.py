"""The demo with SFT, with DFT and a floor, and with plain DFT: held-out accuracy and likelihood side by side.

python benchmarks/demo_weightings.py [--seeds 0]      (about 3 minutes a run on 2 cores)
"""

import argparse
import contextlib
import sys
from pathlib import Path

from dft_lightning.cli import run
from dft_lightning.demo import Demo, Look, comparison

CONFIG = str(Path(__file__).parents[1] / "configs" / "demo.yaml")
WEIGHTINGS = {
    "SFT": ["--model.weighting", "Uniform"],
    "DFT(floor=0.1)": ["--model.weighting", "DFT", "--model.weighting.floor", "0.1"],
    "DFT(floor=0)": ["--model.weighting", "DFT", "--model.weighting.floor", "0"],
}


def demo(arguments: list[str]) -> tuple[Look, Look]:
    """The looks before and after one run of the demo."""
    seen = []

    class Kept(Demo):
        def after_fit(self) -> None:
            super().after_fit()
            seen.append(self.result)

    with contextlib.redirect_stdout(sys.stderr):
        assert run(Kept, ["fit", "--config", CONFIG, *arguments]) == 0
    (result,) = seen
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    header = None
    for seed in options.seeds:
        for number, (name, weighting) in enumerate(WEIGHTINGS.items()):
            folder = f"runs/demo-weightings/{number}-{seed}"
            before, after = demo(
                [*weighting, "--run_dir", folder, "--seed_everything", str(seed), "--data.seed", str(seed)]
            )
            rows = comparison(before, after)
            if header is None:
                header = list(rows)
                print("| seed | model | " + " | ".join(header) + " |\n" + "|---" * (len(header) + 2) + "|")
                print("| | before | " + " | ".join(pair[0] for pair in rows.values()) + " |")
            print(f"| {seed} | {name} | " + " | ".join(pair[1] for pair in rows.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
