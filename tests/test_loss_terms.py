"""Terms of a model's own loss: found by name and by what the model returns, and refused unless they are ignored."""

import inspect
import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import sums, tiny_model, write_jsonl
from harness import fit
from routed import routed_config

from dft_lightning import loss_terms
from dft_lightning.errors import UserError
from dft_lightning.loss_terms import unsupported_terms, wants_router_loss
from dft_lightning.own_loss import own_loss
from dft_lightning.weighting import Uniform

IGNORED = {"unsupported_losses": "ignore"}
#: Settings under which models were published, or that transformers' classes have; each asks for a term of the loss.
ASKED = {
    "z_loss_coefficient": 1e-4,
    "router_z_loss_coef": 1e-3,
    "z_loss_coeff": 1e-4,
    "aux_loss_alpha": 1e-3,
    "moe_aux_loss_coeff": 1e-2,
    "num_nextn_predict_layers": 1,
    "num_mtp_layers": 2,
    "mtp_num_hidden_layers": 1,
    "num_mtp_modules": 3,
    "use_mtp": True,
    "mtp_loss_scaling_factor": 0.3,
    "medusa_num_heads": 4,
    "label_smoothing": 0.1,
}
#: Settings that only look alike, or switch a term off.
NOT_ASKED = {
    "z_loss_coefficient": 0.0,
    "router_z_loss_coef": None,
    "num_nextn_predict_layers": 0,
    "use_mtp": False,
    "loss_type": "ForCausalLM",
    "seq_aux": True,
    "router_aux_loss_coef": 0.001,
    "aux_loss_coef": 0.001,
    "mtp_hidden_states_first": True,
    "mtp_layer_types": ["dense"],
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", sums(8))


def configured(model_dir, folder, **settings):
    """The tiny model with further settings in its configuration."""
    shutil.copytree(model_dir, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


class TestNames:
    @pytest.mark.parametrize(("name", "value"), ASKED.items())
    def test_a_term_is_refused_before_a_weight_is_read(self, model_dir, rows, tmp_path, name, value):
        model = configured(model_dir, tmp_path / "model", **{name: value})
        (model / "model.safetensors").unlink()
        expected = f"LlamaConfig asks for terms of the loss that are not supported: {name} {value}. Set --model.unsup"
        with pytest.raises(UserError, match=expected):
            fit(model, rows, Uniform())

    def test_all_of_them_are_named(self, model_dir, tmp_path):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(configured(model_dir, tmp_path / "model", **ASKED))
        assert unsupported_terms(config).keys() == ASKED.keys()

    def test_what_only_looks_alike_is_not_refused(self, model_dir, tmp_path):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(configured(model_dir, tmp_path / "model", **NOT_ASKED))
        assert unsupported_terms(config) == {}

    def test_it_is_trained_without_them_by_request_and_says_so(self, model_dir, rows, tmp_path, monkeypatch):
        said = []
        monkeypatch.setattr(loss_terms, "rank_zero_info", said.append)
        model = configured(model_dir, tmp_path / "model", aux_loss_alpha=0.001, num_nextn_predict_layers=1)
        _, ours, _ = fit(model, rows, Uniform(), module=IGNORED, max_steps=1)
        _, truth, _ = fit(model_dir, rows, Uniform(), max_steps=1)
        assert torch.equal(ours.gradients[0], truth.gradients[0])
        ignored = "aux_loss_alpha 0.001, num_nextn_predict_layers 1"
        assert said == [f"Terms of the model's loss that are ignored by request: {ignored}"]

    @pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
    @pytest.mark.parametrize(("asked", "option", "wanted"), [
        (True, "auto", True), (True, "none", False), (True, 0.0, False), (False, "auto", False), (False, 0.1, True),
    ])  # fmt: skip
    def test_whether_there_is_a_router_loss(self, family, asked, option, wanted):
        assert wants_router_loss(routed_config(family, output_router_logits=asked), option) is wanted

    def test_a_router_loss_without_a_coefficient(self):
        with pytest.raises(UserError, match=r"there is no coefficient: set --model\.router_loss"):
            loss_terms.router_coefficient(tiny_model(), "auto")


def with_term(monkeypatch, term):
    """Let the tiny model's own loss have a further term of its logits, in training alone."""
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM.forward

    def forward(self, *args, labels=None, **options):
        output = plain(self, *args, labels=labels, **options)
        if labels is not None and self.training:
            output["loss"] = term(output.loss, output.logits)
        return output

    forward.__signature__ = inspect.signature(plain)
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)


class TestOwnLoss:
    @pytest.mark.parametrize("term", [
        lambda loss, logits: loss + 1e-3 * logits.logsumexp(-1).square().mean(),
        lambda loss, logits: 0.5 * loss,
        lambda loss, logits: 0.9 * loss - 0.1 * logits.log_softmax(-1).mean(),
        lambda loss, logits: loss + 1e-3,
    ], ids=["z-loss", "scaled", "label smoothing", "constant"])  # fmt: skip
    def test_a_term_that_no_name_tells_of_is_refused(self, model_dir, rows, monkeypatch, term):
        with_term(monkeypatch, term)
        with pytest.raises(UserError, match=r"own loss of LlamaForCausalLM.*--model.unsupported_losses ignore"):
            fit(model_dir, rows, Uniform())

    def test_it_is_ignored_by_request_and_its_size_printed(self, model_dir, rows, monkeypatch):
        said = []
        with_term(monkeypatch, lambda loss, logits: loss + 0.25)
        monkeypatch.setattr(loss_terms, "rank_zero_info", said.append)
        fit(model_dir, rows, Uniform(), module=IGNORED, max_steps=1)
        assert said == ["Ignored by request: a term of 0.25 in the own loss of LlamaForCausalLM on eight tokens"]

    def test_a_loss_that_cannot_be_had_is_said(self, model_dir, rows, monkeypatch):
        from transformers import LlamaForCausalLM

        plain, said = LlamaForCausalLM.forward, []

        def forward(self, *args, labels=None, **options):
            if labels is not None:
                raise RuntimeError("no loss here")
            return plain(self, *args, **options)

        monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
        monkeypatch.setattr(loss_terms, "rank_zero_warn", said.append)
        fit(model_dir, rows, Uniform(), max_steps=1)
        assert len(said) == 1
        assert "own loss of LlamaForCausalLM could not be compared" in said[0]
        assert said[0].endswith("RuntimeError: no loss here")

    @pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "cohere", "granite", "phi", "mistral", "qwen3"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_cross_entropy_alone_is_within_rounding(self, family, dtype):
        """In any precision the bound is far below a term of a usual size."""
        found = own_loss(tiny_model(family, dtype), False)
        assert not found.skipped
        assert found.unknown() == 0.0
        assert found.rounding < 3e-4

    def test_the_model_and_the_random_numbers_are_as_before(self):
        model = tiny_model(attention_dropout=0.5).eval()
        model.lm_head.train()
        modes = [module.training for module in model.modules()]
        torch.manual_seed(3)
        own_loss(model, False)
        assert [module.training for module in model.modules()] == modes
        drawn = torch.rand(3)
        torch.manual_seed(3)
        assert torch.equal(drawn, torch.rand(3))
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_labels_that_the_class_does_not_shift(self):
        """They are shifted in the data here."""
        found = own_loss(tiny_model(), False)
        assert replace(found, loss=found.nll[1]).unknown() == 0.0
        assert replace(found, loss=found.nll[1] + 0.01).unknown() != 0.0
