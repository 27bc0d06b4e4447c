"""A weighting survives the way through plain data, as in a checkpoint."""

import importlib
from dataclasses import dataclass, field

import pytest

from dft_lightning.weighting import DFT, ImportanceWeighted, Mixed, Thresholded, TokenWeighting, Uniform
from dft_lightning.weighting.spec import from_spec, label, to_spec


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
        ({"class_path": "nowhere.Weighting"}, "`import nowhere` first"),
        ({"class_path": "dft_lightning.weighting.Nothing"}, "is not a TokenWeighting"),
        ({"class_path": "dft_lightning.weighting.DFT", "init_args": {"nothing": 1}}, "cannot be made"),
        ({"class_path": "dft_lightning.weighting.DFT", "init_args": 1}, "cannot be made"),
        ({"class_path": 1}, "expected class_path"),
        ({}, "expected class_path"),
        ({"class_path": "collections.OrderedDict"}, "is not a TokenWeighting"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        from_spec(spec)


def test_nothing_is_imported_for_a_weighting_of_a_file(tmp_path, monkeypatch):
    """Not even to find out that its class is none: importing it would run it."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "canary_module.py").write_text(
        f"import pathlib\nfrom dft_lightning.weighting import DFT\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    )
    with pytest.raises(ValueError, match="`import canary_module` first"):
        from_spec({"class_path": "canary_module.DFT"})
    assert not (tmp_path / "ran").exists()
    importlib.import_module("canary_module")  # the advice
    assert from_spec({"class_path": "canary_module.DFT"}) == DFT()


def test_what_is_not_plain_is_refused():
    class Bare(TokenWeighting):
        def weights(self, tokens):
            return tokens.p

    with pytest.raises(ValueError, match="decorate it"):
        to_spec(Bare())
    with pytest.raises(ValueError, match="expected numbers"):
        to_spec(Wrapped(object()))


@dataclass(frozen=True)
class Fields(TokenWeighting):
    """One of each kind."""

    needed: object
    number: float = 1.0
    made: tuple[int, ...] = field(default_factory=tuple)
    found: int = field(default=3, init=False)

    def weights(self, tokens):
        return tokens.p


@pytest.mark.parametrize("value", [None, True, False, 0, 3, 0.5, "text", (1, "a", None), (), DFT(0.1), (DFT(), 2.0)])
def test_a_field_of_any_plain_kind_survives(value):
    made = from_spec(to_spec(Fields(value)))
    assert made == Fields(value)
    assert type(made.needed) is type(value)


class Bare(TokenWeighting):
    def weights(self, tokens):
        return tokens.p


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        (DFT(), "DFT"),
        (DFT(0.1), "DFT(floor=0.1)"),
        (Thresholded(0.3), "Thresholded(threshold=0.3)"),
        (Thresholded(0.3, on="logp"), "Thresholded(threshold=0.3, on='logp')"),
        (Mixed(DFT(0.1), share=0.5), "Mixed(of=DFT(floor=0.1), other=Uniform, share=0.5)"),
        (Fields(1), "Fields(needed=1)"),
        (Fields(None, made=(2,)), "Fields(needed=None, made=(2,))"),
        (Bare(), "Bare"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_label_has_what_is_not_at_its_default(weighting, expected):
    assert label(weighting) == expected
