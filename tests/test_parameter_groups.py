"""Kinds of parameters, by module and shape: over families whose norms have other names and other classes."""

import pytest
import torch
from conftest import tiny_model
from torch import nn

from dft_lightning.models import LoRA, add_lora
from dft_lightning.parameter_groups import is_norm, kinds_of

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "cohere", "granite", "phi", "mistral"]


def by_name(model):
    kinds = kinds_of(model)
    return {name: kinds[parameter] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model = tiny_model(family)
    found = by_name(model)
    for name, kind in found.items():
        dims = model.get_parameter(name).dim()
        if "embed" in name:
            assert kind == "embedding", name
        elif "norm" in name:  # here the names are known; the code does not look at them
            assert kind == "norm", name
        elif name.endswith("bias"):
            assert kind == "bias", name
        else:
            assert kind == ("head" if name.startswith("lm_head") else "matrix"), name
            assert dims == 2
    assert {"embedding", "norm", "matrix"} <= set(found.values())


def test_names_do_not_decide():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    model = tiny_model()
    model.model.norm = Scale()
    model.model.layers[0].normal_projection = nn.Linear(4, 4)
    found = by_name(model)
    assert found["model.norm.weight"] == "norm"
    assert found["model.layers.0.normal_projection.weight"] == "matrix"
    assert found["model.layers.0.normal_projection.bias"] == "bias"


@pytest.mark.parametrize("norm", [nn.LayerNorm(3), nn.RMSNorm(3), nn.GroupNorm(1, 3), nn.BatchNorm1d(3)])
def test_torchs_norms(norm):
    assert is_norm(norm)


@pytest.mark.parametrize("other", [nn.Linear(3, 3), nn.Embedding(3, 3), nn.Conv1d(3, 3, 2), nn.Dropout()])
def test_other_layers(other):
    assert not is_norm(other)


def test_adapters_are_matrices_and_doras_magnitudes_are_not_norms():
    found = by_name(add_lora(tiny_model(), LoRA(rank=2, dora=True)))
    assert {kind for name, kind in found.items() if "lora_A" in name or "lora_B" in name} == {"matrix"}
    assert {kind for name, kind in found.items() if "magnitude" in name} == {"other"}


def test_a_tied_head_is_an_embedding():
    assert "head" not in by_name(tiny_model(tie_word_embeddings=True)).values()
