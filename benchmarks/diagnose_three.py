"""`dft diagnose` on three kinds of data made or taken from the same place: do the pages tell them apart?

python benchmarks/diagnose_three.py --path train.parquet [--rows 24] [--output folder]

Worked solutions (rows in NuminaMath-CoT's schema), the same problems with the final answer alone in place of the
solution, and plain chat (tests/data/chat.jsonl). Prints one table; pages and JSON of each set go to --output.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHOWN = {
    "tokens a turn, median": lambda signs, found: f"{signs['answer']:.0f}",
    "digits, operators, LaTeX": lambda signs, found: f"{signs['symbols']:.1%}",
    "p < 0.01": lambda signs, found: f"{signs['unexpected']:.1%}",
    "p .1 to .9": lambda signs, found: f"{signs['open']:.1%}",
    "−log p": lambda signs, found: f"{signs['nll']:.2f}",
    "entropy": lambda signs, found: f"{signs['entropy']:.2f}",
    "P(stop), median": lambda signs, found: f"{found['stop']['quantiles']['0.5']:.2g}",
    "cosine DFT, SFT": lambda signs, found: number(found, "cosine"),
    "norm of DFT / SFT": lambda signs, found: number(found, "ratio"),
    "verdict": lambda signs, found: f"{found['verdict']['kind']}: {found['verdict']['leaning']}",
}


def number(found: dict, name: str) -> str:
    """Of DFT's gradient."""
    return f"{found['weightings']['DFT']['direction'][name]:.3f}"


def final_answer(solution: str) -> str | None:
    r"""What the last \boxed{} holds, braces matched."""
    start = [match.end() for match in re.finditer(r"\\boxed\{", solution)]
    if not start:
        return None
    depth = 1
    for place in range(start[-1], len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[place], 0)
        if not depth:
            return solution[start[-1] : place]
    return None


def answers_only(path: Path, target: Path, count: int) -> None:
    """The first rows with an answer, and nothing but the answer as their solution."""
    import pyarrow.parquet as pq

    rows = pq.read_table(path, columns=["source", "problem", "solution"]).to_pylist()
    short = [row | {"solution": answer} for row in rows if (answer := final_answer(row["solution"]))]
    target.write_text("".join(json.dumps(row) + "\n" for row in short[:count]))


def diagnose(options: argparse.Namespace, name: str, data: list[str]) -> dict:
    """One diagnosis in a process of its own."""
    page = Path(options.output) / f"{name}.html"
    command = [sys.executable, "-m", "dft_lightning", "diagnose", "--model.model_name", options.model_name, *data]
    command += ["--data.max_length", str(options.max_length), "--data.micro_batch_size", "4"]
    command += ["--trainer.precision", options.precision, "--sample_rows", str(options.rows)]
    command += ["--gradient_rows", str(options.gradient_rows), "--output", str(page)]
    print(f"== {name}", file=sys.stderr)
    subprocess.run(command, check=True, stdout=sys.stderr)
    return json.loads(page.with_suffix(".json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--gradient_rows", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=384)
    parser.add_argument("--model_name", default="smollm2-135m-instruct")
    parser.add_argument("--precision", default="bf16-true")
    parser.add_argument("--output", default="runs/diagnose_three")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    Path(options.output).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "answers.jsonl"
        answers_only(Path(options.path), answers, 1000)
        sets = {
            "maths": ["--data", "NuminaMathDataModule", "--data.path", str(Path(options.path).absolute())],
            "answers": ["--data", "NuminaMathDataModule", "--data.path", str(answers)],
            "chat": ["--data", "ChatDataModule", "--data.path", str(ROOT / "tests" / "data" / "chat.jsonl")],
        }
        found = {name: diagnose(options, name, data) for name, data in sets.items()}
    print("| | " + " | ".join(found) + " |")
    print("|---" * (len(found) + 1) + "|")
    for name, value in SHOWN.items():
        print(f"| {name} | " + " | ".join(value(each["signs"], each) for each in found.values()) + " |")


if __name__ == "__main__":
    main()
