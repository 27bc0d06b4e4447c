"""A weighting survives the way through plain data, as in a checkpoint."""

from dataclasses import dataclass

import pytest

from dft_lightning.weighting import DFT, ImportanceWeighted, TokenWeighting, Uniform
from dft_lightning.weighting.spec import from_spec, to_spec


@dataclass(frozen=True)
class Wrapped(TokenWeighting):
    inner: TokenWeighting
    parts: tuple[TokenWeighting, ...] = ()

    def weights(self, tokens):
        return self.inner.weights(tokens)


@pytest.mark.parametrize(
    "weighting",
    [Uniform(), DFT(floor=0.25), ImportanceWeighted(clip=(0.5, 2.0)), Wrapped(DFT(0.1), (Uniform(), DFT()))],
    ids=repr,
)
def test_round_trip(weighting):
    assert from_spec(to_spec(weighting)) == weighting


def test_plain_data():
    assert to_spec(DFT(0.1)) == {
        "class_path": "dft_lightning.weighting.likelihood.DFT",
        "init_args": {"floor": 0.1},
    }


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"class_path": "nowhere.Weighting"}, "cannot be imported"),
        ({"class_path": "dft_lightning.weighting.Nothing"}, "cannot be imported"),
        ({"class_path": "collections.OrderedDict"}, "is not a TokenWeighting"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        from_spec(spec)


def test_what_is_not_plain_is_refused():
    class Bare(TokenWeighting):
        def weights(self, tokens):
            return tokens.p

    with pytest.raises(ValueError, match="decorate it"):
        to_spec(Bare())
    with pytest.raises(ValueError, match="expected numbers"):
        to_spec(Wrapped(object()))
