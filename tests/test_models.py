"""Backbone, head and logit transform of each family against the model's own logits (trap 13), and what is refused."""

import pytest
import torch
from conftest import tiny_config, tiny_model
from torch import nn

from dft_lightning.data.batch import Collator
from dft_lightning.errors import UserError
from dft_lightning.loading import ModelSource, load_model, load_tokenizer
from dft_lightning.models import LoRA, WeightedLM, add_lora
from dft_lightning.weighting import DFT, Uniform

FAMILIES = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "gemma2 soft-cap": ("gemma2", {}),
    "cohere logit scale": ("cohere", {}),
    "granite logits scaling": ("granite", {}),
    "phi head bias": ("phi", {}),
}


def batch(width=12):
    generator = torch.Generator().manual_seed(1)
    rows = [
        {
            "row": i,
            "input_ids": torch.randint(0, 320, (n,), generator=generator).numpy(),
            "supervised": [i > 2 for i in range(n)],
        }
        for i, n in enumerate((width, 7, 9))
    ]
    return Collator(1)([[row] for row in rows])


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_every_gradient_equal_the_models_own_logits(name):
    """Float64: 1e-10 is some thousand units of rounding of the deepest sum."""
    family, changes = FAMILIES[name]
    model = tiny_model(family, torch.float64, **changes)
    if family == "phi":
        nn.init.normal_(model.lm_head.bias)
    data = batch()
    loss, tokens = WeightedLM(model)(data, DFT())
    loss.backward()
    ours = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    logits = model(input_ids=data.input_ids, use_cache=False).logits.flatten(0, 1)[data.supervised]
    logp = logits.log_softmax(1).gather(1, data.target[:, None])[:, 0]
    expected = -(logp.exp().detach() * logp).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(tokens.logp, logp.detach(), rtol=1e-10, atol=1e-12)
    assert ours.keys() == {key for key, p in model.named_parameters() if p.grad is not None}
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert (ours[key] - parameter.grad).norm() <= 1e-10 * parameter.grad.norm() + 1e-14, key


def test_padding_changes_nothing():
    """Right-padded rows give what each gives alone."""
    model = WeightedLM(tiny_model(dtype=torch.float64)).eval()
    whole = model(batch(), Uniform())[1]
    alone = []
    for index, length in enumerate((12, 7, 9)):
        ids = batch().input_ids[index, :length].numpy()
        alone.append(
            model(
                Collator(1)([[{"row": 0, "input_ids": ids, "supervised": [i > 2 for i in range(length)]}]]), Uniform()
            )[1]
        )
    torch.testing.assert_close(whole.logp, torch.cat([one.logp for one in alone]), rtol=1e-10, atol=1e-12)


def test_an_empty_batch_reaches_every_parameter_with_zeros():
    """Trap 8: no constant without a graph, which would leave other ranks waiting."""
    network = WeightedLM(tiny_model())
    loss, tokens = network(Collator(1)([]), DFT())
    loss.backward()
    assert loss == 0
    assert len(tokens) == 0
    assert all(p.grad is not None and torch.equal(p.grad, torch.zeros_like(p)) for p in network.parameters())


def test_what_is_done_to_the_logits_must_be_understood():
    class Squashed(type(tiny_model())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 0.9
            return output

    with pytest.raises(UserError, match="does something to its logits"):
        WeightedLM(Squashed(tiny_config()))


class TestLoRA:
    def test_only_the_adapters_learn(self):
        network = WeightedLM(add_lora(tiny_model(), LoRA(rank=4, alpha=8)))
        network(batch(), DFT())[0].backward()
        learnt = {name for name, p in network.named_parameters() if p.grad is not None}
        assert learnt
        assert all("lora_" in name for name in learnt)

    def test_the_adapter_off_is_the_reference_to_the_bit(self):
        network = WeightedLM(add_lora(tiny_model(attention_dropout=0.3), LoRA(dropout=0.5)))
        base = WeightedLM(tiny_model(attention_dropout=0.3)).eval()
        assert torch.equal(network.logp(batch(), adapter=False), base(batch(), Uniform())[1].logp)
        assert torch.equal(network.logp(batch(), adapter=False), network.logp(batch()))
        assert network.training
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        assert torch.equal(network.logp(batch(), adapter=False), base(batch(), Uniform())[1].logp)
        assert not torch.equal(network.logp(batch()), base(batch(), Uniform())[1].logp)

    def test_an_adapted_head_is_refused(self):
        """Trap 12: reading its weight would drop the adapter."""
        model = add_lora(tiny_model(), LoRA(target_modules=["lm_head", "q_proj"]))
        with pytest.raises(UserError, match="leave the head"):
            WeightedLM(model)

    def test_unknown_layers_are_named(self):
        with pytest.raises(UserError, match=r"nonsense.*--model.lora.target_modules"):
            add_lora(tiny_model(), LoRA(target_modules=["nonsense"]))


class TestLoading:
    def test_a_folder(self, model_dir):
        model = load_model(ModelSource(str(model_dir), torch.bfloat16))
        assert model.dtype == torch.bfloat16
        assert model.training  # from_pretrained gives evaluation mode
        assert load_tokenizer(ModelSource(str(model_dir))).eos_token == "<|im_end|>"

    @pytest.mark.parametrize("name", ["nowhere/at-all", "/no/such/folder"])
    def test_what_is_not_there(self, name):
        with pytest.raises(UserError, match=rf"weights of model '{name}'.*--model.model_name"):
            load_model(ModelSource(name))
        with pytest.raises(UserError, match="tokenizer of model"):
            load_tokenizer(ModelSource(name))

    def test_unreadable_weights(self, model_dir, tmp_path):
        (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
        (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
        with pytest.raises(UserError, match="cannot load the weights"):
            load_model(ModelSource(str(tmp_path)))

    def test_an_unknown_attention_implementation(self, model_dir):
        with pytest.raises(UserError, match="fancy"):
            load_model(ModelSource(str(model_dir), attn_implementation="fancy"))

    def test_a_chat_template_by_name(self, model_dir):
        tokenizer = load_tokenizer(ModelSource(str(model_dir)), "chatml")
        assert "im_start" in tokenizer.chat_template
        with pytest.raises(UserError, match="chatml"):
            load_tokenizer(ModelSource(str(model_dir)), "nope")
