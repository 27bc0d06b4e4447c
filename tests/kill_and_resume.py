"""Kills training runs at random moments, starts them again, and compares the end with a run that was never stopped.

    python tests/kill_and_resume.py [--trials 50] [--seed 0] [--only WORD] [--ask] [--real]
                                    [--ranks 2] [--strategy ddp|fsdp2] [--victims one|all] [--sharded] [--asynchronous]

Weights, optimizer, schedule, counters and everything logged but the speed have to be the same to the bit. A third of
the kills come at a random time from outside; the others at a random occurrence of an event: between two micro-batches,
within the optimizer step, in a validation, while a checkpoint is half-written, before and after it gets its name.
Every run is a process of its own, forked from this one after the imports. `--ranks 2`: one of two ranks is killed, and
the other has to find out, or is ended after a while, as launchers do; `--victims all`: it is killed at that moment,
too. `--ask`: SIGTERM or SIGUSR1 in place of SIGKILL, and all ranks have to leave with code 85. `--real`:
SmolLM2-135M-Instruct, three kills.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import sums, tiny_model, tiny_tokenizer, write_jsonl
from ports import free_port
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dft_lightning.checkpointing import read
from dft_lightning.signals import AGAIN

BASE = """--trainer.accelerator cpu --model.model_name {model} --data NuminaMathDataModule --data.path {rows}
    --data.val_size 4 --data.max_length 200 --data.global_batch_size 6 --data.micro_batch_size 2 --trainer.max_epochs 2
    --checkpoints.every_n_steps 1 --trainer.gradient_clip_val 0.05 --export.enabled false --run_dir {run}
    --token_probabilities.every_n_steps 2 --token_probabilities.probe_rows 3 --token_probabilities.figure false
    --trainer.val_check_interval 2 --model.optimizer.lr 0.01 --trainer.enable_progress_bar false"""
#: What differs from the above.
CASES = {
    "full, float32": "--model.weighting DFT",
    "packed, bf16-true, workers": "--model.weighting DFT --data.packing true --trainer.precision bf16-true "
    "--data.num_workers 2",
    "LoRA with dropout, packed": "--model.weighting DFT --model.lora.rank 4 --model.lora.dropout 0.2 "
    "--data.packing true --checkpoints.every_n_steps 2",
    "step scope, padding-free": "--model.weighting step_weighting.Median --data.packing padding_free",
    "reference, bf16-mixed": "--model.weighting ImportanceWeighted --trainer.precision bf16-mixed "
    "--checkpoints.every_n_steps 3 --trainer.val_check_interval 1.0",
}
FORMS = ("sharded", "asynchronous")
REAL = """--trainer.accelerator cpu --model.model_name smollm2-135m-instruct --data PracticeDataModule
    --data.problems 64 --data.held_out 4 --data.global_batch_size 4 --data.micro_batch_size 2 --data.packing true
    --data.max_length 256
    --trainer.precision bf16-true --trainer.max_steps 6 --checkpoints.every_n_steps 2 --model.weighting DFT
    --export.enabled false --token_probabilities.every_n_steps 0 --run_dir {run}"""
MEDIAN = '''"""A weighting that looks at the whole step."""

from dataclasses import dataclass

from dft_lightning.weighting import TokenWeighting


@dataclass(frozen=True)
class Median(TokenWeighting):
    scope = "step"

    def weights(self, tokens):
        return tokens.p / tokens.p.median()
'''
_OTHER = "throughput/"  # times and memory
#: Seconds that a rank has to find out that another one is gone, and that a whole run has.
PATIENCE, WHOLE = 30.0, 600.0


class Killer:
    """Counts the events of a run, in a file; kills the process at a chosen one."""

    def __init__(self, kill: "Kill | None") -> None:
        self.kill, self.counts = kill, Counter()

    def __call__(self, event: str) -> None:
        self.counts[event] += 1
        if self.kill and self.kill.at == (event, self.counts[event]):
            os.kill(os.getpid(), self.kill.sent)

    def around(self, owner: Any, name: str, before: str | None = None, after: str | None = None) -> None:
        """Make a call of `owner.name` such an event, or two."""
        whole = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            if before:
                self(before)
            result = whole(*args, **options)
            if after:
                self(after)
            return result

        setattr(owner, name, watched)

    def install(self) -> None:
        """Watch a run of this process."""
        from dft_lightning.callbacks import Checkpoints
        from dft_lightning.checkpointing import place
        from dft_lightning.module import FineTuner

        self.around(FineTuner, "training_step", "a micro-batch begins", "a loss is made")
        self.around(FineTuner, "optimizer_step", "the step begins", "the step is done")
        self.around(FineTuner, "lr_scheduler_step", None, "the schedule has moved")
        self.around(FineTuner, "validation_step", "in a validation")
        self.around(FineTuner, "on_train_epoch_start", None, "an epoch begins")
        self.around(Checkpoints, "_save", "before a checkpoint", "after a checkpoint")
        self.around(os, "replace", "a checkpoint is written, without its name", "a checkpoint has its name")
        self.around(place, "remove", "before what is old is removed", "what is old is removed")
        finish = place.finish

        def halfway(path: Path, *rest: object) -> None:
            unfinished = place.unfinished(path)
            parts = {part: part.read_bytes() for part in [*unfinished.rglob("*.distcp")] or [unfinished]}
            for part, whole in parts.items():
                part.write_bytes(whole[: len(whole) // 2])
            self("a checkpoint is half-written")
            for part, whole in parts.items():
                part.write_bytes(whole)
            finish(path, *rest)

        place.finish = halfway


@dataclass(frozen=True)
class Kill:
    """What ends a run: a signal to one of its ranks, or to all, at an occurrence of an event or after some seconds."""

    sent: int
    victim: int
    at: tuple[str, int] | None = None
    after: float = 0.0
    to_all: bool = False

    def __str__(self) -> str:
        moment = f"{self.at[0]} ({self.at[1]})" if self.at else f"after {self.after:.1f} s"
        return f"rank {self.victim}: {moment}"


@dataclass(frozen=True)
class Ranks:
    """How many processes a run has, and what shares its work out."""

    count: int = 1
    strategy: str = "ddp"

    def start(self, arguments: list[str], folder: Path, kill: Kill | None = None) -> list[int]:
        """Fork them all, one of which may send itself a signal; their process ids."""
        if self.count == 1:
            return [start(arguments, folder, kill)]
        port = str(free_port())
        place = {"WORLD_SIZE": str(self.count), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        arguments = [*arguments, "--trainer.devices", str(self.count), "--trainer.strategy", self.strategy]
        ranks = range(self.count)
        return [
            start(arguments, folder, kill if kill and kill.victim == rank else None, place | {"LOCAL_RANK": str(rank)})
            for rank in ranks
        ]

    def killed(self, arguments: list[str], folder: Path, kill: Kill) -> list[int]:
        """Exit codes of a run that is killed."""
        children = self.start(arguments, folder, kill)
        if kill.at is None:
            time.sleep(kill.after)
            for rank, child in enumerate(children):
                if kill.to_all or rank == kill.victim:
                    os.kill(child, kill.sent)
        return ended(children, 0.0 if kill.to_all and kill.sent == signal.SIGKILL else PATIENCE)


def start(
    arguments: list[str], folder: Path, kill: Kill | None = None, environment: dict[str, str] | None = None
) -> int:
    """Fork a process of a run; its id."""
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(torch.get_num_threads())  # a fork's pool is renewed here, not by two threads at once
    os.chdir(folder)
    os.environ.update(environment or {})
    os.environ["DFT_CACHE"] = os.environ.get("DFT_CACHE_REAL", str(folder / "cache"))
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        from dft_lightning.cli import main

        killer = Killer(kill)
        killer.install()
        sys.path.insert(0, str(folder))
        code = main(["fit", *arguments])
        (folder / f"events-{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(killer.counts))
    finally:
        os._exit(code)


def ended(children: list[int], patience: float | None = None) -> list[int]:
    """Exit codes of processes, negative for signals.

    Args:
        patience: seconds that the others have once one has failed; what is left then is killed.
    """
    codes: dict[int, int] = {}
    deadline = time.monotonic() + WHOLE
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child] and patience is not None:
                    deadline = min(deadline, time.monotonic() + patience)
        if time.monotonic() >= deadline:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[child] for child in children]


def outcome(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run leaves: the last checkpoint, and everything logged."""
    checkpoint = read(run / "checkpoints" / "last.ckpt")
    del checkpoint["dft_lightning"]["saved_at"]
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "histograms": 0}).Reload()
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert steps == sorted(set(steps)), f"{tag} is logged at {steps}"
    logged = {
        f"{tag} {event.step}": event.value
        for tag in events.Tags()["scalars"]
        if not tag.startswith(_OTHER)
        for event in events.Scalars(tag)
    }
    logged |= {
        f"{tag} {event.step}": event.histogram_value.bucket
        for tag in events.Tags()["histograms"]
        for event in events.Histograms(tag)
    }
    return checkpoint, logged


