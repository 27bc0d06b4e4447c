import os
import re
import time
from math import isnan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dft_lightning.evaluation.grading import (
    LARGEST_EXPONENT,
    LONGEST_NUMBER,
    Accuracy,
    boxed_answer,
    exact_match,
    last_number,
    normalised,
    same_answer,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{ \{1, 2\} }", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed {5}", "5"),
        (r"thus \boxed 5.", "5"),
        (r"$\boxed 5$ apples", "5"),
        (r"\\boxed{5}", "5"),
        (r"{ \boxed{5} and } } \boxed{6}", "6"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{7} cut off at \boxed{8", "7"),
        (r"\boxed{7}. Put it within \boxed{}.", "7"),
        (r"\boxed{}", None),
        (r"\boxed{8", None),
        (r"\fbox{5} or boxed{5}", None),
        ("", None),
    ],
)
def test_the_last_closed_box_counts(text, answer):
    assert boxed_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 3 = 5.", "5"),
        ("10-5", "5"),
        ("x = -5.", "-5"),
        ("x=-5", "-5"),
        ("$1,234.50 in all", "1,234.50"),
        ("of 1, 2, 3", "3"),
        ("about .5", ".5"),
        ("it is 3/4 of it", "3/4"),
        ("1.5e-3 m", "1.5e-3"),
        ("5cm", "5"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_last_number_counts(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("42", "42"),
        ("$42$", "42"),
        (" 42. ", "42"),
        ("+42", "42"),
        ("042", "42"),
        ("42.00", "42"),
        (r"\$1{,}234.5", "1234.50"),
        ("1,234", "1234"),
        (r"1\,234", "1234"),
        ("−7", "-7"),
        ("-0", "0"),
        (r"50\%", "50"),
        ("50 %", "50"),
        (r"\text{yes}", "yes"),
        (r"\left( 0.50, \dfrac12 \right)", r"(.5, \frac{1}{2})"),
        (r"\tfrac{1}2", "1/2"),
        (r"\frac 3 4", "0.75"),
        (r"-\frac{3}{4}", r"\frac{-3}{4}"),
        (r"-\frac{-6}{8}", "3/4"),
        ("6/8", "3/4"),
        ("0.3333", "1/3"),
        ("3.1416", "3.14159"),
        ("100000.5", "100001.5"),
        (r"4.5 \times 10^{33}", "4.5e33"),
        (r"4.5\cdot 10^33", "4.5E+33"),
        ("4.4999e33", "4.5e33"),
        ("4" + "5" + "0" * 32, "4.5e33"),
        ("1.5e3", "1500"),
        (r"x^2 + 1", "x^2+1"),
    ],
)
def test_the_same_answer(answer, gold):
    assert same_answer(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("42", "43"),
        ("42", "-42"),
        ("", ""),
        ("$$", "."),
        ("", "0"),
        ("100000", "100001"),
        ("100000.5", "100001"),  # an integer is met exactly
        ("10001/10000", "1/1"),
        ("1/3", "333333/1000000"),  # two ratios are compared exactly
        ("0.333", "1/3"),
        ("3.14", "3.14159"),
        ("4.6e33", "4.5e33"),
        ("4.5e34", "4.5e33"),
        ("4.5e-33", "4.5e33"),
        (r"50\%", "0.5"),
        ("1/0", "0"),
        ("1/0", r"\frac{2}{0}"),
        ("(1,234)", "1234"),  # a pair is not a number
        ("1, 2", "12"),
        ("12", r"\frac{1}{2}"),
        ("2+2", "4"),  # nothing is worked out
        ("yes", "no"),
        ("nan", "0"),
        ("inf", "1e999"),
        (r"4.5 \times 10^{33", "4.5e33"),
    ],
)
def test_not_the_same_answer(answer, gold):
    assert not same_answer(answer, gold)


