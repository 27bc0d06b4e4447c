"""The verdict tells the three kinds of data apart, by synthetic statistics."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dft_lightning.insight.sample import Sample, Vocabulary
from dft_lightning.insight.stop import stop_of
from dft_lightning.insight.verdict import EXCESS, OPEN, SHORT, SYMBOLS, UNEXPECTED, Signs, judge, signs_of
from dft_lightning.token_classes import CLASSES
from dft_lightning.weighting import TokenStats

MATHS = Signs(answer=180, symbols=0.35, unexpected=0.05, open=0.3, nll=0.9, entropy=0.8)
ANSWERS = Signs(answer=3, symbols=0.7, unexpected=0.4, open=0.3, nll=4.0, entropy=2.0)
CHAT = Signs(answer=60, symbols=0.01, unexpected=0.08, open=0.5, nll=2.0, entropy=2.1)


def test_three_kinds_of_data_get_three_verdicts():
    verdicts = [judge(signs) for signs in (MATHS, ANSWERS, CHAT)]
    assert [one.kind for one in verdicts] == ["worked solutions", "short answers", "open text"]
    assert [one.leaning for one in verdicts] == ["helps", "hurts", "unclear"]
    assert all("A heuristic" in one.limits for one in verdicts)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"unexpected": UNEXPECTED + 0.01}, "p < 0.01"),
        ({"open": OPEN - 0.01}, "0.1 to 0.9"),
        ({"nll": MATHS.entropy + EXCESS + 0.01}, "surprise"),
    ],
)
def test_solutions_that_the_model_does_not_expect_are_no_clear_case(change, named):
    verdict = judge(replace(MATHS, **change))
    assert (verdict.kind, verdict.leaning) == ("worked solutions", "unclear")
    assert named in verdict.said
    assert "floor" in verdict.said


def test_open_text_that_the_model_does_not_expect_is_hurt():
    assert judge(replace(CHAT, unexpected=UNEXPECTED + 0.01)).leaning == "hurts"


def test_the_lines_between_the_kinds():
    assert judge(replace(MATHS, answer=SHORT)).kind == "short answers"
    assert judge(replace(MATHS, answer=SHORT + 1)).kind == "worked solutions"
    assert judge(replace(MATHS, symbols=SYMBOLS)).kind == "worked solutions"
    assert judge(replace(MATHS, symbols=SYMBOLS - 0.001)).kind == "open text"


def test_every_number_that_counts_is_shown_as_evidence():
    shown = {one.what: (one.value, one.speaks) for one in judge(ANSWERS).evidence}
    assert shown["tokens of a turn, median"] == ("3", "against")
    assert shown["tokens with p < 0.01"] == ("40.0%", "against")
    assert shown["surprise beyond the model's own entropy"] == ("+2.00 nats", "against")
    assert shown["tokens with p from 0.1 to 0.9"] == ("30.0%", "for")
    assert shown["digits, operators, LaTeX"] == ("70.0%", "neither")  # short answers are no worked solutions


def sample(p, classes, turns, stop=None):
    """Tokens with these probabilities, a sequence each."""
    count = len(p)
    tokens = TokenStats(
        logp=torch.tensor(p, dtype=torch.float64).log(),
        target=torch.zeros(count, dtype=torch.long),
        sequence=torch.arange(count),
        position=torch.zeros(count, dtype=torch.long),
        entropy=torch.full((count,), 0.5).double(),
        stop=torch.tensor(stop or [False] * count),
    )
    numbers = torch.tensor([CLASSES.index(name) for name in classes])
    rows = SimpleNamespace()
    return Sample(tokens, torch.ones(count).double(), numbers, torch.zeros(count, dtype=torch.long), [""], turns, rows)


def test_signs_are_counted_from_the_tokens():
    classes = ["digit", "operator", "LaTeX command", "other word", "punctuation"]
    signs = signs_of(sample([0.005, 0.05, 0.1, 0.899, 0.9], classes, [4, 9, 200]))
    assert (signs.answer, signs.symbols, signs.unexpected) == pytest.approx((9, 0.6, 0.2))
    assert signs.open == pytest.approx(0.4)
    expected = -torch.tensor([0.005, 0.05, 0.1, 0.899, 0.9]).double().log().mean()
    assert signs.excess == pytest.approx(float(expected) - 0.5)


@pytest.mark.parametrize(
    ("p", "said"),
    [
        (0.2, None),
        (0.1001, None),
        (0.05, "slowly"),
        (0.0101, "slowly"),
        (0.005, "hardly learn"),
        (1e-9, "hardly learn"),
    ],
)
def test_a_stop_token_that_dft_cannot_learn_is_warned_of(p, said):
    found = stop_of(sample([0.9, p, p], ["digit"] * 3, [1, 1], stop=[False, True, True]))
    assert found.mean == pytest.approx(p)
    assert found.values == pytest.approx([p, p])
    assert (said in found.warning) if said else not found.warning
    if said:
        assert f"{1 / p:,.0f} times smaller" in found.warning


def test_a_special_token_in_the_middle_of_an_answer_is_no_stop():
    stop, word = CLASSES.index("stop"), CLASSES.index("other word")
    vocabulary = Vocabulary(["a", "<end>"], torch.tensor([word, stop]))
    ids = np.array([1, 0, 1, 0, 1, 0, 1])
    learnt = np.array([False, True, True, True, True, False, False])
    assert vocabulary.stops(ids, learnt).tolist() == [False, False, False, False, True, False, False]
