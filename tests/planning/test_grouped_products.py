"""A mixture of experts in shapes: its products, its router loss, and the commands that plan and diagnose it."""

import json

import pytest
import torch
from conftest import sums, write_jsonl
from routed import routed_config, routed_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dft_lightning.__main__ import main
from dft_lightning.models import WeightedLM
from dft_lightning.planning.grouped_products import GroupedProducts
from dft_lightning.planning.live_bytes import LiveBytes
from dft_lightning.planning.rehearsal import MicroBatch, Setting, rehearse
from dft_lightning.recomputation import recompute
from dft_lightning.router_loss import RouterLoss, step_totals
from dft_lightning.weighting import Uniform

SHAPE = MicroBatch(((64,), (41,)), 80)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes", [((16, 8), (3, 8, 24)), ((8, 16), (16, 24)), ((3, 16, 8), (3, 8, 24))], ids=str)
def test_shapes_are_those_of_real_products(shapes, dtype):
    left, right = (torch.randn(shape).to(dtype) for shape in shapes)
    ends = None if len(shapes[0]) == 3 else torch.tensor([8, 8, 16], dtype=torch.int32)
    truth = torch._grouped_mm(left, right, offs=ends)
    with FakeTensorMode() as fake, GroupedProducts():
        given = [None if each is None else fake.from_tensor(each) for each in (left, right, ends)]
        found = torch._grouped_mm(given[0], given[1], offs=given[2])
    assert (found.shape, found.dtype) == (truth.shape, truth.dtype)


def real_peak(family, how):
    """Most bytes that a real forward and backward pass holds beside weights, gradients and batch."""
    from transformers import AutoModelForCausalLM

    network = WeightedLM(AutoModelForCausalLM.from_config(routed_config(family), attn_implementation="sdpa")).train()
    recompute(network.base.get_decoder(), how.recomputation)
    batch = SHAPE.batch()
    batch.supervised = batch.target = torch.arange(SHAPE.supervised)
    batch.sequence, batch.position = torch.zeros(2, SHAPE.supervised, dtype=torch.long)
    batch.counts = [SHAPE.supervised]
    router = RouterLoss(0.1, 2) if how.router else None
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = [*network.parameters(), *network.buffers(), *(p.grad for p in network.parameters())]
    with LiveBytes(before + [value for value in vars(batch).values() if isinstance(value, Tensor)]) as live:
        loss, tokens = network(batch, Uniform(), chunk_rows=how.chunk_rows, router=router)
        if router is not None:
            loss = loss + router.share(step_totals([router.peek()], [1], lambda sums: sums.detach()))[0]
        del tokens
        loss.backward()
    return live.peak


@pytest.mark.parametrize("kind", ["none", "full"])
@pytest.mark.parametrize("router", [False, True])
def test_the_peak_is_that_of_a_real_run(router, kind):
    """But for statistics of the tokens, as for dense models, and indices of experts: 100 bytes a token, and 1 %."""
    how = Setting(torch.float32, "32-true", "sdpa", kind, False, 16, True, router=router)
    found = rehearse(routed_config("mixtral"), None, SHAPE, how).peak
    assert found == pytest.approx(real_peak("mixtral", how), abs=100 * 2 * 64, rel=0.01)


def test_a_router_loss_keeps_its_probabilities():
    """Of 2 routers, 128 positions and 4 experts, in float32 at least."""
    usual = (torch.float32, "32-true", "sdpa", "none", False, 16, True)
    off, on = (rehearse(routed_config("mixtral"), None, SHAPE, Setting(*usual, router=each)) for each in (False, True))
    assert on.saved - off.saved >= 2 * 128 * 4 * 4


@pytest.mark.parametrize("device", ["cpu", "h100"])
@pytest.mark.parametrize("option", ["auto", "none"])
def test_plan_and_diagnose(tmp_path, capsys, device, option, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, rows = routed_model(tmp_path / "model", "mixtral"), write_jsonl(tmp_path / "rows.jsonl", sums(26))
    common = ["--model.model_name", str(model), "--model.weighting", "Uniform", "--model.router_loss", option]
    common += ["--data", "NuminaMathDataModule", "--data.path", str(rows), "--data.max_length", "200"]
    assert main(["plan", *common, "--device", device, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]
    if device == "cpu" and option == "auto":
        assert main(["diagnose", *common, "--run_dir", str(tmp_path / "run")]) == 0


def test_plan_refuses_what_a_fit_refuses(tmp_path, capsys):
    model = routed_model(tmp_path / "model", "mixtral", router_z_loss_coef=0.001)
    args = ["plan", "--model.model_name", str(model), "--model.weighting", "Uniform", "--device", "h100"]
    rows = write_jsonl(tmp_path / "rows.jsonl", sums(8))
    data = ["--data", "NuminaMathDataModule", "--data.path", str(rows), "--data.max_length", "200"]
    assert main([*args, *data, "--trainer.max_steps", "7"]) != 0
    assert "router_z_loss_coef 0.001" in capsys.readouterr().err
    ignored = ["--model.unsupported_losses", "ignore", "--trainer.max_steps", "7"]
    assert main([*args, *data, *ignored]) == 0


def test_the_plan_of_a_run_has_the_memory_of_its_router_loss(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, rows = routed_model(tmp_path / "model", "mixtral"), write_jsonl(tmp_path / "rows.jsonl", sums(26))
    common = ["plan", "--model.model_name", str(model), "--model.weighting", "Uniform", "--device", "h100", "--json"]
    common += ["--data", "NuminaMathDataModule", "--data.path", str(rows), "--data.max_length", "200"]
    saved = {}
    for option in ("auto", "none", "0.5"):
        assert main([*common, "--model.router_loss", option]) == 0
        saved[option] = json.loads(capsys.readouterr().out)["memory"]["saved activations"]
    assert saved["auto"] == saved["0.5"] > saved["none"]
