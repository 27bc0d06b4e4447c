"""A whole fine-tuning run against TRL's `SFTTrainer`: same model, rows, tokens, precision and optimizer, pair by pair.

    python -m venv trl-env
    trl-env/bin/pip install torch==2.13.0        # from https://download.pytorch.org/whl/cpu where there is no GPU
    trl-env/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.23.0 accelerate peft datasets
    python benchmarks/step_vs_peers.py --path ROWS.parquet --peer_python trl-env/bin/python
        [--loss dft nll --peer_setting fast default --steps 6 --warmup 2 --repeat 3 --max_length 2048]
        [--ours "--data.micro_batch_size 4"] [--peer "gradient_checkpointing=false"]

Our data module tokenises once; the peer gets tokens and labels in a file, the rows of each step in the same order, so
only the trainers differ. Ours is `dft fit`; what follows --ours is added to its command (by default padding-free rows
and varlen attention). The settings of the peer are told in `peers/trl_sft.py`, and --peer overrides fields of its
`SFTConfig`. Each run has a process of its own; ours and the peer take turns, and a ratio is of two neighbours.

tokens/s are real tokens, without padding, of the steps after the warm-up; the ratio a CPU-second is the same with the
time that the cores spent, which others on the machine disturb less. Memory is the training's peak above the
loaded model (see `peers/meter.py`). The first losses of both must agree, or nothing is reported: see `tolerance`.

Liger and the hub's kernels have no CPU kernels and are not compared here. --device cuda is written, but was not tried.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dft_lightning.data import NuminaMathDataModule
from dft_lightning.data.store import TokenizedRows
from dft_lightning.embedded import NAME, embedded_model
from dft_lightning.loading import ModelSource, load_tokenizer

HERE = Path(__file__).parent
WEIGHTING = {"dft": "DFT", "nll": "Uniform"}
PADDING_FREE = "--data.packing padding_free --data.micro_batch_size 2 --model.attn_implementation varlen"
BETAS = (0.9, 0.95)
COLUMNS = ("loss", "TRL's setting", "ours, tokens/s", "TRL's", "ratio", "each pair", "ratio a CPU-second")
COLUMNS += ("ours, memory", "TRL's", "ratio", "losses apart")


class DisagreementError(Exception):
    """The two sides did not compute the same loss: their speed cannot be compared."""


def tolerance(dtype: str, step: int) -> float:
    """How far the losses of a step (from 1) may be apart, relative to the loss.

    A logit rounded to `dtype` is off by up to eps/2 of itself, and a token's NLL is a difference of logits. Errors of
    tokens have either sign, and the mean over a step's hundreds of tokens stays below that of one logit: one eps. Each
    update before rounds the weights once more, hence one eps a step. That is 0.8 % in bfloat16. In float32 the sum over
    the vocabulary and the order of sums in 30 layers count too: 64 eps.
    """
    return step * torch.finfo(getattr(torch, dtype)).eps * (1 if dtype == "bfloat16" else 64)


def check_losses(ours: Sequence[float], peer: Sequence[float], steps: int, dtype: str) -> float:
    """The largest relative difference of the first losses.

    Raises:
        DisagreementError: it is more than `tolerance`, or there are fewer losses than `steps`.
    """
    if min(len(ours), len(peer)) < steps:
        raise DisagreementError(
            f"{len(ours)} losses of ours and {len(peer)} of the peer's; {steps} were to be compared"
        )
    apart = [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(ours[:steps], peer[:steps], strict=True)]
    for step, value in enumerate(apart, start=1):
        if not value <= tolerance(dtype, step):  # so that a NaN is refused too
            raise DisagreementError(
                f"the loss of step {step} is {ours[step - 1]:.6f} in ours and {peer[step - 1]:.6f} in the peer: "
                f"apart by {value:.3%}, expected at most {tolerance(dtype, step):.3%}. Compare rows, masks and divisors"
            )
    return max(apart)


def ratios(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], key: str) -> tuple[float, list[float]]:
    """Ours over the peer's: the median, and each pair's."""
    each = [ours[key] / max(peer[key], 1e-12) for ours, peer in pairs]
    return statistics.median(each), each


def take_rows(options: argparse.Namespace, model: str) -> tuple[TokenizedRows, int]:
    """The tokenised rows of all steps, and how many rows of the source they come from."""
    data = NuminaMathDataModule(options.path, max_length=options.max_length, subset="first", max_unusable_share=1.0)
    data.tokenizer = load_tokenizer(ModelSource(model))
    data.prepare_data()
    data.setup("fit")
    wanted = options.steps * options.rows
    assert data.train_rows is not None
    if len(data.train_rows) < wanted:
        sys.exit(f"{options.path} has {len(data.train_rows)} usable rows, {wanted} are needed: lower --steps or --rows")
    return data.train_rows.select(range(wanted)), data.train_rows[wanted - 1]["row"] + 1


def write_rows(rows: TokenizedRows, step: int, path: Path) -> None:
    """Tokens and labels for the peer; the longest of each step first, as our own grouping has them."""
    with path.open("w") as file:
        for start in range(0, len(rows), step):
            for row in sorted(
                (rows[index] for index in range(start, start + step)), key=lambda row: -len(row["input_ids"])
            ):
                labels = [
                    int(one) if own else -100 for one, own in zip(row["input_ids"], row["supervised"], strict=True)
                ]
                file.write(json.dumps({"input_ids": row["input_ids"].tolist(), "labels": labels}) + "\n")


def fit_command(options: argparse.Namespace, model: str, loss: str, source_rows: int, run: Path) -> list[str]:
    """`dft fit` with the recipe that both sides share."""
    precision = "bf16-true" if options.dtype == "bfloat16" else "32-true"
    shared = {
        "run_dir": run,
        "model.model_name": model,
        "model.weighting": WEIGHTING[loss],
        "model.optimizer": "torch.optim.AdamW",
        "model.optimizer.lr": options.lr,
        "model.optimizer.betas": json.dumps(BETAS),
        "model.optimizer.weight_decay": 0.0,
        "model.lr_schedule": "constant",
        "model.warmup_ratio": 0.0,
        "data": "NuminaMathDataModule",
        "data.path": Path(options.path).absolute(),
        "data.num_samples": source_rows,
        "data.subset": "first",
        "data.shuffle": "false",
        "data.max_length": options.max_length,
        "data.max_unusable_share": 1.0,
        "data.global_batch_size": options.rows,
        "trainer.max_steps": options.steps,
        "trainer.accelerator": "gpu" if options.device == "cuda" else "cpu",
        "trainer.devices": 1,
        "trainer.precision": precision,
        "trainer.gradient_clip_val": 1.0,
        "trainer.enable_progress_bar": "false",
        "export.enabled": "false",
        "checkpoints.save_best": "false",
        "token_probabilities.every_n_steps": 0,
    }
    given = [part for name, value in shared.items() for part in (f"--{name}", str(value))]
    return ["fit", *given, *shlex.split(options.ours)]


def run_ours(options: argparse.Namespace, model: str, loss: str, source_rows: int) -> dict[str, Any]:
    """One run of ours, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        fit = fit_command(options, model, loss, source_rows, Path(folder) / "run")
        command = [sys.executable, str(HERE / "peers" / "ours.py"), str(result), str(options.warmup), *fit]
        return _measured("ours", command, result, _devices(options) | {"PYTHONPATH": str(HERE.parent)})


