"""Adapters on two ranks, ddp and sharded: precision, adapters from a folder, and the gradients of one process."""

import os

import pytest
import torch
from conftest import sums, write_jsonl
from exactness import GRADIENT, relative
from harness import fit
from ranks import start
from test_adapter_folders import adapter

from dft_lightning.adapter_names import of_adapter
from dft_lightning.adapters import LoRA
from dft_lightning.callbacks import Checkpoints, Export
from dft_lightning.sharding import FSDP2Strategy
from dft_lightning.weighting import DFT, ImportanceWeighted

FULL = {"lora": LoRA(rank=2, modules_to_save=["embed_tokens", "norm", "lm_head"])}
#: Model, weighting, options of the module, and that of the trainer.
CASES = {
    "full copies": ("base", DFT(), FULL, {}),
    "continue": ("adapter", ImportanceWeighted(), {"adapter": "continue"}, {}),
    "merge": ("adapter", DFT(), {"adapter": "merge"}, {}),
    "merge, new adapter": ("adapter", DFT(), {"adapter": "merge", "lora": LoRA(rank=2)}, {}),
    "half": ("base", DFT(), FULL, {"precision": "bf16-true"}),
    "continue in half": ("adapter", DFT(), {"adapter": "continue"}, {"precision": "bf16-true"}),
}
RUNS = [("ddp", "continue"), ("ddp", "half"), *(("fsdp2", name) for name in CASES), ("fsdp2, bfloat16", "full copies")]


def outcome(folder, name, strategy=None):
    """Gradients, and by name the precision of each tensor and of what the optimizer keeps for it."""
    model, weighting, module, trainer = CASES[name]
    given = {"module": module, "data": {"micro_batch_size": 4}, "max_steps": 2} | trainer
    if strategy is not None:
        sharded = FSDP2Strategy(compute="bfloat16") if "," in strategy else strategy
        given |= {"devices": 2, "strategy": sharded}
        run = folder / f"{strategy} {name}"
        given |= {"callbacks": [Checkpoints(), Export()], "enable_checkpointing": True, "default_root_dir": run}
    torch.manual_seed(0)
    tuner, recorder, runner = fit(folder / model, folder / "rows.jsonl", weighting, **given)
    return {
        "gradients": recorder.gradients,
        "dtypes": {n: p.dtype for n, p in tuner.network.named_parameters()},
        "trained": {n for n, p in tuner.network.named_parameters() if p.requires_grad},
        "reference": tuner.reference_in_force,
        "step": runner.global_step,
    }


def on_ranks(folder):
    for strategy, name in RUNS:
        found = outcome(folder, name, strategy)
        if os.environ["RANK"] == "0":
            torch.save(found, folder / f"{strategy} {name}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_jsonl(folder / "rows.jsonl", sums(16))
    adapter(folder / "adapter", target_modules=["q_proj", "down_proj"], modules_to_save=["norm"])
    start(2, __file__, "on_ranks", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "name"), RUNS)
def test_they_are_those_of_one_process(runs, strategy, name):
    """Sharded as well: what each rank trains, in which precision; in float32 the gradients, too."""
    half = bool(CASES[name][3])
    found, alone = torch.load(runs / f"{strategy} {name}.pt", weights_only=False), outcome(runs, name)
    assert found["dtypes"] == alone["dtypes"]
    assert found["trained"] == alone["trained"]
    assert found["step"] == alone["step"] == 2
    assert found["reference"] == alone["reference"]
    if half:
        assert {d for n, d in found["dtypes"].items() if of_adapter(n)} == {torch.float32}
        assert {d for n, d in found["dtypes"].items() if not of_adapter(n)} == {torch.bfloat16}
    if not half and "," not in strategy:
        for ours, truth in zip(found["gradients"], alone["gradients"], strict=True):
            assert relative(ours, truth) < GRADIENT
    folder = runs / f"{strategy} {name}" / "export"
    assert (folder / "adapter_config.json").exists() == (name != "merge")
    assert (folder / "base" / "model.safetensors").exists() == (name == "merge, new adapter")
