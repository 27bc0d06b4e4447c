"""Counts and sums over tokens: by hand, and against numpy on random tokens."""

import itertools

import numpy as np
import pytest
import torch

from dft_lightning.callbacks.looks.tally import (
    CONFIDENCE_EDGES,
    P_EDGES,
    POSITION_EDGES,
    POSITION_LABELS,
    WEIGHT_EDGES,
    Tally,
    bin_of,
    calibration_error,
    percent,
    sums_by,
    sums_by_position,
)
from dft_lightning.token_classes import CLASSES
from dft_lightning.weighting import TokenStats

NONE = torch.zeros(0, dtype=torch.long)
CLASS_OF = torch.tensor([2, 5, 2, 0], dtype=torch.uint8)  # of a vocabulary of four


def tokens(count=200, seed=0, **more):
    random = np.random.default_rng(seed)
    p = random.uniform(0, 1, count) ** 4
    facts = {
        "logp": np.log(p),
        "target": random.integers(0, 4, count),
        "sequence": np.sort(random.integers(0, 9, count)),
        "position": random.integers(0, 5000, count),
        "entropy": random.uniform(0, 5, count),
        "rank": random.integers(0, 7, count),
        "top_p": np.maximum(p, random.uniform(0.1, 1, count)),
        "weight": random.uniform(-0.2, 2, count),
    } | more
    return TokenStats(**{name: None if value is None else torch.as_tensor(value) for name, value in facts.items()})


def test_by_p_weight_and_class():
    given = tokens()
    tally = Tally.of(given, NONE, CLASS_OF)
    p, weight, target = given.p.numpy(), given.weight.numpy(), given.target.numpy()
    inside = np.clip(weight, 0, None)  # what lies below counts to the lowest bin
    density = np.histogram2d(inside, p, [WEIGHT_EDGES, P_EDGES])[0]
    assert tally.density.tolist() == density.tolist()
    assert tally.p.tolist() == np.histogram(p, P_EDGES)[0].tolist()
    assert tally.weight.tolist() == np.histogram(inside, WEIGHT_EDGES)[0].tolist()
    shares = np.histogram(p, P_EDGES, weights=np.abs(weight))[0]
    assert tally.weight_by_p.numpy() == pytest.approx(shares)
    for number in range(len(CLASSES)):
        of_class = CLASS_OF.numpy()[target] == number
        expected = [of_class.sum(), np.abs(weight)[of_class].sum(), p[of_class].sum()]
        assert tally.by_class[number].numpy() == pytest.approx(expected)


def test_by_position():
    assert len(POSITION_EDGES) == len(POSITION_LABELS) + 1
    places = torch.tensor([0, 1, 2, 3, 4, 1023, 1024, 2047, 2048, 99999])
    assert [POSITION_LABELS[number] for number in bin_of(places, POSITION_EDGES)] == [
        *("0", "1", "2–3", "2–3", "4–7", "512–1023", "1024–2047", "1024–2047", "≥2048", "≥2048"),
    ]
    given = tokens()
    sums = Tally.of(given, NONE).by_position
    assert torch.equal(sums, sums_by_position(given.position, given.logp))
    assert sums.sum(0).numpy() == pytest.approx([200, -given.logp.sum().item(), given.p.sum().item()])
    inside = (given.position >= 512) & (given.position < 1024)
    expected = [inside.sum().item(), -given.logp[inside].sum().item(), given.p[inside].sum().item()]
    assert sums[10].tolist() == pytest.approx(expected)


class TestCalibration:
    def test_by_hand(self):
        """Bins .6 to .7 (twice, right once) and .9 to 1 (once, wrong): |1 − 1.26| + |0 − .95| over three."""
        given = tokens(3, top_p=[0.61, 0.65, 0.95], rank=[0, 1, 3])
        tally = Tally.of(given, NONE)
        assert calibration_error(tally.calibration) == pytest.approx((0.26 + 0.95) / 3)
        assert tally.scalars()["calibration_error"] == calibration_error(tally.calibration)

    def test_by_guos_formula(self):
        given = tokens(500)
        confidence, right = given.top_p.numpy(), given.rank.numpy() == 0
        bins, error = np.minimum((confidence * 10).astype(int), 9), 0.0
        for number in range(10):
            own = bins == number
            if own.any():
                error += own.mean() * abs(right[own].mean() - confidence[own].mean())
        assert Tally.of(given, NONE).scalars()["calibration_error"] == pytest.approx(error)

    def test_a_calibrated_model_has_none(self):
        """Of ten tokens with .75, in quarters of four: right three times in four."""
        given = tokens(12, top_p=[0.75] * 12, rank=[0, 0, 0, 4] * 3)
        assert Tally.of(given, NONE).scalars()["calibration_error"] == pytest.approx(0.0, abs=1e-15)

    def test_edges(self):
        assert len(CONFIDENCE_EDGES) == 11
        assert CONFIDENCE_EDGES[3] == 0.3
        assert bin_of(torch.tensor([0.0, 0.1, 1.0]), CONFIDENCE_EDGES).tolist() == [0, 1, 9]


def test_ranks():
    tally = Tally.of(tokens(6, rank=[0, 0, 4, 5, 12, 40000]), NONE)
    assert tally.rank.tolist() == [2, 0, 0, 1, 1, 1, 0, 0, 1]
    assert tally.scalars()["top5"] == pytest.approx(3 / 6)


def test_what_was_not_computed_is_not_counted():
    given = tokens(5, entropy=None, rank=None, top_p=None, position=None)
    tally = Tally.of(given, NONE)
    for name in ("entropy", "rank", "by_class", "by_position", "calibration"):
        assert not getattr(tally, name).any(), name
    assert not {"calibration_error", "top5"} & tally.scalars().keys()
    assert percent(torch.zeros(3)) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("sizes", [(200,), (0, 120, 80), (1,) * 200])
def test_parts_add_up(sizes):
    given = tokens()
    ends = np.cumsum([0, *sizes])
    parts = [Tally.of(given[slice(a, b)], NONE, CLASS_OF) for a, b in itertools.pairwise(ends)]
    whole, together = Tally.of(given, NONE, CLASS_OF), sum(parts[1:], parts[0])
    for ours, theirs in zip(together.tensors(), whole.tensors(), strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_sums_by():
    got = sums_by(torch.tensor([1, 1, 0]), 3, torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 1, 1]))
    assert got.tolist() == [[4, 1], [3, 2], [0, 0]]
