"""Which layers get an adapter: found on the model, the same with weights and without, and reported."""

import pytest
import torch
from conftest import tiny_model
from harness import fit
from tiny_families import FAMILIES, model_of

from dft_lightning.adapters import LoRA, add_lora
from dft_lightning.callbacks.run_summary import run_facts
from dft_lightning.errors import UserError
from dft_lightning.lora_targets import adapted_layers
from dft_lightning.models import WeightedLM

#: What "all-linear" leaves out, by a part of the name, and why.
LEFT_OUT = {
    "falcon_h1": ("mamba.out_proj", "rejected by peft"),
    "mamba": ("mixer.out_proj", "rejected by peft"),
    "jamba": ("mamba.dt_proj", "without calling the layer"),
    "gemma3n_text": ("altup.correction_coefs", "without calling the layer"),
    "llama4_text": ("feed_forward.router", "no plain linear layer"),
    "phimoe": ("mlp.router", "no plain linear layer"),
    "zamba2": ("self_attn.q_proj", "several layers share its weight"),
    "gpt_oss": ("experts.gate_up_proj", "not the weight of a linear layer"),
    "deepseek_v3": ("shared_experts.up_proj", "not adapted by peft"),
}


@pytest.mark.parametrize("family", LEFT_OUT)
def test_what_cannot_be_adapted_is_left_out_and_reported(family):
    part, why = LEFT_OUT[family]
    targets = add_lora(model_of(family), LoRA(rank=2)).lora_targets
    reasons = [reason for name, reason in targets.left_out.items() if part in name]
    assert reasons
    assert all(why in reason for reason in reasons)
    assert not any(part in name for name in targets.adapted)
    assert why in str(targets)
    assert 0 < targets.share < 1


@pytest.mark.parametrize("family", ["llama", "falcon", "gpt2", "qwen3"])
def test_where_all_can_be_adapted_nothing_is_left_out(family):
    targets = add_lora(model_of(family), LoRA(rank=2)).lora_targets
    assert targets.left_out == {}
    assert "None on" not in str(targets)


@pytest.mark.parametrize("family", [*LEFT_OUT, "falcon", "mixtral"])
def test_the_choice_does_not_depend_on_weights(family):
    """An export, a plan and the other ranks make the model without any."""
    real = {name for name, _ in adapted_layers(add_lora(model_of(family), LoRA(rank=2)))}
    lora = LoRA(rank=2, alpha=3)  # another, so that no choice is remembered
    with torch.device("meta"):
        assert {name for name, _ in adapted_layers(add_lora(model_of(family), lora))} == real


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("lora", [LoRA(rank=2, dropout=0.1), LoRA(rank=2, dora=True)], ids=["dropout", "dora"])
def test_experts_that_peft_adapts_without_these_are_left_out_with_them(family, lora):
    targets = add_lora(model_of(family), lora).lora_targets
    assert any("experts" in name for name in targets.left_out)
    assert any("q_" in name for name in targets.adapted)


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("llama4_text", "router"),
        ("phimoe", "router"),
        ("jamba", "dt_proj"),
        ("zamba2", "q_proj"),
        ("mamba", "out_proj"),
    ],
)
def test_a_layer_that_cannot_be_adapted_is_refused_by_name(family, layer):
    with pytest.raises(UserError, match=rf"{layer}.*--model.lora.target_modules"):
        add_lora(model_of(family), LoRA(rank=2, target_modules=[layer]))


@pytest.mark.parametrize("family", ["llama", "falcon_h1"])
def test_what_is_tried_draws_nothing(family):
    """Else the adapters would begin differently where the choice is known by now."""
    begun = []
    for _ in range(2):
        model = model_of(family)
        torch.manual_seed(7)
        adapted = add_lora(model, LoRA(rank=3, alpha=11))
        begun.append(torch.cat([p.flatten() for name, p in adapted.named_parameters() if "lora_A" in name]))
    assert torch.equal(*begun)
    network = WeightedLM(adapted)
    state = torch.get_rng_state()
    network.check_adapters()
    network.check_recomputation("selective")
    network.packs_with()
    assert torch.equal(torch.get_rng_state(), state)


class Direct(torch.nn.Module):
    """Multiplies with a layer's weight as kernels for GPUs do."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.nn.functional.linear(x, self.layer.get_base_layer().weight)


def test_an_adapter_that_the_devices_kernels_pass_over_is_refused():
    network = WeightedLM(add_lora(tiny_model(), LoRA(rank=2)))
    network.check_adapters()
    for layer in network.decoder.layers:
        layer.mlp.up_proj = Direct(layer.mlp.up_proj)
    training, state = network.training, torch.get_rng_state()
    with pytest.raises(UserError, match=r"layers\.\*\.mlp\.up_proj\.layer have adapters, but on cpu"):
        network.check_adapters()
    assert network.training == training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_fit_checks_and_reports_it(model_dir, rows_file, monkeypatch):
    checked = []
    monkeypatch.setattr(WeightedLM, "check_adapters", lambda self: checked.append(self))
    module, _, trainer = fit(model_dir, rows_file, module={"lora": {"rank": 2}}, max_steps=1)
    assert checked == [module.network]
    assert "on 14 layers: model.layers.*.self_attn.{q_proj, " in run_facts(trainer, module)["adapter"]


def test_every_family_has_its_row():
    assert set(LEFT_OUT) <= set(FAMILIES)
