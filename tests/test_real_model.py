"""With the embedded model: conversion, the first step against the dense oracle, and the demo in small."""

from pathlib import Path

import pytest
import torch
from conftest import write_jsonl
from harness import fit

from dft_lightning.__main__ import main
from dft_lightning.data.problems import practice_problems
from dft_lightning.loading import ModelSource, load_model, load_tokenizer
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


def first_gradient(folder: Path, rows: Path, precision: str):
    """The batch, the loss and every parameter's gradient of the first step of DFT."""
    data = {"global_batch_size": 4, "micro_batch_size": 4, "max_length": 256}
    finetuner, recorder, trainer = fit(folder, rows, DFT(), data=data, precision=precision, max_steps=1)
    (batch,) = trainer.datamodule.train_dataloader()
    parts = recorder.gradients[0].split([parameter.numel() for parameter in finetuner.model.parameters()])
    names = [name for name, _ in finetuner.model.named_parameters()]
    return batch, recorder.logged[0]["train/objective"], dict(zip(names, parts, strict=True))


def dense_gradient(folder: Path, batch, dtype: torch.dtype, head: torch.dtype = torch.float64):
    """The same from all logits at once, by autograd."""
    model = load_model(ModelSource(str(folder), dtype))
    logits = model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)[batch.supervised].to(head)
    logp = logits.log_softmax(1).gather(1, batch.target[:, None])[:, 0]
    loss = -(logp.detach().exp() * logp).mean()
    loss.backward()
    return loss.item(), {name: parameter.grad.flatten().double() for name, parameter in model.named_parameters()}


class TestTheFirstStepOfDFTIsTheDenseOracle:
    """Loss and every parameter's gradient, on real rows where they are."""

    @pytest.fixture
    def rows(self, tmp_path):
        return rows_of(tmp_path, Path(__file__).parents[2] / "shared" / "data" / "numina_schema" / "train.parquet")

    def test_in_float64(self, embedded_model_dir, rows, monkeypatch):
        """To 1e-10. The norms of transformers round to float32 whatever the model's dtype: here they are exact."""
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        def exact(norm, hidden):
            return norm.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon)

        monkeypatch.setattr(LlamaRMSNorm, "forward", exact)
        batch, logged, ours = first_gradient(embedded_model_dir, rows, "64-true")
        loss, truth = dense_gradient(embedded_model_dir, batch, torch.float64)
        assert logged == pytest.approx(loss, rel=1e-6)  # logged in float32
        for name, gradient in truth.items():
            assert (ours[name] - gradient).norm() <= 1e-10 * gradient.norm(), name

    def test_in_float32(self, embedded_model_dir, rows):
        """The whole gradient to 1e-5 of that with the head in float64; each parameter's nearer to the truth than plain.

        Plain float32 errs most in its log-softmax.
        """
        batch, logged, ours = first_gradient(embedded_model_dir, rows, "32-true")
        loss, oracle = dense_gradient(embedded_model_dir, batch, torch.float32)
        assert logged == pytest.approx(loss, rel=1e-6)
        apart = torch.stack([(ours[name] - gradient).norm() for name, gradient in oracle.items()]).norm()
        assert apart <= 1e-5 * torch.stack([gradient.norm() for gradient in oracle.values()]).norm()
        _, plain = dense_gradient(embedded_model_dir, batch, torch.float32, head=torch.float32)
        _, truth = dense_gradient(embedded_model_dir, batch, torch.float64)
        for name, gradient in truth.items():
            assert (ours[name] - gradient).norm() <= (plain[name] - gradient).norm(), name


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