def difference(ours: Any, truth: Any, name: str = "") -> str | None:
    """The first place where two nested values are not the same to the bit."""
    if isinstance(truth, torch.Tensor):
        return None if ours.dtype == truth.dtype and torch.equal(ours, truth) else name
    if isinstance(truth, dict):
        if ours.keys() != truth.keys():
            return f"{name}: only in one: {sorted(map(str, ours.keys() ^ truth.keys()))[:5]}"
        pairs = [(key, ours[key], truth[key]) for key in truth]
    elif isinstance(truth, list | tuple):
        if len(ours) != len(truth):
            return f"{name}: {len(ours)} where {len(truth)} were expected"
        pairs = [(index, *both) for index, both in enumerate(zip(ours, truth, strict=True))]
    else:
        return None if ours == truth or (ours != ours and truth != truth) else f"{name}: {ours!r}, not {truth!r}"
    found = (difference(mine, theirs, f"{name}/{key}") for key, mine, theirs in pairs)
    return next((place for place in found if place), None)


class Case:
    """One configuration, its run without interruption, and trials of it."""

    def __init__(self, name: str, options: str, folder: Path, ranks: Ranks = Ranks()) -> None:
        self.name, self.options, self.folder, self.ranks = name, options, folder, ranks
        began = time.monotonic()
        whole = self.prepare("whole")
        codes = ended(ranks.start(self.arguments(whole), whole))
        assert not any(codes), (whole / "log.txt").read_text()[-3000:]
        self.seconds = time.monotonic() - began
        self.truth = outcome(whole / "run")
        self.events = [json.loads((whole / f"events-{rank}.json").read_text()) for rank in range(ranks.count)]

    def prepare(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir(parents=True)
        (folder / "step_weighting.py").write_text(MEDIAN)
        return folder

    def arguments(self, folder: Path) -> list[str]:
        return self.options.format(model=self.folder / "model", rows=self.folder / "rows.jsonl", run="run").split()

    def kill(self, rng: random.Random, ask: bool, to_all: bool) -> Kill:
        """One at random."""
        sent = rng.choice([signal.SIGTERM, signal.SIGUSR1]) if ask else signal.SIGKILL
        victim = rng.randrange(self.ranks.count)
        if rng.random() < 1 / 3:
            return Kill(sent, victim, after=rng.uniform(0.1, 1.0) * self.seconds, to_all=to_all)
        event = rng.choice(sorted(self.events[victim]))
        return Kill(sent, victim, at=(event, rng.randint(1, self.events[victim][event])), to_all=to_all)

    def trial(self, name: str, rng: random.Random, how: dict[str, bool]) -> tuple[list[str], str | None]:
        """The moments of the kills, and where the end differs, if it does."""
        folder, moments = self.prepare(name), []
        arguments = [*self.arguments(folder), "--ckpt_path", "last"]
        for _ in range(rng.choice([1, 1, 2])):
            kill = self.kill(rng, **how)
            codes = self.ranks.killed(arguments, folder, kill)
            if not any(codes):
                return self.trial(f"{name}-again", rng, how)  # it came too late to matter
            others = [code for rank, code in enumerate(codes) if rank != kill.victim]
            moments.append(f"{kill}{', the others had to be ended' * (not kill.to_all and -signal.SIGKILL in others)}")
            if how["ask"] and set(codes) != {AGAIN} and kill.at:
                return moments, f"left with {codes}, asked by {kill.sent}: {(folder / 'log.txt').read_text()[-1500:]}"
        codes = ended(self.ranks.start(arguments, folder))
        if any(codes):
            return moments, f"left with {codes}: {(folder / 'log.txt').read_text()[-1500:]}"
        ours = outcome(folder / "run")
        return moments, difference(ours[0], self.truth[0]) or difference(ours[1], self.truth[1], "logged")


def cases_of(folder: Path, only: str, ranks: Ranks, form: str) -> list[Case]:
    """Those whose name has a word in it, each in a folder of its own; `form` is that of their checkpoints."""
    tiny_model(attention_dropout=0.1).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "rows.jsonl", sums(26))
    cases = []
    for number, (name, more) in enumerate(CASES.items()):
        if only in name:
            own = folder / f"case-{number}"
            own.mkdir()
            for shared in ("model", "rows.jsonl"):
                (own / shared).symlink_to(folder / shared)
            cases.append(Case(name, f"{BASE} {more} {form}", own, ranks))
    return cases


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--strategy", choices=["ddp", "fsdp2"], default="ddp")
    parser.add_argument("--victims", choices=["one", "all"], default="one")
    parser.add_argument("--ask", action="store_true")
    parser.add_argument("--real", action="store_true")
    for form in FORMS:
        parser.add_argument(f"--{form}", action="store_true", help=f"checkpoints.{form}")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(torch.get_num_threads() if options.real else 1)
    rng, failed = random.Random(options.seed), 0
    ranks, how = Ranks(options.ranks, options.strategy), {"ask": options.ask, "to_all": options.victims == "all"}
    import peft  # noqa: F401 - here, so that no run has to
    import transformers.models.llama.modeling_llama  # noqa: F401

    import dft_lightning.cli  # noqa: F401

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if options.real:
            os.environ["DFT_CACHE_REAL"] = os.environ.get("DFT_CACHE", str(Path.home() / ".cache" / "dft-lightning"))
            cases, options.trials = [Case("SmolLM2, packed, bf16-true", REAL, folder)], 3
        else:
            form = " ".join(f"--checkpoints.{form} true" for form in FORMS if vars(options)[form])
            cases = cases_of(folder, options.only, ranks, form)
        for number in range(options.trials):
            case = cases[number % len(cases)]
            moments, wrong = case.trial(f"trial-{number}", rng, how)
            failed += wrong is not None
            print(f"{number + 1:>3} | {case.name:<28} | {', then '.join(moments):<70} | {wrong or 'same'}", flush=True)
    print(f"{options.trials - failed} of {options.trials} runs ended as the undisturbed one, to the bit")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
