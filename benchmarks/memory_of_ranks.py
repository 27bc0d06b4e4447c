"""What each rank of a run holds at most while it loads and while it trains, beside what `dft plan` says.

    python benchmarks/memory_of_ranks.py [--ranks 1 2 4 --strategies fsdp2 ddp --compute bfloat16 --gaps]

Ranks are processes that see each other through gloo. Counted is resident memory beyond what the process held before it
loaded, after a run of a tiny model that has libraries and threads set up; pages of the weights' file, which the kernel
lends, among it. malloc is told to give back at once what is let go of, so that the count is that of tensors; with
--gaps it is not. The model is a Llama of 82 million random numbers in float32, trained by AdamW for two steps of 4
rows.
"""

import argparse
import gc
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from peers.meter import forget_peak, peak

from dft_lightning import FineTuner, NuminaMathDataModule
from dft_lightning.planning.automatic import load_of
from dft_lightning.planning.live_bytes import nbytes
from dft_lightning.planning.memory import memory
from dft_lightning.sharding import FSDP2Strategy
from dft_lightning.weighting import DFT

REPOSITORY = Path(__file__).resolve().parents[1]
MIB = 2**20
SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "model": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12},
}
_TIGHT = {"MALLOC_MMAP_THRESHOLD_": "131072"}


class Metered(FineTuner):
    """Takes the peaks of loading and training."""

    def configure_model(self) -> None:
        if self.network is None:
            gc.collect()
            self.before = forget_peak()
            super().configure_model()
            self.most_in_loading = peak() - self.before
            gc.collect()
            self.held = forget_peak() - self.before


def prepare(folder: Path) -> None:
    """The models, a tokenizer that both share, and rows that are cut at 128 tokens."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from conftest import tiny_tokenizer, write_jsonl
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, sizes in SIZES.items():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=16384, **sizes)).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    chosen = random.Random(0)
    numbers = [[str(chosen.randint(100, 999)) for _ in range(140)] for _ in range(16)]
    rows = [{"problem": "Add.", "solution": " ".join(some), "source": "made"} for some in numbers]
    write_jsonl(folder / "rows.jsonl", rows)


def fit(folder: Path, model: str, strategy: str, compute: str) -> Metered:
    """Two optimizer steps."""
    pl.seed_everything(0, verbose=False)
    module = Metered(str(folder / model), DFT(), chat_template="chatml")
    data = NuminaMathDataModule(
        str(folder / "rows.jsonl"), global_batch_size=4, micro_batch_size=1, max_length=128, cache_dir=str(folder)
    )
    trainer = pl.Trainer(
        strategy=FSDP2Strategy(compute=compute) if strategy == "fsdp2" else strategy,
        devices=int(os.environ["WORLD_SIZE"]),
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    return module


def rank(folder: Path, strategy: str, compute: str) -> None:
    """Of one process: measured and planned bytes, in a file of its own."""
    fit(folder, "tiny", strategy, compute)
    module = fit(folder, "model", strategy, compute)
    trained = peak() - module.before
    load = load_of(module, module.trainer.datamodule)  # type: ignore[attr-defined]
    plan = memory(load, "none")
    parameters = list(load.network().parameters())
    reads = strategy == "ddp" or module.trainer.is_global_zero
    parts = {name: size for name, size in plan.held.items() if not name.startswith("gaps")}
    found = {
        "held": (module.held, plan.held["weights"]),
        "loading": (module.most_in_loading, _while_loading(load, parameters, reads=reads)),
        "training": (trained, plan.peak - plan.held.get("gaps of the allocator (assumed)", 0)),
        "gaps": plan.held.get("gaps of the allocator (assumed)", 0),
        "parts": parts | {"gradients": plan.gradients, "micro-batch": plan.micro_batch.peak},
    }
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


def _while_loading(load: Any, parameters: list[torch.nn.Parameter], *, reads: bool) -> int:
    """The part, one tensor that is sent, and on the rank that reads all weights; without dealing the weights alone."""
    if load.dealing is None:
        return nbytes(parameters)
    largest = max(nbytes([one]) for one in parameters)
    return int(load.part(parameters) + largest + (nbytes(parameters) if reads else 0))


def measured(count: int, strategy: str, compute: str, gaps: bool) -> list[dict[str, Any]]:
    """What each of so many ranks has found."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        prepare(folder)
        common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        common |= {
            "MASTER_PORT": str(_free_port()),
            "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": "memory",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, __file__, "--rank-of", made, "--strategies", strategy, "--compute", compute]
        environment = os.environ | common | ({} if gaps else _TIGHT)
        running = [
            subprocess.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(count)
        ]
        codes = [process.wait() for process in running]
        if any(codes):
            raise RuntimeError("a rank has failed; its output is above")
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def lines(count: int, strategy: str, found: list[dict[str, Any]], gaps: bool) -> Iterator[str]:
    """A row of the table for each rank."""
    for number, one in enumerate(found):
        extra = one["gaps"] if gaps else 0
        cells = [f"{size / MIB:,.0f}" for name in ("held", "loading") for size in one[name]]
        real, planned = one["training"][0], one["training"][1] + extra
        cells += [f"{real / MIB:,.0f}", f"{planned / MIB:,.0f}", f"{real / planned:.2f}"]
        yield f"| {strategy} | {number} of {count} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--strategies", nargs="+", default=["fsdp2", "ddp"])
    parser.add_argument("--compute", choices=["as_held", "bfloat16"], default="as_held")
    parser.add_argument("--gaps", action="store_true")
    parser.add_argument("--rank-of", type=Path)
    options = parser.parse_args()
    if options.rank_of:
        rank(options.rank_of, options.strategies[0], options.compute)
        return
    print("| strategy | rank | held, loaded | plan | peak, loading | plan | peak, training | plan | real / plan |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for strategy in options.strategies:
        for count in options.ranks:
            found = measured(count, strategy, options.compute, options.gaps)
            print("\n".join(lines(count, strategy, found, options.gaps)), flush=True)
            print(json.dumps({name: round(size / MIB) for name, size in found[0]["parts"].items()}), file=sys.stderr)


if __name__ == "__main__":
    main()
