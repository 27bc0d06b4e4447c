"""Runs of `dft fit` by the launchers that users have: processes of their own, in a folder."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from conftest import sums, tiny_model, tiny_tokenizer, write_jsonl
from kill_and_resume import difference, outcome

ROOT = Path(__file__).resolve().parents[1]
# 4 steps an epoch, so many epochs that a signal to the first checkpoint's sight finds most of the run still to come
OPTIONS = """fit --trainer.accelerator cpu --model.model_name model --data NuminaMathDataModule --data.path rows.jsonl
    --data.val_size 2 --data.max_length 200 --data.global_batch_size 6 --data.micro_batch_size 3 --trainer.max_epochs 12
    --checkpoints.every_n_steps 1 --export.enabled false --trainer.val_check_interval 1.0 --model.optimizer.lr 0.01
    --token_probabilities.every_n_steps 0 --trainer.enable_progress_bar false --model.weighting DFT"""
DDP = "--trainer.devices 2 --trainer.strategy ddp"
FSDP2 = "--trainer.devices 2 --trainer.strategy fsdp2"
DFT = [sys.executable, "-m", "dft_lightning"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


#: Seconds that a run may take to leave, and to end: an idle core or two take a tenth of it.
SOON, LONG = 180, 900


class Runs:
    """Runs of one configuration in a folder of their own."""

    options = OPTIONS

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "c"
        tiny_model(attention_dropout=0.1).save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
        write_jsonl(folder / "rows.jsonl", sums(26))

    def start(self, run: str, more: str = "", launcher: Sequence[str] = DFT) -> subprocess.Popen:
        options = [*self.options.split(), "--run_dir", run, *more.split()]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DFT_CACHE": str(self.cache)}
        with open(self.folder / f"{run}.log", "a") as log:
            return subprocess.Popen(
                [*launcher, *options], cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )  # fmt: skip  # Ctrl-C counts, also where these tests run in the background

    def whole(self, run: str, more: str = "", launcher: Sequence[str] = DFT) -> None:
        assert self.start(run, more, launcher).wait(LONG) == 0, self.log(run)

    def until_saved(self, run: str, process: subprocess.Popen) -> None:
        """Wait until this process has written a checkpoint."""
        began = time.time()
        deadline = time.monotonic() + LONG
        path = self.folder / run / "checkpoints" / "last.ckpt"
        while not path.exists() or path.stat().st_mtime < began:
            assert process.poll() is None, self.log(run)
            assert time.monotonic() < deadline, self.log(run)
            time.sleep(0.02)

    def log(self, run: str) -> str:
        return (self.folder / f"{run}.log").read_text()

    def assert_same(self, run: str, truth: str) -> None:
        ours, theirs = outcome(self.folder / run), outcome(self.folder / truth)
        assert difference(ours[0], theirs[0]) is None
        assert difference(ours[1], theirs[1], "logged") is None


def children_of(parent: int) -> list[int]:
    """Its worker processes, by rank."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            environment = path.with_name("environ").read_bytes().decode().split("\0")
        except OSError:
            continue
        ranks = [entry.removeprefix("RANK=") for entry in environment if entry.startswith("RANK=")]
        if int(fields[1]) == parent and ranks:
            found.append((int(ranks[0]), int(path.parent.name)))
    return [pid for _, pid in sorted(found)]
