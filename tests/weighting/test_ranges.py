"""Each field of a weighting takes all values of its range, its ends as they are documented, and no other."""

import math
from dataclasses import fields
from functools import partial

import pytest

import dft_lightning.weighting as package
from dft_lightning.weighting import (
    ASFT,
    CADFT,
    DFT,
    EAFT,
    GEM,
    GIFT,
    LUFFY,
    PSFT,
    SRFT,
    TALR,
    Bounded,
    EntropyBonus,
    Exempt,
    Focal,
    ImportanceWeighted,
    InfoSFT,
    LabelSmoothing,
    MixCE,
    Mixed,
    Power,
    ProFit,
    Raised,
    Rho1,
    SentenceDFT,
    Thresholded,
    WarmUp,
)

TINY, HUGE = 5e-324, 1.7976931348623157e308
BELOW_1, ABOVE_1 = math.nextafter(1.0, 0.0), math.nextafter(1.0, 2.0)
#: Maker, field, the least and the largest value that it takes.
RANGES = [
    (DFT, "floor", 0.0, 1.0),
    (MixCE, "eta", 0.0, 1.0),
    (Power, "alpha", 0.0, HUGE),
    (Thresholded, "threshold", 0.0, 1.0),
    (ProFit, "threshold", 0.0, 1.0),
    (partial(ProFit, 0.5, "middle"), "upper", 0.5, 1.0),
    (partial(ProFit, keep="middle", upper=0.5), "threshold", 0.0, 0.5),
    (LUFFY, "gamma", TINY, HUGE),
    (Focal, "gamma", 0.0, HUGE),
    (TALR, "w_min", 0.0, 1.0),
    (InfoSFT, "p_bar", TINY, BELOW_1),
    (EAFT, "alpha", 0.0, HUGE),
    (EAFT, "divide_by", TINY, HUGE),
    (SRFT, "scale", TINY, HUGE),
    (PSFT, "clip", TINY, HUGE),
    (PSFT, "window", 1, 10**9),
    (Rho1, "percent", TINY, 100.0),
    (CADFT, "beta", 0.0, HUGE),
    (ASFT, "strength", 0.0, HUGE),
    (GEM, "beta", TINY, HUGE),
    (GIFT, "beta", 0.0, HUGE),
    (LabelSmoothing, "smoothing", 0.0, BELOW_1),
    (partial(EntropyBonus, DFT()), "strength", -HUGE, HUGE),
    (partial(Bounded, DFT()), "low", -HUGE, math.inf),  # an infinite one is refused by `prove`
    (partial(Bounded, DFT(), high=0.5), "low", -HUGE, 0.5),
    (partial(Bounded, DFT(), 0.5), "high", 0.5, math.inf),
    (partial(Raised, DFT()), "power", 0.0, HUGE),
    (partial(Raised, DFT()), "temperature", TINY, HUGE),
    (partial(Exempt, DFT()), "weight", 0.0, HUGE),
    (partial(Mixed, DFT()), "share", 0.0, 1.0),
    (partial(Mixed, DFT()), "final_share", 0.0, 1.0),
    (partial(Mixed, DFT()), "until", TINY, 1.0),
    (partial(WarmUp, DFT()), "share", 0.0, 1.0),
]
CHOICES = [
    (partial(Thresholded, 0.5), "on", ("p", "logp")),
    (partial(Thresholded, 0.5), "keep", ("top", "bottom")),
    (ProFit, "keep", ("higher", "lower", "middle")),
    (ImportanceWeighted, "level", ("sequence", "token")),
    (SentenceDFT, "mean", ("geometric", "product")),
    (ASFT, "direction", ("forward", "reverse")),
    (GEM, "h", ("linear", "logsigmoid")),
]


def name_of(make):
    return getattr(make, "func", make).__name__


@pytest.mark.parametrize(
    ("make", "field", "least", "most"), RANGES, ids=[f"{name_of(make)}.{field}" for make, field, *_ in RANGES]
)
def test_a_number_is_taken_up_to_the_ends_of_its_range(make, field, least, most):
    for value in (least, most):
        assert getattr(make(**{field: value}), field) == value
    beyond = [math.nextafter(least, -math.inf), math.nextafter(most, math.inf), math.nan]
    for value in beyond if isinstance(least, float) else [least - 1]:
        if value != most:
            with pytest.raises(ValueError, match=name_of(make)):
                make(**{field: value})


@pytest.mark.parametrize(
    ("make", "field", "choices"), CHOICES, ids=[f"{name_of(make)}.{field}" for make, field, _ in CHOICES]
)
def test_a_choice_is_one_of_those_that_are_named(make, field, choices):
    for value in choices:
        assert getattr(make(**{field: value}), field) == value
    for value in ("", "other", None):
        with pytest.raises(ValueError, match=f"{name_of(make)}.{field}"):
            make(**{field: value})


def test_the_clip_of_importance_weights():
    for clip in ((0.0, 0.0), (0.5, 0.5), (0.0, math.inf)):
        assert ImportanceWeighted(clip=clip).bounds == clip
    assert ImportanceWeighted().bounds == (0.0, 16.0)
    assert ImportanceWeighted(level="token").bounds == (0.2, 1.8)
    for clip in ((-TINY, 1.0), (1.0, BELOW_1), (math.nan, 1.0)):
        with pytest.raises(ValueError, match=r"ImportanceWeighted\.clip"):
            ImportanceWeighted(clip=clip)


@pytest.mark.parametrize(("ids", "stop"), [((), True), ((0,), False), ([3, 0], True)])
def test_exempt_ids_are_kept_as_a_tuple(ids, stop):
    made = Exempt(DFT(), stop=stop, token_ids=ids)
    assert made.token_ids == tuple(ids)
    assert hash(made) == hash(Exempt(DFT(), stop=stop, token_ids=tuple(ids)))
    assert made.needs == ({"stop"} if stop else set())


@pytest.mark.parametrize("wrong", [True, 1.0, "1", -1, None])
def test_exempt_ids_are_whole_numbers(wrong):
    with pytest.raises(ValueError, match=r"Exempt.token_ids has \["):
        Exempt(DFT(), token_ids=(0, wrong))


def test_all_numbers_of_published_weightings_are_here():
    """A field that is added gets a row above."""
    known = {f"{name_of(make)}.{field}" for make, field, *_ in [*RANGES, *CHOICES]}
    named = {
        name: cls for name, cls in vars(package).items() if getattr(cls, "source", None) and name in package.__all__
    }
    numbers = {
        f"{name}.{each.name}"
        for name, cls in named.items()
        for each in fields(cls)
        if each.type in ("float", "int", float, int)
    }
    assert numbers - known <= {"ImportanceWeighted.temperature", "ProFit.upper", "CHORD.mu"}
