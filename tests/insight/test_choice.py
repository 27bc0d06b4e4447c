"""Weightings as the user names them."""

from dataclasses import dataclass

import pytest

from dft_lightning.errors import UserError
from dft_lightning.insight.choice import _by_label, chosen, weighting_of
from dft_lightning.weighting import (
    DFT,
    EntropyBonus,
    ImportanceWeighted,
    SentenceDFT,
    TokenWeighting,
    Uniform,
)
from dft_lightning.weighting.spec import label


@dataclass(frozen=True)
class Around(TokenWeighting):
    """Another weighting as it is."""

    of: TokenWeighting
    scale: float = 1.0

    def weights(self, tokens):
        return self.of.weights(tokens)


def test_a_label_has_what_differs_from_the_defaults():
    assert [label(one) for one in (Uniform(), DFT(), DFT(0.25))] == ["Uniform", "DFT", "DFT(floor=0.25)"]
    assert label(Around(ImportanceWeighted(level="token"))) == "Around(of=ImportanceWeighted(level='token'))"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("DFT", DFT()),
        ("dft_lightning.weighting.DFT", DFT()),
        ({"class_path": "DFT", "init_args": {"floor": 0.2}}, DFT(0.2)),
        ("{class_path: ImportanceWeighted, init_args: {level: token}}", ImportanceWeighted("token")),
        ({"class_path": "test_choice.Around", "init_args": {"of": {"class_path": "DFT"}}}, Around(DFT())),
    ],
)
def test_names_specs_and_yaml(spec, expected, monkeypatch, request):
    monkeypatch.syspath_prepend(str(request.path.parent))
    built = weighting_of(spec, "weightings")
    assert (type(built).__name__, label(built)) == (type(expected).__name__, label(expected))


@pytest.mark.parametrize("spec", [7, "{class_path: [", "sys.path", "no_such_module.Thing", {"init_args": {}}])
def test_what_is_no_weighting_is_refused_by_its_option(spec):
    with pytest.raises(UserError, match="--weightings"):
        weighting_of(spec, "weightings")


def test_a_configured_weighting_that_cannot_be_compared_is_left_out():
    assert list(chosen(None, EntropyBonus(SentenceDFT()))) == ["Uniform", "DFT", "DFT(floor=0.1)"]
    assert list(chosen(None, DFT(0.5))) == ["DFT(floor=0.5)", "Uniform", "DFT", "DFT(floor=0.1)"]


Ours = Uniform


def test_two_of_the_same_name_are_both_compared():
    @dataclass(frozen=True)
    class Uniform(TokenWeighting):
        """Not ours."""

        def weights(self, tokens):
            return tokens.p

    assert list(_by_label([DFT(), Uniform(), Ours()])) == [
        "DFT",
        "Uniform",
        "dft_lightning.weighting.likelihood.Uniform",
    ]
