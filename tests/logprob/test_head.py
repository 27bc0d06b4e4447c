"""The logit transforms against autograd, and the statistics by hand."""

import math

import pytest
import torch

from dft_lightning.logprob.head import TOP_K, LogitTransform, statistics

NAMES = ("entropy", "topk_entropy", "collision", "rank", "top_p")


@pytest.mark.parametrize("softcap", [None, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("scale", [0.25, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("biased", [False, True])
def test_a_transform_and_its_gradient_in_place(biased, scale, softcap):
    """In float64, each of at most five operations rounds once: 1e-14 relative is ample and no formula is that close."""
    raw = torch.tensor([[-2.0, -0.3, 0.0, 0.7, 1.9]], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([0.1, -0.2, 0.3, 0.0, 0.5], dtype=torch.float64) if biased else None
    plain = (raw if bias is None else raw + bias) * scale
    plain = plain if softcap is None else softcap * torch.tanh(plain / softcap)
    upstream = torch.tensor([[1.0, -2.0, 0.5, 3.0, -1.0]], dtype=torch.float64)
    (expected,) = torch.autograd.grad(plain, raw, upstream)
    transform, given = LogitTransform(bias, scale, softcap), raw.detach().clone()
    logits = transform.forward_(given)
    assert logits is given
    torch.testing.assert_close(logits, plain.detach(), rtol=1e-14, atol=1e-15)
    grad = transform.backward_(upstream.clone(), logits)
    torch.testing.assert_close(grad, expected, rtol=1e-13, atol=1e-14)


def found(p, target=0, names=NAMES):
    logits = torch.tensor([p], dtype=torch.float64).log() + 7.0
    values = statistics(names, logits, logits.logsumexp(1), logits[:, target])
    return {name: value.item() for name, value in values.items()}


def test_statistics_by_hand():
    values = found([0.5, 0.25, 0.25, 0.0], target=1)
    assert values["entropy"] == pytest.approx(1.5 * math.log(2), rel=1e-14)
    assert values["topk_entropy"] == pytest.approx(1.5 * math.log(2), rel=1e-14)
    assert values["collision"] == pytest.approx(0.375, rel=1e-14)
    assert (values["rank"], values["top_p"]) == (1, pytest.approx(0.5, rel=1e-14))


def test_statistics_of_one_token():
    assert found([1.0]) == {"entropy": 0.0, "topk_entropy": 0.0, "collision": 1.0, "rank": 0, "top_p": 1.0}


@pytest.mark.parametrize("count", [TOP_K - 1, TOP_K, TOP_K + 1, 50])
def test_the_top_k_entropy_is_that_of_20_tokens_at_most(count):
    assert TOP_K == 20
    assert found([1 / count] * count)["topk_entropy"] == pytest.approx(math.log(min(count, 20)), rel=1e-13)


def test_only_what_is_asked_for():
    assert set(found([0.5, 0.5], names=("rank",))) == {"rank"}
    assert found([0.5, 0.5], names=()) == {}
