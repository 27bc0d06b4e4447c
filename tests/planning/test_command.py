"""`dft plan` in-process: what it says of a run is what the run then does."""

import json

import pytest
import torch
from conftest import tiny_config
from harness import fit

from dft_lightning.__main__ import main
from dft_lightning.planning.flops import model_flops
from dft_lightning.planning.memory import GIB


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def plan(capsys, model, *args):
    assert main([*shown(model, *args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def data(rows, **options):
    usual = {"max_length": 200, "global_batch_size": 8, "micro_batch_size": 3}
    given = ["--data", "NuminaMathDataModule", "--data.path", rows]
    return given + [part for name, value in (usual | options).items() for part in (f"--data.{name}", value)]


@pytest.mark.parametrize("packing", ["false", "true", "padding_free"])
def test_tokens_and_flops_are_those_of_the_run(capsys, model_dir, rows_file, packing):
    found = plan(capsys, model_dir, *data(rows_file, packing=packing), "--trainer.accelerator", "cpu")
    options = {"micro_batch_size": 3, "packing": packing if packing == "padding_free" else packing == "true"}
    module, _, trainer = fit(model_dir, rows_file, data=options)
    rows, flops = trainer.datamodule.train_rows, model_flops(module.network)
    assert found["steps"] == trainer.global_step == 4
    assert found["tokens_a_step"] * 4 == rows.lengths.sum()
    assert found["supervised_tokens_a_step"] * 4 == rows.targets.sum()
    assert found["flops_a_step"] * 4 == pytest.approx(flops.of(rows.lengths.tolist(), int(rows.targets.sum())))
    assert found["micro_batches"] == trainer.datamodule.sampler().micro_batches
    assert found["parameters"] == sum(p.numel() for p in module.parameters())
    batches = [batch for number in range(4) for batch in trainer.datamodule.step(0, number)]
    largest = max(batches, key=lambda batch: batch.input_ids.numel())
    assert sum(map(sum, found["largest_micro_batch"])) == largest.tokens
    assert found["fits"]


def test_a_gpu_in_the_configuration_is_not_needed(capsys, model_dir, rows_file):
    gpus = ("--trainer.accelerator", "gpu", "--trainer.devices", "4", "--trainer.num_nodes", "2")
    found = plan(capsys, model_dir, *data(rows_file), *gpus, "--trainer.precision", "bf16-true", "--utilisation", "0.5")
    assert (found["device"], found["devices"], found["peak_flops"]) == ("H100", 8, 989.4e12)
    assert found["seconds_a_step"] == pytest.approx(found["flops_a_step"] / (0.5 * 8 * 989.4e12))


def test_no_weight_is_read(capsys, tmp_path):
    """A folder with a configuration only; without a tokenizer rows are taken to be full."""
    tiny_config().save_pretrained(tmp_path)
    found = plan(capsys, tmp_path, *data(tmp_path / "none.jsonl"), "--device", "h200", "--trainer.max_steps", "7")
    assert found["source"].startswith("assumed, every row full to max_length and supervised: cannot load the tokenizer")
    assert found["tokens_a_step"] == 8 * 200
    assert found["largest_micro_batch"] == [[200]] * 3
    assert (found["micro_batches"], found["steps"]) == (3, 7)


def test_what_does_not_fit_gets_a_setting_that_does(capsys, model_dir, rows_file):
    args = [*data(rows_file), "--device", "cpu", "--memory_gib"]
    all_of_it = plan(capsys, model_dir, *args, 1)
    tight = plan(capsys, model_dir, *args, (all_of_it["peak_memory"] - 1) / GIB)
    assert not tight["fits"]
    assert tight["advice"] == "--model.activation_checkpointing selective"
    hopeless = plan(capsys, model_dir, *args, 1000 / GIB)
    assert (hopeless["fits"], hopeless["advice"]) == (False, None)


def test_a_fused_optimizer_is_tried_first_on_a_gpu(capsys, model_dir, rows_file):
    """A step of AdamW over all weights at once holds them once more."""
    args = [*data(rows_file, micro_batch_size=1, max_length=32), "--device", "a100"]
    usual = plan(capsys, model_dir, *args)
    step = usual["memory"]["optimizer's step"]
    assert step == usual["memory"]["gradients"]
    fused = plan(capsys, model_dir, *args, "--model.optimizer.fused", "true")
    assert fused["memory"]["optimizer's step"] == 0
    tight = plan(capsys, model_dir, *args, "--memory_gib", (usual["peak_memory"] - 1) / GIB)
    assert tight["advice"].startswith("--model.optimizer.fused true")


def test_what_is_dealt_over_devices(capsys, model_dir, rows_file):
    args = [*data(rows_file, micro_batch_size=1, max_length=32), "--device", "h100", "--trainer.devices", "4"]
    whole, dealt = (plan(capsys, model_dir, *args, "--trainer.strategy", name) for name in ("ddp", "fsdp2"))
    assert (whole["shards"], whole["moved_a_step"], dealt["shards"]) == (1, None, 4)
    for part in ("weights", "gradients"):
        assert dealt["memory"][part] == pytest.approx(whole["memory"][part] / 4, rel=0.01)
    numbers = dealt["parameters"] * 4
    around = (2 * 320 + 1) * 32 * 4
    assert dealt["micro_batches"] == 2
    assert dealt["moved_a_step"] == pytest.approx(2 * 3 / 4 * (2 * (numbers - around) + around + numbers))
    options = ["--trainer.strategy", "FSDP2Strategy", "--trainer.strategy.compute", "bfloat16"]
    options += ["--trainer.strategy.replicate", "2"]
    found = plan(capsys, model_dir, *args, *options)
    assert (found["shards"], found["peak_flops"]) == (2, 989.4e12)
    assert main([*shown(model_dir, *args), *options]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())  # without the table
    assert "dealt over 2, 2 times; computed in bfloat16" in said
    assert "moved to a device" in said


def test_dealing_is_tried_before_computing_again(capsys, model_dir, rows_file):
    args = [*data(rows_file, micro_batch_size=1, max_length=32), "--device", "cpu", "--trainer.devices", "4"]
    usual = plan(capsys, model_dir, *args)
    tight = plan(capsys, model_dir, *args, "--memory_gib", (usual["peak_memory"] - 1) / GIB)
    assert tight["advice"] == "--trainer.strategy fsdp2"


def shown(model, *args):
    return ["plan", "--model.model_name", str(model), "--model.weighting", "DFT", *map(str, args)]


def test_the_table_and_its_last_line(capsys, model_dir, rows_file):
    args = shown(model_dir, *data(rows_file))
    assert main([*args, "--device", "a100"]) == 0
    said = capsys.readouterr().out
    for part in ("1 × A100 with 79.0 GiB", "memory: peak", "time, an estimate", "26 rows of the data, as tokenised"):
        assert part in said
    assert said.splitlines()[-1].startswith("fits: 1.5 of 79.0 GiB")
    assert main([*args, "--device", "a100", "--memory_gib", "0.1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("does not fit: 1.5 of 0.1 GiB")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--device", "abacus"], "--device 'abacus' is not known: give --memory_gib and --throughput.peak_flops"),
        (["--utilisation", "40"], "--utilisation is 40.0; expected a share of the peak"),
    ],
)
def test_what_cannot_be_used_is_said(capsys, model_dir, rows_file, args, said):
    given = [
        "--model.model_name",
        str(model_dir),
        "--model.weighting",
        "DFT",
        *map(str, data(rows_file)),
        *args,
    ]
    assert main(["plan", *given]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.compile", "true"], "model.compile needs batches of one shape"),
        (["--model.logits", "bfloat16"], "model.logits is bfloat16, but the products are in torch.float32"),
        (["--model.attn_implementation", "nonsense"], "model.attn_implementation is 'nonsense'; expected one of"),
        (
            ["--model.weighting", "DataWeighted", "--model.weighting.of", "DFT"],
            "DataWeighted needs weights of the data",
        ),
        (["--data.path", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data.num_samples", "3", "--data.drop_last", "true"], "do not fill one step of data.global_batch_size"),
        (["--trainer.strategy", "fsdp"], "trainer.strategy is fsdp, which is not supported here; expected fsdp2"),
        (
            ["--trainer.strategy", "fsdp2", "--model.lora.rank", "4", "--model.lora.dora", "true"],
            "model.lora.dora is true, but the model is sharded",
        ),
        (
            ["--trainer.strategy", "fsdp2", "--model.lora.rank", "4", "--model.quantization", "nf4"],
            "model.quantization is nf4, and trainer.strategy deals out",
        ),
        (["--trainer.devices", "foo"], "trainer.devices is 'foo'; expected a number"),
        (["--trainer.devices", "0"], "trainer.devices is '0'; expected a number"),
        (["--memory_gib", "-3"], "--memory_gib is -3.0; expected"),
        (["--memory_gib", "0"], "--memory_gib is 0.0; expected"),
    ],
)
def test_a_fit_that_would_be_refused_is_not_planned(model_dir, rows_file, capsys, options, message):
    usual = ["--model.model_name", str(model_dir), "--model.weighting", "DFT", "--data", "NuminaMathDataModule"]
    status = main(["plan", *usual, "--data.path", str(rows_file), "--data.global_batch_size", "8", *options])
    assert status == 2
    assert message in capsys.readouterr().err
