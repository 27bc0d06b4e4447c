"""Targets over the vocabulary in a diagnosis: worth and pull against autograd of the oracle, by the logits."""

import pytest
import torch
from conftest import sums, tiny_model, tiny_tokenizer, write_jsonl

from dft_lightning import FineTuner, NuminaMathDataModule
from dft_lightning.insight.choice import why_not
from dft_lightning.insight.targets import worth_and_pull
from dft_lightning.logprob import ReferenceHead, dense_weighted_nll
from dft_lightning.models import WeightedLM
from dft_lightning.weighting import ASFT, GEM, GIFT, EntropyBonus, LabelSmoothing, SentenceDFT, Uniform


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("looked")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    data = NuminaMathDataModule(str(write_jsonl(folder / "rows.jsonl", sums(4))), cache_dir=str(folder / "cache"))
    module = FineTuner(str(folder / "model"), Uniform())
    data.tokenizer = module.tokenizer
    data.prepare_data()
    data.setup("fit")
    network = WeightedLM(module.initial_model()).eval()
    (batch,) = list(data.scoring_loader(data.train_rows, "train", workers=0))[:1]
    with torch.no_grad():
        return network, batch, network(batch, Uniform())[1]


@pytest.mark.parametrize(
    "weighting",
    [ASFT(0.5), ASFT(0.5, "reverse"), GEM(), GIFT(), LabelSmoothing(), EntropyBonus(Uniform(), 0.3)],
    ids=repr,
)
def test_against_autograd(looked, weighting):
    """The logits of each token are given as hidden states under a head that is the identity."""
    network, batch, tokens = looked
    states = network.reference(batch)
    logits = (states.hidden @ states.weight.T).detach().double().requires_grad_()
    one = torch.eye(logits.shape[1], dtype=torch.float64)
    loss, truth = dense_weighted_nll(
        logits, one, batch.target, weighting, reference=ReferenceHead(logits.detach(), one)
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    worth, pull = worth_and_pull(network, batch, weighting, tokens)
    torch.testing.assert_close(worth.double(), truth.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(pull.double(), gradient.norm(dim=1), rtol=1e-4, atol=1e-6)


def test_one_that_looks_at_other_tokens_is_left_out():
    assert why_not(GEM()) == ""
    assert "looks at other tokens" in why_not(EntropyBonus(SentenceDFT()))