def run_peer(options: argparse.Namespace, model: str, loss: str, setting: str, data: Path) -> dict[str, Any]:
    """One run of the peer, in its own environment."""
    with tempfile.TemporaryDirectory() as folder:
        result, job = Path(folder) / "result.json", Path(folder) / "job.json"
        shared = {
            key: getattr(options, key) for key in ("dtype", "device", "rows", "steps", "warmup", "lr", "max_length")
        }
        overrides = dict(pair.split("=", 1) for pair in options.peer)
        given = {"model": model, "loss": loss, "setting": setting, "betas": BETAS, "data": str(data), "folder": folder}
        given |= {"overrides": {key: json.loads(value) for key, value in overrides.items()}, "result": str(result)}
        job.write_text(json.dumps(shared | given))
        command = [options.peer_python, str(HERE / "peers" / "trl_sft.py"), str(job)]
        return _measured(f"TRL, {setting}", command, result, _devices(options) | {"PYTHONPATH": ""})


def _devices(options: argparse.Namespace) -> dict[str, str]:
    """What a run on the CPU must not see."""
    return {} if options.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}


def _measured(name: str, command: list[str], result: Path, more: Mapping[str, str]) -> dict[str, Any]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | more
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode or not result.exists():
        sys.exit(f"{name} failed ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def compare(options: argparse.Namespace, model: str, rows: Path, source_rows: int) -> None:
    """All pairs; a line a pair as it comes, and a table of medians at the end."""
    pairs: dict[tuple[str, str], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    apart: dict[tuple[str, str], float] = {}
    for _ in range(options.repeat):
        for loss in options.loss:
            for setting in options.peer_setting:
                ours = run_ours(options, model, loss, source_rows)
                peer = run_peer(options, model, loss, setting, rows)
                found = check_losses(ours["losses"], peer["losses"], options.check_steps, options.dtype)
                apart[loss, setting] = max(apart.get((loss, setting), 0.0), found)
                pairs.setdefault((loss, setting), []).append((ours, peer))
                for name, run in (("ours", ours), (setting, peer)):
                    shown = ", ".join(f"{value:.5f}" for value in run["losses"])
                    print(f"{loss} {name}: {run['tokens_per_s']:.1f} tokens/s, {_gib(run)}, losses {shown}", flush=True)
    print(f"\n| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    for (loss, setting), found_pairs in pairs.items():
        print(table_row(loss, setting, found_pairs, apart[loss, setting]), flush=True)


def table_row(loss: str, setting: str, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], apart: float) -> str:
    """Medians of both sides, and the medians of the pairs' ratios."""
    speed, each = ratios(pairs, "tokens_per_s")
    processor, _ = ratios(pairs, "tokens_per_cpu_s")
    memory, _ = ratios(pairs, "bytes")
    sides = list(zip(*pairs, strict=True))
    tokens = [f"{statistics.median(run['tokens_per_s'] for run in side):.0f}" for side in sides]
    held = [_gib({"bytes": statistics.median(run["bytes"] for run in side)}) for side in sides]
    pairwise = " ".join(f"{value:.2f}" for value in each)
    return (
        f"| {loss} | {setting} | {tokens[0]} | {tokens[1]} | {speed:.2f} | {pairwise} | {processor:.2f} | "
        f"{held[0]} | {held[1]} | {memory:.2f} | {apart:.3%} |"
    )


def _gib(run: Mapping[str, float]) -> str:
    return f"{run['bytes'] / 2**30:.2f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True)
    parser.add_argument("--peer_python", required=True)
    parser.add_argument("--model_name", default=NAME)
    parser.add_argument("--loss", nargs="+", choices=WEIGHTING, default=list(WEIGHTING))
    parser.add_argument("--peer_setting", nargs="+", default=["default", "fast", "row", "small"])
    parser.add_argument("--peer", nargs="*", default=[], help="fields of SFTConfig, as name=JSON")
    parser.add_argument("--ours", default=PADDING_FREE, help="further options of dft fit, in one string")
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--check_steps", type=int, default=2, help="steps whose losses must agree")
    parser.add_argument("--repeat", type=int, default=3, help="pairs")
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if not 1 <= options.warmup < options.steps or not 1 <= options.check_steps <= options.steps:
        sys.exit("expected 1 ≤ --warmup < --steps and 1 ≤ --check_steps ≤ --steps")
    model = str(embedded_model() if options.model_name == NAME else options.model_name)
    rows, source_rows = take_rows(options, model)
    print(f"{options.steps} steps of {options.rows} rows, {rows.lengths.mean():.0f} tokens on average", end=", ")
    print(
        f"{int(rows.targets.sum())} supervised of {int(rows.lengths.sum())} tokens; {options.dtype}, {options.device}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_rows(rows, options.rows, Path(folder) / "rows.jsonl")
        compare(options, model, Path(folder) / "rows.jsonl", source_rows)


if __name__ == "__main__":
    main()
