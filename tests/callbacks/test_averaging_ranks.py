"""Averages and the search on two ranks: those of one, alike on both."""

import shutil

import averaging_ranks
import pytest
import torch
from conftest import sums, write_jsonl
from ranks import start


@pytest.fixture
def folder(tmp_path, model_dir):
    shutil.copytree(model_dir, tmp_path / "model")
    write_jsonl(tmp_path / "rows.jsonl", sums(26))
    return tmp_path


@pytest.mark.slow
def test_two_ranks_average_and_search_as_one_does(folder):
    """SGD: the weights of two ranks differ from those of one by the order of the sums, as in exactness.py."""
    start(2, averaging_ranks.__file__, "both", folder, "two")
    averaging_ranks.both(folder, "one")
    one, first, second = (torch.load(folder / f"{name}.pt") for name in ("one 0", "two 0", "two 1"))
    for kind in ("averaged", "resumed", "searched"):
        for name, value in one[kind].items():
            assert torch.equal(first[kind][name], second[kind][name]), (kind, name)
            assert (first[kind][name] - value).norm() <= 1e-5 * value.norm(), (kind, name)
    for name, value in first["averaged"].items():
        assert torch.equal(first["resumed"][name], value), name
    assert first["lr"] == second["lr"] == one["lr"]


@pytest.mark.slow
def test_on_sharded_weights(folder):
    start(2, averaging_ranks.__file__, "sharded", folder)
