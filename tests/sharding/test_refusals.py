"""What cannot be exact, or read, is refused in one line, on all ranks alike; and single functions on two ranks."""

import os
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from conftest import sums, tiny_model, tiny_tokenizer, write_jsonl
from harness import fit
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from ranks import start

from dft_lightning import initial_model, loading
from dft_lightning.__main__ import main
from dft_lightning.callbacks import Checkpoints, Throughput
from dft_lightning.errors import UserError
from dft_lightning.models import LoRA, WeightedLM
from dft_lightning.planning.automatic import load_of
from dft_lightning.planning.dealt import Dealing
from dft_lightning.planning.flops import model_flops
from dft_lightning.resume import settings_of
from dft_lightning.sharding import FSDP2Strategy
from dft_lightning.sharding.initial import refuse_strategy
from dft_lightning.sharding.tensors import common_norm, like, part, state_of, whole
from dft_lightning.weighting import ImportanceWeighted


@pytest.mark.parametrize("strategy", [ModelParallelStrategy(), FSDPStrategy()], ids=lambda one: type(one).__name__)
def test_other_ways_to_shard(strategy):
    with pytest.raises(UserError, match=f"{type(strategy).__name__}.*expected fsdp2"):
        refuse_strategy(SimpleNamespace(strategy=strategy))


def test_what_does_not_shard_is_let_pass():
    refuse_strategy(None)
    refuse_strategy(SimpleNamespace(strategy=SingleDeviceStrategy()))
    refuse_strategy(SimpleNamespace(strategy=FSDP2Strategy()))


def test_precisions():
    FSDP2Strategy().refuse_precision("bf16-mixed")
    with pytest.raises(UserError, match=r"trainer\.precision is 16-mixed; with trainer.strategy fsdp2 one of 32-true"):
        FSDP2Strategy().refuse_precision("16-mixed")


def test_sizes():
    with pytest.raises(UserError, match=r"trainer\.strategy\.replicate is 0"):
        FSDP2Strategy(replicate=0)


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="is a folder without"):
        FSDP2Strategy().load_checkpoint(tmp_path)


def test_a_plain_norm_is_that_of_float64():
    tensors = [torch.full((3,), 2.0), torch.full((2, 2), -1.0)]
    assert float(common_norm(tensors)) == 4.0
    assert common_norm([torch.ones(4, dtype=torch.bfloat16)]).dtype == torch.float32


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "rows.jsonl", sums(12))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("case", ["refused", "one_reads", "of_tensors"])
def test_on_two_ranks(folder, case):
    start(2, __file__, case, folder)


def refused(folder: Path) -> None:
    """Each rank says the same of what only one can see, and none waits for another for ever."""

    def fails(pattern, strategy, **more):
        with pytest.raises(UserError, match=pattern):
            fit(folder / "model", folder / "rows.jsonl", devices=2, strategy=strategy, recorder=False, **more)

    fails(r"replicate is 1 and \.shard is 3, but the run has 2 ranks", FSDP2Strategy(shard=3))
    fails(r"replicate is 4 and \.shard is not set", FSDP2Strategy(replicate=4))
    fails("leave compute out", FSDP2Strategy(compute="bfloat16"), precision="bf16-mixed")
    fails("model.lora.dora is true", FSDP2Strategy(), module={"lora": LoRA(rank=2, dora=True)})
    for kind in (torch.optim.Adafactor, torch.optim.Rprop):
        fails(f"optimizer {kind.__name__} looks at whole weights", FSDP2Strategy(), module={"optimizer": kind})
    for strategy in ("ddp", "fsdp2"):
        first = os.environ["RANK"] == "0"
        saving = {"enable_checkpointing": True, "default_root_dir": folder / strategy, "callbacks": [Checkpoints()]}
        fit(
            folder / "model", folder / "rows.jsonl", devices=2, strategy=strategy, recorder=False, max_steps=1, **saving
        )
        own = str(folder / strategy / "checkpoints" / "last.ckpt") if first else None
        fails("have to see the same run_dir", strategy, ckpt_path=own, max_steps=2, **saving)
    torch.distributed.barrier()
    if os.environ["RANK"] == "0":
        (folder / "model" / "model.safetensors").write_bytes(b"no weights")
    torch.distributed.barrier()
    fails("cannot load the weights", FSDP2Strategy())


