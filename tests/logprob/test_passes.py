"""Which rows take part in the products of the gradients, and how sequences become chunks."""

from types import SimpleNamespace

import pytest
import torch

from dft_lightning.logprob.chunked import _lengths
from dft_lightning.logprob.passes import Gradients, _counting


def test_gradients_are_wanted_if_any_is():
    one = torch.zeros(1)
    assert not Gradients().wanted()
    assert all(Gradients(**{name: one}).wanted() for name in ("hidden", "weight", "bias"))


def counting(weights, rows, factor=None, vocabulary=False, device="cpu"):
    weights = torch.tensor(weights)
    job = SimpleNamespace(
        target=torch.zeros(len(weights), device=device),
        weighting=SimpleNamespace(vocabulary=vocabulary),
        coefficient=lambda weight, rows: weight if factor is None else weight * torch.tensor(factor)[rows],
    )
    found = _counting(job, SimpleNamespace(values={"weight": weights}), rows)
    return None if found is None else found.tolist()


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1.0, 1.0, 1.0, 1.0], None),
        ([1.0, 0.0, 1.0, 1.0], [0, 2, 3]),  # three of four: still worth it
        ([1.0, 1.0, 0.0, 1.0, 1.0], None),  # four of five: not
        ([0.0, 0.0, -1.0], [2]),
        ([0.0, 0.0], []),
    ],
)
def test_rows_of_weight_zero_are_left_out_where_that_pays(weights, expected, start):
    rows = slice(start, start + len(weights))
    assert counting([1.0] * start + weights + [0.0] * 4, rows) == expected


def test_a_factor_of_zero_leaves_a_row_out_too():
    assert counting([1.0, 1.0], slice(0, 2), factor=[0.0, 1.0]) == [1]


def test_no_row_is_left_out_of_targets_on_another_device_or_of_no_rows():
    assert counting([0.0, 1.0], slice(0, 2), vocabulary=True) is None
    assert counting([0.0, 1.0], slice(0, 2), device="meta") is None
    assert counting([0.0, 1.0], slice(1, 1)) is None


def test_lengths_are_found_where_sequences_lie_together():
    assert _lengths(torch.tensor([4, 4, 9, 9, 9, 1])) == [2, 3, 1]
    assert _lengths(torch.tensor([], dtype=torch.long)) == []
    assert _lengths(torch.tensor([4, 9, 4])) is None
    assert _lengths(torch.empty(3, dtype=torch.long, device="meta")) is None, "a GPU is not waited for"
