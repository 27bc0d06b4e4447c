"""With the embedded model: conversion, the first step against the dense oracle, and the demo in small."""

from pathlib import Path

import pytest
import torch
from conftest import write_jsonl
from harness import fit

from dft_lightning.__main__ import main
from dft_lightning.data.problems import practice_problems
from dft_lightning.models import ModelSource, load_model, load_tokenizer
from dft_lightning.weighting import DFT

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def all_cores():
    """The real model is worth them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_conversion_keeps_the_model(embedded_model_dir):
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= {
        path.name for path in embedded_model_dir.iterdir()
    }
    tokenizer = load_tokenizer(ModelSource(str(embedded_model_dir)))
    assert (tokenizer.eos_token, len(tokenizer)) == ("<|im_end|>", 49152)
    model = load_model(ModelSource(str(embedded_model_dir), torch.bfloat16)).eval()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


def rows_of(folder: Path, shared: Path) -> Path:
    """Four real maths rows where they are, else practice problems."""
    if not shared.exists():
        return write_jsonl(folder / "rows.jsonl", practice_problems(4))
    import pyarrow.parquet as pq

    return write_jsonl(folder / "rows.jsonl", pq.read_table(shared).slice(0, 4).to_pylist())


@pytest.mark.parametrize(("precision", "bound"), [("64-true", 1e-10), ("32-true", 1e-5)])
def test_the_first_step_of_dft_is_the_dense_oracle(embedded_model_dir, tmp_path, precision, bound):
    """Loss and every parameter's gradient, the model in the same precision on both sides, the oracle's loss in float64.

    The division by the tokens comes last on both sides: transformers' norms round to float32 in between.
    """
    shared = Path(__file__).parents[2] / "shared" / "data" / "numina_schema" / "train.parquet"
    rows = rows_of(tmp_path, shared)
    data = {"global_batch_size": 4, "micro_batch_size": 4, "max_length": 256}
    finetuner, recorder, trainer = fit(embedded_model_dir, rows, DFT(), data=data, precision=precision, max_steps=1)
    (batch,) = trainer.datamodule.train_dataloader()
    names = [name for name, _ in finetuner.model.named_parameters()]
    sizes = [parameter.numel() for parameter in finetuner.model.parameters()]
    ours = dict(zip(names, recorder.gradients[0].split(sizes), strict=True))
    logged = recorder.logged[0]["train/objective"]
    del finetuner, recorder, trainer

    model = load_model(ModelSource(str(embedded_model_dir), torch.float64 if "64" in precision else torch.float32))
    logits = model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)[batch.supervised].double()
    logp = logits.log_softmax(1).gather(1, batch.target[:, None])[:, 0]
    loss = -(logp.detach().exp() * logp).sum()
    loss.backward()
    assert logged == pytest.approx(loss.item() / len(logp), rel=1e-6)  # logged in float32
    for name, parameter in model.named_parameters():
        truth = parameter.grad.flatten().double() / len(logp)
        assert (ours[name] - truth).norm() <= bound * truth.norm(), name


def test_the_demo_in_small(embedded_model_dir, tmp_path, monkeypatch, capsys):
    config = Path(__file__).parents[1] / "configs" / "demo.yaml"
    monkeypatch.chdir(tmp_path)
    small = ["--data.problems", "32", "--data.held_out", "4", "--data.global_batch_size", "8"]
    assert main(["demo", "--config", str(config), *small]) == 0
    said = capsys.readouterr().out
    for line in (
        "NLL (nats a token)",
        "mean p",
        "p < 1e-4",
        "p > .9",
        "tokens/s",
        "runs/demo/export",
        "--logdir runs/demo",
    ):
        assert line in said, line
    before, after = next(line for line in said.splitlines() if "NLL (nats" in line).split("│")[2:4]
    assert float(after) < float(before)
    exported = load_model(ModelSource("runs/demo/export"))
    assert exported.config.vocab_size == 49152


def test_the_demo_wants_problems_with_answers(embedded_model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", practice_problems(4))
    options = ["--model.model_name", str(embedded_model_dir), "--model.weighting", "DFT", "--run_dir", "run"]
    assert main(["demo", *options, "--data", "ChatDataModule", "--data.path", "rows.jsonl"]) == 2
    assert "dft demo needs data: PracticeDataModule" in capsys.readouterr().err
