"""The factor of a token and the units of a micro-batch, by hand."""

from types import SimpleNamespace

import pytest
import torch

from dft_lightning.normalizer import at_least_something, scale_gradients, token_factor, units


def batch(*counts):
    sequence = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.long))
    return SimpleNamespace(counts=list(counts), sequence=sequence)


@pytest.mark.parametrize(
    ("normalize", "counts", "factor", "expected"),
    [
        ("micro_batch", (1,), [1.0], 1),
        ("micro_batch", (0, 1), [1.0], 1),
        ("micro_batch", (1, 3), [0.25] * 4, 1),
        ("micro_batch", (), [], 0),
        ("micro_batch", (0, 0), [], 0),
        ("sequences", (1,), [1.0], 1),
        ("sequences", (1, 0, 2), [1.0, 0.5, 0.5], 2),
        ("sequences", (0,), [], 0),
        ("tokens", (1,), None, 1),
        ("tokens", (2, 0, 3), None, 5),
    ],
)
def test_factor_and_units(normalize, counts, factor, expected):
    found = token_factor(normalize, batch(*counts))
    assert (found if found is None else found.tolist()) == factor
    assert units(normalize, batch(*counts), "tokens", torch.ones(sum(counts))) == expected


@pytest.mark.parametrize("divisor", ["weights", "selected"])
@pytest.mark.parametrize("normalize", ["tokens", "sequences", "micro_batch"])
def test_units_of_a_weightings_own_divisor(normalize, divisor):
    """Σ n·w and Σ n·1[w ≠ 0] over three tokens of weights 0, .5 and 2 in sequences of one and two tokens."""
    weight = torch.tensor([2.0, 0.0, 0.5])
    n = {"tokens": [1, 1, 1], "sequences": [1, 0.5, 0.5], "micro_batch": [1 / 3] * 3}[normalize]
    counted = [2.0, 0.0, 0.5] if divisor == "weights" else [1, 0, 1]
    found = units(normalize, batch(1, 2), divisor, weight)
    assert float(found) == pytest.approx(sum(a * b for a, b in zip(n, counted, strict=True)), rel=1e-12)


def test_a_step_without_anything_counted_has_no_gradient():
    assert (1.0 / at_least_something(torch.tensor([0.0, -1.0, 0.5]))).tolist() == [0.0, 0.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_scaled_in_place_and_there_may_be_none(dtype):
    gradients = [torch.tensor([1.0, 2.0], dtype=dtype), torch.tensor([[4.0]], dtype=dtype)]
    scale_gradients(gradients, torch.tensor(0.5, dtype=torch.float64))
    assert [gradient.tolist() for gradient in gradients] == [[0.5, 1.0], [[2.0]]]
    scale_gradients([], torch.tensor(0.5))
