"""Sums over tokens, in float64 whatever the tokens' precision."""

import pytest
import torch

from dft_lightning.metrics import token_means, token_sums
from dft_lightning.weighting import TokenStats


def test_sums_are_those_of_float64():
    """Of a thousand float32 values; summed in float32 they would be off by more than 1e-9."""
    logp = -torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 5
    ids = torch.zeros(1000, dtype=torch.long)
    tokens = TokenStats(logp=logp, target=ids, sequence=ids, weight=logp.exp(), rank=ids)
    sums = token_sums(torch.tensor(7.0), torch.tensor(1000.0), tokens)
    p, wide = logp.exp().double(), logp.double()
    expected = [7.0, 1000.0, -wide.sum(), 1000.0, p.sum(), p.square().sum(), p.sum(), 1000.0]
    assert sums.tolist() == pytest.approx([float(value) for value in expected], rel=1e-12)
    means = token_means(sums)
    assert float(means["effective_sample_size"]) == pytest.approx(float(p.sum() ** 2 / (1000 * p.square().sum())))
    assert float(means["objective"]) == pytest.approx(0.007)