def test_the_tolerance_ends_where_it_says():
    assert same_answer("1.0001", "1.0000e0")
    assert not same_answer("1.000100005", "1.0000e0")


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_integers_are_the_same_only_when_equal(a, b):
    assert same_answer(f"{a:,}", str(b)) == (a == b)
    assert same_answer(f"{a:,}", str(a))


@given(st.text("0123456789.,{}$\\%/-^ efractxbo()", max_size=60))
def test_nothing_raises_and_every_answer_equals_itself(text):
    boxed_answer(text)
    last_number(text)
    assert same_answer(text, text) == (normalised(text) != "")


def test_a_hostile_answer_leaves_no_trace(tmp_path):
    trace = tmp_path / "trace"
    for attack in (
        f"__import__('os').system('touch {trace}')",
        f"open('{trace}', 'w')",
        rf"\write18{{touch {trace}}}",
        f"$(touch {trace})",
        f"`touch {trace}`",
    ):
        assert not same_answer(attack, "1")
        assert exact_match([rf"\boxed{{{attack}}}"], ["1"]).right == 0
    assert os.listdir(tmp_path) == []


HOSTILE = {
    "long numeral": "9" * 1_000_000,
    "zeros behind the point": "0." + "0" * 1_000_000 + "1",
    "open boxes": r"\boxed{" * 150_000,
    "box and spaces": r"\boxed" + " " * 1_000_000,
    "open braces": "{" * 1_000_000,
    "thousands": "1,234" * 200_000,
    "minus signs": "-" * 1_000_000,
    "points": ".1" * 500_000,
    "exponents": "1e" * 500_000,
    "open texts": r"\text{" * 150_000,
    "fractions": (r"\frac" + " " * 1_000) * 1_000,
    "numerators": (r"\frac{1}" + " " * 1_000) * 1_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_million_characters_are_graded_at_once(text):
    begun = time.perf_counter()
    boxed_answer(text)
    last_number(text)
    assert not same_answer(text, "1.5")
    # Linear work takes below a second; a quadratic step over 10⁶ characters takes minutes.
    assert time.perf_counter() - begun < 10


@pytest.mark.parametrize("answer", ["1e999999999", "1e-999999999", r"1 \times 10^{999999999}", "1e" + "9" * 100_000])
def test_a_huge_exponent_is_text(answer):
    begun = time.perf_counter()
    assert not same_answer(answer, "1.5")
    assert same_answer(answer, answer)
    assert time.perf_counter() - begun < 1


def test_the_limits_are_where_they_say():
    assert same_answer(f"10e{LARGEST_EXPONENT - 1}", f"1e{LARGEST_EXPONENT}")
    assert not same_answer(f"10e{LARGEST_EXPONENT}", f"1e{LARGEST_EXPONENT + 1}")
    assert same_answer("1" * (LONGEST_NUMBER - 2) + "/1", "1" * (LONGEST_NUMBER - 2))
    assert not same_answer("1" * (LONGEST_NUMBER - 1) + "/1", "1" * (LONGEST_NUMBER - 1))


def test_each_output_is_counted_once():
    outputs = [r"\boxed{5}", r"so 5 is \boxed{6}", "it is 5", "it is 6", "no idea", r"6, no: \boxed{5"]
    accuracy = exact_match(outputs, ["5"] * len(outputs))
    assert accuracy == Accuracy(right=1, boxed=2, right_by_last_number=2, total=6)
    assert accuracy.strict == 1 / 6
    assert accuracy.lenient == 3 / 6


def test_a_wrong_box_is_not_saved_by_the_last_number():
    assert exact_match([r"\boxed{6}, or rather 5"], ["5"]) == Accuracy(0, boxed=1, right_by_last_number=0, total=1)


def test_no_outputs_have_no_accuracy():
    assert isnan(exact_match([], []).strict)
    assert isnan(exact_match([], []).lenient)


def test_outputs_and_golds_belong_together():
    with pytest.raises(ValueError, match=re.escape("zip()")):
        exact_match(["5"], [])
