"""What `test_fsdp2.py` has one process do, and some ranks."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import exactness
import torch
from conftest import tiny_model, tiny_tokenizer
from exactness import CLIP, Median, Watched
from harness import fit
from transformers import GenerationConfig

from dft_lightning.callbacks import Checkpoints, Export, TokenProbabilities
from dft_lightning.models import LoRA
from dft_lightning.reference import fingerprint
from dft_lightning.sharding import FSDP2Strategy
from dft_lightning.sharding.layers import let_go
from dft_lightning.sharding.tensors import part, whole
from dft_lightning.weighting import (
    ASFT,
    DFT,
    GEM,
    PSFT,
    DataWeighted,
    EntropyBonus,
    ImportanceWeighted,
    LabelSmoothing,
    Renormalized,
    TokenWeighting,
)


@dataclass
class Case:
    """A run, and how it is sharded where it is."""

    weighting: TokenWeighting = field(default_factory=DFT)
    model: str = "model"
    module: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)


ADAPTER = {"lora": LoRA(rank=4)}
CASES = {
    "untied": Case(),
    "tied": Case(model="tied"),
    "soft-cap, tied": Case(model="gemma2"),
    "of sizes that ranks cannot share evenly": Case(model="odd"),
    "chunks of 7": Case(model="tied", module={"chunk_rows": 7}),
    "micro-batches of 1, some empty": Case(data={"micro_batch_size": 1}),
    "sequence weights of a cached reference": Case(ImportanceWeighted(), "tied"),
    "weights of the whole step": Case(Median()),
    "distributions of a frozen copy": Case(ASFT(), "tied"),
    "log-probabilities of a frozen copy": Case(ImportanceWeighted(), module={"reference": "copy"}),
    "an old policy": Case(PSFT(window=2)),
    "divided by the sum of the weights": Case(Renormalized(DFT())),
    "targets over the vocabulary": Case(GEM(), "tied", module={"chunk_rows": 7}),
    "targets over the vocabulary, sequences": Case(LabelSmoothing(), module={"normalize": "sequences"}),
    "more entropy": Case(EntropyBonus(Renormalized(DFT()))),
    "weights of the data": Case(DataWeighted(ImportanceWeighted()), data={"weight": "worth"}),
    "LoRA": Case(module=ADAPTER),
    "LoRA, rank-stabilised": Case(GEM(), module={"lora": LoRA(rank=4, rslora=True)}),
    "LoRA, a reference with the adapter off": Case(ASFT(), "tied", module=ADAPTER),
    "packed": Case(data={"micro_batch_size": 2, "packing": True}),
    "layers computed again": Case(module={"activation_checkpointing": "full"}),
    "parts of layers computed again": Case(module={"activation_checkpointing": "selective"}),
    "gathered ahead": Case(strategy={"prefetch": 2}),
    "reduced once a step": Case(model="tied", data={"micro_batch_size": 1}, strategy={"reduce": "step"}),
    "reduced once a step, LoRA": Case(GEM(), data={"micro_batch_size": 1}, strategy={"reduce": "step"}, module=ADAPTER),
    "clipped by value": Case(trainer={"gradient_clip_algorithm": "value", "gradient_clip_val": 1e-3}),
    "looked at": Case(trainer={"callbacks": TokenProbabilities, "num_sanity_val_steps": 1}),
}
HYBRID = {
    "copies of shards": Case(strategy={"replicate": 2}),
    "copies of shards, reduced once a step": Case(
        data={"micro_batch_size": 1}, strategy={"replicate": 2, "reduce": "step"}
    ),
}
COMPILED = {"compiled": Case(module={"compile": True}, data={"micro_batch_size": 2, "packing": True})}
#: In bfloat16, to the bounds of which are others.
HALF = {
    "computed in bfloat16": Case(strategy={"compute": "bfloat16"}, trainer={"max_steps": 1}),
    "computed in bfloat16, sequences": Case(
        ImportanceWeighted(),
        module={"normalize": "sequences"},
        strategy={"compute": "bfloat16"},
        trainer={"max_steps": 1},
    ),
    "computed in bfloat16, logits too": Case(
        module={"logits": "bfloat16"}, strategy={"compute": "bfloat16"}, trainer={"max_steps": 1}
    ),
    "computed in bfloat16, reduced once a step": Case(
        data={"micro_batch_size": 1}, strategy={"compute": "bfloat16", "reduce": "step"}, trainer={"max_steps": 1}
    ),
    "held in bfloat16": Case(trainer={"max_steps": 1, "precision": "bf16-true"}),
    "held in bfloat16, logits too": Case(
        module={"logits": "bfloat16"}, trainer={"max_steps": 1, "precision": "bf16-true"}
    ),
    "held in bfloat16, LoRA": Case(module=ADAPTER, trainer={"max_steps": 1, "precision": "bf16-true"}),
}


def of_ranks(count: int) -> dict[str, Case]:
    """The cases that so many ranks run."""
    return CASES | HALF | (HYBRID if count % 2 == 0 else {})


def prepare(folder: Path) -> None:
    """Models and rows that all runs share."""
    exactness.prepare(folder)
    tiny_model(tie_word_embeddings=True).save_pretrained(folder / "tied")
    tiny_model("gemma2", tie_word_embeddings=True).save_pretrained(folder / "gemma2")
    tiny_model(vocab_size=321, intermediate_size=47).save_pretrained(folder / "odd")
    GenerationConfig(do_sample=True, temperature=0.7).save_pretrained(folder / "model")
    for name in ("tied", "gemma2", "odd"):
        tiny_tokenizer().save_pretrained(folder / name)


def outcome(folder: Path, case: Case, ranks: int = 1, sharded: bool = False, **more: Any) -> dict[str, Any]:
    """What `exactness.outcome` has, and weights and buffers after the run, whole."""
    options = {"gradient_clip_val": CLIP} | case.trainer | more
    if callback := options.pop("callbacks", None):
        options["callbacks"] = callback if isinstance(callback, list) else [callback(every_n_steps=1)]
    where = {"micro_batch_size": 4 if ranks < 4 else 2, "val_path": str(folder / "val.jsonl")}
    module, recorder, trainer = fit(
        folder / case.model,
        folder / "rows.jsonl",
        case.weighting,
        module=dict(case.module),
        data=where | {"cache_dir": str(folder / f"cache {ranks} {sharded}")} | case.data,
        kind=Watched,
        devices=ranks,
        strategy=FSDP2Strategy(**case.strategy) if sharded else "auto",
        **options,
    )
    logged = [{k: v for k, v in one.items() if "per_second" not in k} for one in recorder.logged]
    logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})
    weights = {name: whole(value.detach()).clone() for name, value in module.network.named_parameters()}
    let_go(module.network)  # after a validation the root waits for the next backward pass with what it has gathered
    held = sum(part(value).numel() for value in module.network.parameters())
    return {
        "before": module.before,
        "after": recorder.gradients,
        "logged": logged,
        "weights": weights,
        "buffers": {name: value.clone() for name, value in module.network.named_buffers()},
        "statistics": {str(value.dtype) for value in module.trained_on.tensors().values() if value.is_floating_point()},
        "rounded": {name for name, value in module.trained_on.tensors().items() if _is_rounded(value)},
        "held": held / sum(value.numel() for value in weights.values()),
        "fingerprint": fingerprint(module.network),
        "reference": module.reference_weights,
        "generation": module.network.base.generation_config.to_dict(),
        "copies": [sum(part(value).numel() for value in copy.parameters()) for copy in module._initial],
    }


def _is_rounded(value: torch.Tensor) -> bool:
    """Whether bfloat16 holds all of it."""
    return value.is_floating_point() and torch.equal(value, value.bfloat16().to(value.dtype))


def keep(folder: Path, name: str, found: Any) -> None:
    """For the test to read, by the first rank."""
    if os.environ.get("RANK", "0") == "0":
        torch.save(found, folder / f"{name}.pt")


def run_all(folder: Path, compiled: str = "") -> None:
    """Every case on these ranks, one after another."""
    count = int(os.environ["WORLD_SIZE"])
    cases = COMPILED if compiled else of_ranks(count)
    keep(folder, "sharded", {name: outcome(folder, case, count, sharded=True) for name, case in cases.items()})


# -- checkpoints -----------------------------------------------------------------------------------------------------

ADAMW = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)}
KEPT = {
    "all weights": Case(PSFT(window=3), "tied", module=ADAMW),
    "LoRA": Case(module=ADAMW | ADAPTER),
}


class InTheMiddle(Checkpoints):
    """Keeps the state after two steps beside the last."""

    def _write(self, trainer, name):
        super()._write(trainer, name)
        if trainer.global_step == 2 and trainer.is_global_zero:
            folder = Path(trainer.default_root_dir) / "checkpoints"
            shutil.copy(folder / f"{name}.ckpt", folder / "middle.ckpt")


def run_and_go_on(folder: Path, own: str, from_others: str = "") -> None:
    """Whole runs that keep a checkpoint; and runs that go on from it, and from that of others."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    for name, case in KEPT.items():
        callbacks = [InTheMiddle(every_n_steps=2), Export(merge_lora=True)]
        saving = {"default_root_dir": folder / f"{own} {name}", "enable_checkpointing": True, "callbacks": callbacks}
        found = {"whole": outcome(folder, case, count, own == "sharded", **saving)}
        for origin in filter(None, (own, from_others)):
            start = folder / f"{origin} {name}" / "checkpoints" / "middle.ckpt"
            found[origin] = outcome(folder, case, count, own == "sharded", ckpt_path=str(start))
        keep(folder, f"{own} {name}", found)
