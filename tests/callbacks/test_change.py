"""The tokens that training pushes most, and how they are named."""

import statistics

import pytest
import torch

from dft_lightning.callbacks.looks.change import Push, extremes, pushes, table, visible


def test_mean_count_and_interval_by_hand():
    targets = torch.tensor([7, 3, 7, 7, 3, 9])
    before = torch.tensor([-1.0, -2.0, -3.0, -1.0, -1.0, -5.0], dtype=torch.float64)
    now = before + torch.tensor([1.0, -1.0, 2.0, 6.0, -2.0, 50.0], dtype=torch.float64)
    found = pushes(targets, before, now, at_least=2)
    assert [(push.token, push.count) for push in found] == [(7, 3), (3, 2)]
    for push, changes in zip(found, ([1, 2, 6], [-1, -2]), strict=True):
        assert push.mean == pytest.approx(statistics.mean(changes))
        half = statistics.NormalDist().inv_cdf(0.975) * statistics.stdev(changes) / len(changes) ** 0.5
        assert push.half_width == pytest.approx(half, rel=1e-6)


def test_it_is_against_the_start():
    nothing = torch.full((12,), -1.0)
    assert extremes(pushes(torch.zeros(12, dtype=torch.long), nothing, nothing)) == ([], [])


def test_few_places_and_numbers_that_are_none_do_not_count():
    targets = torch.tensor([1] * 5 + [2] * 4 + [3] * 5)
    now = torch.zeros(14)
    now[-1] = torch.nan
    found = pushes(targets, torch.full((14,), -1.0), now)
    assert [(push.token, push.mean, push.half_width) for push in found] == [(1, 1.0, 0.0)]
    assert pushes(targets[:0], now[:0], now[:0]) == []


def test_the_largest_first_on_both_sides():
    found = [Push(token, mean, 0.1, 9) for token, mean in enumerate([3.0, 2.0, 0.0, -1.0, -4.0])]
    up, down = extremes(found, most=1)
    assert [push.token for push in up] == [0]
    assert [push.token for push in down] == [4]


def test_the_table():
    texts = [" the", "|", "\\frac"]
    up, down = [Push(0, 1.5, 0.25, 9), Push(1, 1.0, 0.0, 5)], [Push(2, -2.0, 0.5, 7)]
    got = table(up, down, texts)
    assert "| ␣the | 0 | +1.500 | +1.250 to +1.750 | 9 |" in got
    assert "| &#124; | 1 | +1.000 | +1.000 to +1.000 | 5 |" in got
    assert "| \\\\frac | 2 | -2.000 | -2.500 to -1.500 | 7 |" in got
    assert got.index("Pushed up") < got.index("␣the") < got.index("Pushed down") < got.index("frac")
    assert "Pushed down**: none" in table(up, [], texts)
    assert "No token" in table([], [], texts)


def test_white_space_is_seen():
    assert visible(" a\n\n") == "␣a↵↵"
    assert visible("") == "∅"
