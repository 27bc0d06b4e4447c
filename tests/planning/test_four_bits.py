"""What a plan says of a base model in 4 bits, against one that bitsandbytes holds."""

import pytest
import torch
from conftest import tiny_config
from quantized import BIG, needs_bitsandbytes, quantized
from test_memory import load
from test_rehearsal import SHAPES, run, setting

from dft_lightning.adapters import LoRA, add_lora
from dft_lightning.data.batch import Batch
from dft_lightning.errors import UserError
from dft_lightning.models import WeightedLM
from dft_lightning.planning.flops import model_flops
from dft_lightning.planning.live_bytes import nbytes
from dft_lightning.planning.memory import memory
from dft_lightning.planning.rehearsal import rehearse
from dft_lightning.quantization import quantized_layers
from dft_lightning.recomputation import recompute

LORA = LoRA(rank=2)


def batch_of(shape):
    index = torch.arange(shape.supervised)
    known = {"supervised": index, "target": index, "sequence": torch.zeros_like(index), "position": index}
    return Batch(**(vars(shape.batch()) | known | {"counts": [shape.supervised]}))


@needs_bitsandbytes
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", ["none", "full"])
def test_the_peak_is_that_of_a_real_run(tmp_path, kind, precision):
    """Statistics of the tokens are not rehearsed: some vectors (N,), at most 100 bytes a token here.

    Nor is the copy in float32 that peft makes of a product under autocast, of 128 numbers a position at most.
    """
    how, shape = setting(recomputation=kind, precision=precision, four_bits=True), SHAPES["padded"]
    compute = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    network = WeightedLM(add_lora(quantized(tmp_path, compute=compute), LORA)).train()
    recompute(network.base.get_decoder(), kind)
    batch = batch_of(shape)
    found = rehearse(tiny_config(**BIG), LORA, shape, how)
    copied = 2 * 16 * 128 * 4 if how.autocast else 0
    assert found.peak == pytest.approx(run(network, batch, how), abs=100 * len(batch.target) + copied)
    assert found.gradients == nbytes(p for p in network.parameters() if p.requires_grad)
    plain = rehearse(tiny_config(**BIG), LORA, shape, setting(recomputation=kind, precision=precision))
    assert found.saved <= plain.saved


@needs_bitsandbytes
def test_weights_are_as_large_as_those_that_bitsandbytes_holds(tmp_path):
    """Beside them it keeps two small tables of values a layer, of 16 and 256 numbers, and a mean."""
    model = quantized(tmp_path)
    states = [layer.weight.quant_state for _, layer in quantized_layers(model)]
    held = nbytes(model.parameters()) + nbytes([part for s in states for part in (s.absmax, s.state2.absmax)])
    need = memory(load(config=tiny_config(**BIG), four_bits=True), "none")
    assert need.held["weights"] == held
    assert held < nbytes(p for p in model.parameters() if p.is_floating_point()) + sum(
        0.54 * layer.in_features * layer.out_features for _, layer in quantized_layers(model)
    )


@needs_bitsandbytes
def test_operations_are_those_of_the_plain_model(tmp_path):
    from conftest import tiny_model

    packed = WeightedLM(add_lora(quantized(tmp_path), LORA))
    assert model_flops(packed) == model_flops(WeightedLM(add_lora(tiny_model(**BIG), LORA)))


def test_four_bits_make_a_large_model_fit():
    """Of 16 bits a weight 4 + 8/64 + 32/(64·256) are left, but in embedding and head: 1.7 GB become 0.44."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32}
    how = {"config": tiny_config(**sizes), "lora": LORA, "dtype": torch.bfloat16, "precision": "bf16-true"}
    whole, packed = (memory(load(**how, four_bits=which), "full") for which in (False, True))
    assert 3.8 < whole.held["weights"] / packed.held["weights"] < 3.9
    largest = 4096 * 14336 * 2  # is read out for a product, maybe not when most else is there, and let go
    assert packed.micro_batch.peak > largest
    assert packed.micro_batch.peak < whole.micro_batch.peak + 1.1 * largest


def test_dora_is_not_foreseen():
    with pytest.raises(UserError, match=r"dora is true and model\.quantization"):
        memory(load(config=tiny_config(**BIG), lora=LoRA(dora=True), four_bits=True), "none")
