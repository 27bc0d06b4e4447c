"""FLOPs by definition, against those that torch counts as they are run."""

import pytest
import torch
from conftest import tiny_model
from tiny_families import model_of
from torch.utils.flop_counter import FlopCounterMode

from dft_lightning.data.batch import Collator
from dft_lightning.models import LoRA, WeightedLM, add_lora
from dft_lightning.planning.flops import AttentionLayers, NotCountedError, model_flops
from dft_lightning.weighting import DFT


def rows(lengths, supervised):
    """Rows whose last tokens are supervised."""
    made = []
    for index, (length, count) in enumerate(zip(lengths, supervised, strict=True)):
        mask = torch.arange(length) >= length - count
        made.append([{"row": index, "input_ids": (torch.arange(length) % 300).numpy(), "supervised": mask.numpy()}])
    return Collator()(made)


def counted(network, batch):
    """What torch counts in one forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        network(batch, DFT())[0].backward()
    return counter.get_total_flops()


def masked_pairs(batch, flops):
    """What eager attention does beyond the definition: it multiplies all T² pairs."""
    count, width = batch.input_ids.shape
    return sum(3 * layers.a_pair * (count * width**2 - layers.pairs(batch.lengths)) for layers in flops.attention)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "qwen3"])
def test_all_trained_is_what_torch_counts(family):
    network = WeightedLM(tiny_model(family))
    batch, flops = rows([12, 12], [5, 3]), model_flops(network)
    assert counted(network, batch) == flops.of(batch.lengths, 8) + masked_pairs(batch, flops)


def test_frozen_weights_need_no_gradient_of_their_own():
    """But for query, key and value of the first layer, whose input nobody differentiates."""
    network = WeightedLM(add_lora(tiny_model(), LoRA(rank=2)))
    batch, flops = rows([12, 12], [5, 3]), model_flops(network)
    attention = network.base.get_decoder().layers[0].self_attn
    first = [attention.q_proj, attention.k_proj, attention.v_proj]
    needless = sum(
        2 * weight.numel() for part in first for weight in (part.base_layer.weight, part.lora_A["default"].weight)
    )
    expected = flops.of(batch.lengths, 8) + masked_pairs(batch, flops) - needless * 24
    assert counted(network, batch) == expected
    everything = model_flops(WeightedLM(tiny_model()))
    assert flops.a_supervised == everything.a_supervised * 4 // 6
    assert flops.a_token < everything.a_token


def test_pairs_by_hand():
    assert AttentionLayers(1).pairs([3, 1]) == 6 + 1
    window = AttentionLayers(1, window=2)
    assert window.pairs([4, 1]) == (1 + 2 + 2 + 2) + 1
    assert AttentionLayers(1, window=9).pairs([4]) == 10


def test_padding_is_no_work():
    flops = model_flops(WeightedLM(tiny_model()))
    assert flops.of([12, 4], 3) < flops.of([12, 12], 3)
    assert flops.of([], 0) == 0


def test_windows_are_by_layer():
    """Gemma 2 alternates: every other layer sees its window only."""
    flops = model_flops(WeightedLM(tiny_model("gemma2", sliding_window=4)))
    a_layer = 4 * 4 * 8
    assert flops.attention == (AttentionLayers(a_layer), AttentionLayers(a_layer, 4))
    flops = model_flops(WeightedLM(tiny_model("mistral", sliding_window=4)))
    assert flops.attention == (AttentionLayers(2 * a_layer, 4),)
    flops = model_flops(WeightedLM(tiny_model("qwen2", sliding_window=4, use_sliding_window=False)))
    assert flops.attention == (AttentionLayers(2 * a_layer),)


def test_heads_of_several_sizes_are_what_torch_counts():
    """Gemma 4: its full attention has wider heads, and fewer of them for keys."""
    network = WeightedLM(model_of("gemma4_text", attention="eager"))
    batch, flops = rows([12, 12], [5, 3]), model_flops(network)
    assert flops.attention == (AttentionLayers(4 * 4 * 16), AttentionLayers(4 * 4 * 8, 4))
    assert counted(network, batch) == flops.of(batch.lengths, 8) + masked_pairs(batch, flops)


@pytest.mark.parametrize("family", ["gpt_neo", "llama4_text", "mamba"])
def test_attention_that_is_not_known_is_named(family):
    with pytest.raises(NotCountedError, match="not known here"):
        model_flops(WeightedLM(model_of(family)))


def test_a_mixture_of_experts_is_refused_by_name():
    from transformers import AutoModelForCausalLM, MixtralConfig

    small = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    network = WeightedLM(AutoModelForCausalLM.from_config(MixtralConfig(**small, **heads)))
    with pytest.raises(NotCountedError, match=r"Mixtral.* are not known here"):
        model_flops(network)
