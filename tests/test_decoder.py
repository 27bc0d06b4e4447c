"""Decoder, layers, attention and products are found and tried on the model itself."""

import pytest
import torch
from tiny_families import model_of

from dft_lightning import varlen
from dft_lightning.decoder import decoder_of, layers_of, refuse_shared
from dft_lightning.errors import UserError
from dft_lightning.loading import ModelSource, load_model
from dft_lightning.models import WeightedLM

LISTS = {
    "llama": "layers",
    "llama4_text": "layers",
    "gpt2": "h",
    "gpt_neox": "layers",
    "opt": "layers",
    "mpt": "blocks",
}


@pytest.mark.parametrize("family", [*LISTS, "gemma3n_text"])
def test_the_decoder_has_the_embedding_and_the_layers_and_not_the_head(family):
    model = model_of(family)
    decoder = decoder_of(model)
    modules = list(decoder.modules())
    assert any(each is model.get_input_embeddings() for each in modules)
    assert not any(each is model.get_output_embeddings() for each in modules)
    assert layers_of(decoder) == list(getattr(decoder, LISTS.get(family, "layers")))


def test_a_decoder_that_cannot_be_separated_is_refused():
    model = model_of("llama4_text")
    model.model.lm_head = model.lm_head
    with pytest.raises(UserError, match="Llama4ForCausalLM has no decoder that can be separated"):
        decoder_of(model)


def test_layers_that_share_a_parameter_are_not_sharded():
    with pytest.raises(UserError, match=r"several layers of Zamba2Model share shared_transformer.*ddp or auto"):
        refuse_shared(decoder_of(model_of("zamba2")))
    refuse_shared(decoder_of(model_of("gemma3n_text")))


#: With which attention documents stay apart, and what a refusal advises; None where it is not refused.
PACKED = {
    ("opt", "sdpa"): "to varlen, or --data.packing to false",
    ("nemotron", "varlen"): "to sdpa or eager, or --data.packing to false",
    ("falcon", "sdpa"): "set --data.packing to false",
    ("qwen3_5_text", "sdpa"): "set --data.packing to false",
    ("gpt_oss", "eager"): "set --data.packing to false",
    ("mamba", "eager"): "set --data.packing to false",
    ("qwen2", "sdpa"): None,
    ("opt", "varlen"): None,
}


@pytest.mark.parametrize(("family", "attention"), PACKED)
def test_a_refusal_of_packing_names_what_passes_on_this_model(family, attention):
    varlen.register()
    network, advice = WeightedLM(model_of(family, attention=attention)), PACKED[family, attention]
    if advice is None:
        network.check_borders()
        return
    with pytest.raises(UserError, match=r"data\.packing") as refused:
        network.check_borders()
    assert str(refused.value).endswith(advice)
    assert network.base.config._attn_implementation == attention
    for other in network.packs_with():
        assert f"implementation to {other}" in str(refused.value) or f" or {other}" in str(refused.value)
        WeightedLM(model_of(family, attention=other)).check_borders()


@pytest.mark.parametrize(
    ("family", "advice"), [("llama4_text", "sdpa or eager"), ("gemma2", "eager"), ("gpt_oss", "eager")]
)
def test_attention_that_the_model_asks_too_much_of_is_refused_before_the_fit(family, advice):
    """Llama 4's chunks longer than what is tried, too."""
    varlen.register()
    changes = {"attention_chunk_size": 64} if family == "llama4_text" else {}
    with pytest.raises(UserError, match=rf"attention 'varlen' of \w+ .*: set --model.attn_implementation to {advice}$"):
        WeightedLM(model_of(family, attention="varlen", **changes))


@pytest.mark.parametrize("family", ["gptj", "gpt_neo", "falcon", "bloom", "mpt"])
def test_attention_that_a_family_does_not_take_is_refused_with_its_default(family, tmp_path):
    model = model_of(family)
    model.save_pretrained(tmp_path)
    default = model.config._attn_implementation
    message = (
        rf"attn_implementation is 'varlen', which {type(model).__name__} does not support.*leave it out.*{default}"
    )
    with pytest.raises(UserError, match=message):
        load_model(ModelSource(str(tmp_path), attn_implementation="varlen"))


@pytest.mark.parametrize("attention", ["test_sees_all", "test_fails"])
def test_attention_that_sees_later_tokens_or_fails_is_refused(attention):
    from transformers import AttentionInterface, AttentionMaskInterface

    def attend(module, query, key, value, mask, scaling=None, **_):
        if attention == "test_fails":
            raise KeyError("nothing here")
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None

    AttentionInterface.register(attention, attend)
    AttentionMaskInterface.register(attention, lambda *_, **__: None)
    with pytest.raises(UserError, match=r"(tokens see later ones|nothing here).*implementation to varlen or sdpa or"):
        WeightedLM(model_of("llama", attention=attention))


@pytest.mark.parametrize("family", ["mixtral", "mamba", "deepseek_v2"])
def test_families_whose_kernels_or_logits_do_not_know_float64_train_in_it(family, tmp_path):
    model_of(family).save_pretrained(tmp_path)
    network = WeightedLM(load_model(ModelSource(str(tmp_path), torch.float64)))
    assert network.base.dtype == torch.float64


def test_products_that_are_changed_in_place_are_not_kept():
    """Gemma 3n adds to a product; "selective" would use it changed twice, and its gradients were wrong."""
    network = WeightedLM(model_of("gemma3n_text"))
    with pytest.raises(UserError, match=r"selective, but Gemma3nTextModel changes products in place .* full or none"):
        network.check_recomputation("selective")
    for kind in ("none", "full"):
        network.check_recomputation(kind)
    WeightedLM(model_of("llama")).check_recomputation("selective")
