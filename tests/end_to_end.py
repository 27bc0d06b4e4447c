"""SmolLM2 on maths rows, on two ranks that share its weights: trained, killed, gone on with, exported, asked.

    python tests/end_to_end.py [FOLDER] [--steps 4]

Rows are real ones where they are, else practice problems. In the last validation the live, sharded model's
log-probability of every held-out token is kept; that of the exported folder, which transformers loads, has to be the
same but for the rounding of float32.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from conftest import maths_rows
from launching import FSDP2, LONG, TORCHRUN, Runs, children_of

HELD_OUT = 4
OPTIONS = f"""fit --trainer.accelerator cpu --model.model_name smollm2-135m-instruct --data NuminaMathDataModule
    --data.path rows.jsonl --data.val_size {HELD_OUT} --data.max_length 224 --data.overlength truncate
    --data.global_batch_size 4 --data.micro_batch_size 2 --model.weighting DFT --model.optimizer.lr 2e-5
    --checkpoints.every_n_steps 2 --checkpoints.save_best false --export.enabled false
    --token_probabilities.every_n_steps 0 --trainer.enable_progress_bar false
    --trainer.callbacks+=last_words.LastWords {FSDP2}"""
LAST_WORDS = '''"""What the live model says of the held-out tokens."""

import lightning.pytorch as pl
import torch


class LastWords(pl.Callback):
    def on_validation_start(self, trainer, module):
        self.said = []

    def on_validation_batch_end(self, trainer, module, outputs, batch, *_):
        (tokens,) = module.score_together([batch])
        self.said.append({"ids": batch.input_ids, "supervised": batch.supervised, "target": batch.target,
                          "logp": tokens.logp})

    def on_validation_end(self, trainer, module):
        torch.save(self.said, f"said-{trainer.global_rank}.pt")
'''
LAUNCHER = [*TORCHRUN, "-m", "dft_lightning"]


class RealRuns(Runs):
    """Runs of the real model, whose converted weights are where users have them."""

    options = OPTIONS

    def __init__(self, folder: Path, steps: int) -> None:
        from dft_lightning.embedded import cache_dir, embedded_model

        embedded_model()
        self.folder, self.cache = folder, cache_dir().absolute()
        maths_rows(folder, 4 * steps + HELD_OUT)
        (folder / "last_words.py").write_text(LAST_WORDS)


def killed(runs: RealRuns, run: str) -> int:
    """Start the run, and kill its second rank after the first checkpoint; how torchrun leaves."""
    process = runs.start(run, launcher=LAUNCHER)
    runs.until_saved(run, process)
    os.kill(children_of(process.pid)[1], signal.SIGKILL)
    return process.wait(LONG)


def starts(runs: RealRuns, run: str) -> list[int]:
    """The steps from which its starts went on."""
    found = json.loads((runs.folder / run / "environment.json").read_text())["starts"]
    return [start["from_step"] for start in found]


def export(runs: RealRuns, run: str) -> Path:
    """By the command, as a folder."""
    from dft_lightning.__main__ import main

    out = runs.folder / "exported"
    assert main(["export", str(runs.folder / run / "checkpoints" / "last.ckpt"), str(out)]) == 0
    return out


@torch.no_grad()
def furthest(folder: Path, model: Any) -> tuple[float, float, int]:
    """The largest distance between a token's log-probability by a model and by the live one, a bound, and tokens.

    A logit is a sum of H products, in another order in each of the two ways; its rounding adds up like a random walk:
    √H · 2⁻²⁴ of its size. A log-probability has two such numbers in it, and the hidden states, which are the same
    computation on both sides, bring as much again.
    """
    apart, size, count = 0.0, 0.0, 0
    for rank in range(2):
        for said in torch.load(folder / f"said-{rank}.pt"):
            logits = model(input_ids=said["ids"], use_cache=False).logits.flatten(0, 1)[said["supervised"]].double()
            logp = logits.log_softmax(1).gather(1, said["target"][:, None])[:, 0]
            count += len(logp)
            if len(logp):  # a rank with less to do has empty batches
                apart = max(apart, float((logp - said["logp"]).abs().max()))
                size = max(size, float(logits.abs().max()))
    return apart, 4 * model.config.hidden_size**0.5 * 2**-24 * size, count


def answer(folder: Path, question: str) -> str:
    """What the exported model says, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**given, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = (options.folder or Path(made)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        return story(RealRuns(folder, options.steps))


def story(runs: RealRuns) -> int:
    """All of it, told as it happens; 1 where the exported model is another than the live one."""
    from transformers import AutoModelForCausalLM

    began = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - began:>5.0f} s | {text}", flush=True)

    tell(f"a rank was killed: torchrun left with {killed(runs, 'run')}")
    runs.whole("run", launcher=LAUNCHER)
    tell(f"the same command again: went on from step {starts(runs, 'run')[-1]}, and ended")
    out = export(runs, "run")
    apart, bound, count = furthest(runs.folder, AutoModelForCausalLM.from_pretrained(out))
    tell(f"log p of {count} tokens by the exported and the live model: {apart:.1e} apart at most, bound {bound:.1e}")
    tell(f"What is 7 + 5? {answer(out, 'What is 7 + 5?')!r}")
    return int(apart > bound)


if __name__ == "__main__":
    sys.exit(main())