def one_reads(folder: Path) -> None:
    """The first rank builds the model whole, and a copy of it where one is asked for; the others never do.

    And what is foreseen of the run knows how it is dealt out and computed.
    """
    built = []

    def watched(source, *, empty=False):
        built.append(empty)
        return loading.load_model(source, empty=empty)

    initial_model.load_model = watched
    speed, halves = Throughput(), FSDP2Strategy(compute="bfloat16")
    module = {"activation_checkpointing": "auto", "logits": "bfloat16"}
    given = {"module": module, "devices": 2, "strategy": halves, "callbacks": [speed], "max_steps": 1}
    found, _, trainer = fit(folder / "model", folder / "rows.jsonl", **given)
    assert built == ([True, False] if os.environ["RANK"] == "0" else [True])
    assert load_of(found, trainer.datamodule).dealing == Dealing(2, 1, torch.bfloat16)
    assert "no peak is known of cpu, bfloat16" in speed.said
    assert model_flops(found.network) == model_flops(WeightedLM(tiny_model()))
    assert settings_of(found)["precision"] == "32-true, computed in bfloat16"
    for strategy in ("fsdp2", FSDP2Strategy(compute="bfloat16")):
        given = {"data": {"cache_dir": str(folder / "kept")}, "devices": 2, "strategy": strategy, "max_steps": 1}
        fit(folder / "model", folder / "rows.jsonl", ImportanceWeighted(), **given)
    assert len(list((folder / "kept" / "reference").iterdir())) == 2  # another precision, other values


def of_tensors(folder: Path) -> None:
    """Parts, wholes and norms of tensors that two ranks cannot share evenly, beside plain ones."""
    module, _, trainer = fit(folder / "model", folder / "rows.jsonl", devices=2, strategy="fsdp2", max_steps=1)
    example = module.optimizers().param_groups[0]["params"][0]
    values = torch.arange(1.0, 8.0)
    dealt = like(example, values)
    assert len(part(dealt)) == (4 if trainer.global_rank == 0 else 3)
    assert torch.equal(whole(dealt), values)
    plain = torch.tensor([3.0, 4.0])
    expected = (values.square().sum() + 25.0).sqrt()
    assert float(common_norm([dealt, plain])) == pytest.approx(float(expected), rel=2**-23)
    narrow = common_norm([dealt.to(torch.bfloat16)])
    assert narrow.dtype == torch.float32
    tied = torch.nn.ModuleList([torch.nn.Linear(2, 2, bias=False) for _ in range(2)])
    tied[1].weight = tied[0].weight
    state = state_of(tied, keep=trainer.is_global_zero)
    assert state["0.weight"] is state["1.weight"]
    assert (state["0.weight"] is None) != trainer.is_global_zero


@pytest.mark.slow
def test_the_command_line(folder):
    """fit, a second start that goes on, validate and predict under the strategy, by its name and by its options."""
    start(2, __file__, "commands", folder)
    files = sorted((folder / "run" / "predictions").glob("**/*.parquet"))
    columns = [pq.read_table(file, columns=["row", "position"]).to_pydict() for file in files]
    tokens = [pair for each in columns for pair in zip(each["row"], each["position"], strict=True)]
    assert len(files) == 2
    assert len({row for row, _ in tokens}) == 12 - 4
    assert len(set(tokens)) == len(tokens)
    assert (folder / "run" / "checkpoints" / "last.ckpt").exists()
    assert (folder / "run" / "export" / "model.safetensors").exists()


def commands(folder: Path) -> None:
    os.chdir(folder)
    base = [
        "--model.model_name",
        "model",
        "--run_dir",
        "run",
        "--data",
        "NuminaMathDataModule",
        "--data.path",
        "rows.jsonl",
    ]
    base += [
        "--data.val_size",
        "4",
        "--data.global_batch_size",
        "4",
        "--data.micro_batch_size",
        "2",
        "--data.max_length",
    ]
    base += ["200", "--model.weighting", "DFT", "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    assert main(["fit", *base, "--trainer.strategy", "fsdp2"]) == 0
    named = ["--trainer.strategy", "FSDP2Strategy", "--trainer.strategy.replicate", "2"]
    assert main(["fit", *base, *named, "--trainer.max_epochs", "2", "--model.lr_schedule", "constant_with_warmup"]) == 0
    assert main(["validate", *base, "--trainer.strategy", "fsdp2", "--ckpt_path", "last"]) == 0
    assert main(["predict", *base, "--trainer.strategy", "fsdp2", "--ckpt_path", "last"]) == 0
