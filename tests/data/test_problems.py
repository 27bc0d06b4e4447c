r"""The practice problems, judged from their text: nothing here computes an answer the way the generator does."""

import math
import os
import re
import string
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import pairwise
from typing import Any

import pytest

from dft_lightning.data import problems
from dft_lightning.data.problems import CAST, ENDINGS, FAMILIES, Split, practice_problems
from dft_lightning.errors import UserError

SPLITS: tuple[Split, ...] = ("train", "held_out")

# What a reader makes of the numbers in a problem's text, in whatever order they stand there.
ORACLES = {
    "collecting": sum,
    "shopping": math.prod,
    "change": lambda numbers: 2 * max(numbers) - sum(numbers),
    "area": math.prod,
    "perimeter": lambda numbers: 2 * sum(numbers),
    "sharing": lambda numbers: max(numbers) / min(numbers),
    "missing_number": lambda numbers: max(numbers) - min(numbers),
    "percent": lambda numbers: math.prod(numbers) / 100,
    "distance": math.prod,
    "ages": sum,
    "sequence": lambda numbers: 2 * numbers[-1] - numbers[-2],
}


@cache
def available(split: Split) -> int:
    with pytest.raises(UserError) as refused:
        practice_problems(10**9, split=split)
    return int(re.search(r"there are (\d+) problems", str(refused.value))[1])


@cache
def everything(split: Split, seed: int = 0) -> list[dict[str, Any]]:
    return practice_problems(available(split), seed=seed, split=split)


@cache
def every_row() -> list[dict[str, Any]]:
    return [row for split in SPLITS for row in everything(split)]


def family(row: dict[str, Any]) -> str:
    return row["source"].removeprefix("practice/")


def numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def boxed(row: dict[str, Any]) -> int:
    return int(re.search(r"\$\\boxed\{(\d+)\}\$\.$", row["solution"])[1])


def formulas(row: dict[str, Any]) -> list[str]:
    """What stands between dollar signs, the box left out."""
    return [formula for formula in re.findall(r"\$([^$]*)\$", row["solution"]) if "boxed" not in formula]


def value(term: str, x: int) -> float:
    term = term.replace(r"\times", "*").replace(r"\div", "/")
    assert re.fullmatch(r"[\d.+\-*/ x]+", term), term
    return eval(term, {"__builtins__": {}}, {"x": x})


def matcher(template: str) -> re.Pattern[str]:
    parts = string.Formatter().parse(template)
    return re.compile("".join(re.escape(text) + (".+?" if field else "") for text, field, _, _ in parts))


def skeleton(text: str) -> str:
    words = sorted((word for actors in CAST.values() for word in actors), key=len, reverse=True)
    return re.sub(r"\d+(\.\d+)?", "N", re.sub(rf"\b({'|'.join(words)})(s?)\b", r"W\2", text))


def test_a_row_has_the_columns_of_numina_math() -> None:
    for row in every_row():
        assert list(row) == ["source", "problem", "solution", "messages"]
        assert row["source"].startswith("practice/")
        assert row["messages"] == [
            {"role": "user", "content": row["problem"]},
            {"role": "assistant", "content": row["solution"]},
        ]


# The first turn of the families, written out and worked out by hand; it also fixes the rows of seed 0 for good.
GOLDEN = r"""
collecting
Leo bought 11 pens last week and 8 pens today. How many pens is that in total?
There are 11 pens and 8 more pens, so we add: $11 + 8 = 19$. The answer is $\boxed{19}$.

shopping
David buys 9 books for $4 each. How many dollars does David pay?
First, 8 books cost $8 \times 4 = 32$. One more: $32 + 4 = 36$. Therefore, the total cost in dollars is $\boxed{36}$.

change
Maria pays for a marble with $16. The marble costs $6. What is the change in dollars?
The marble costs 6 dollars, so we subtract 6 from 16: $16 - 6 = 10$. Hence, the answer is $\boxed{10}$.

area
The sides of a rectangle are 4 centimeters and 8 centimeters. Find its area in square centimeters.
There are 8 rows of 4 unit squares, so we multiply: $8 \times 4 = 32$. This means that the area in square centimeters is $\boxed{32}$.

perimeter
A rectangle is 3 yards long and 8 yards wide. What is its perimeter in yards?
To find the perimeter in yards, we add all four sides: $3 + 8 + 3 + 8 = 22$. This means that the perimeter in yards is $\boxed{22}$.

sharing
Hugo lays 42 candles in 6 equal rows. How many candles are in each row?
The 42 candles make 6 equal shares, so we divide: $42 \div 6 = 7$. This means that the number of candles in each share is $\boxed{7}$.

missing_number
Which number must be added to 30 to get 32?
Let $x + 30 = 32$. We subtract 30 from both sides: $x = 32 - 30 = 2$. So the missing number is $\boxed{2}$.

percent
Carla makes 150 pens and sells 10% of them. How many pens are sold?
To find 10% of 150, we divide 150 by 10: $150 \div 10 = 15$. Therefore, 10% of 150 is $\boxed{15}$.

distance
A boat sails 7 miles every hour. How many miles does it sail in 9 hours?
First, 8 hours make $8 \times 7 = 56$. One more: $56 + 7 = 63$. Hence, the answer is $\boxed{63}$.

ages
Emma is 4 years older than Kim, who is 6. What is Emma's age?
To find Emma's age, we add 4 to Kim's age: $6 + 4 = 10$. So Emma's age is $\boxed{10}$.

sequence
Which number comes next: 7, 14, 21, 28, ...?
The difference between the numbers is $14 - 7 = 7$, so we add 7: $28 + 7 = 35$. The answer is $\boxed{35}$.
"""  # noqa: E501


def test_golden_rows() -> None:
    golden = [tuple(row.splitlines()) for row in GOLDEN.strip().split("\n\n")]
    dealt = practice_problems(len(FAMILIES))
    assert [(family(row), row["problem"], row["solution"]) for row in dealt] == golden


def test_the_answer_is_what_a_reader_makes_of_the_problem() -> None:
    assert set(ORACLES) == {family(row) for row in every_row()}
    for row in every_row():
        assert boxed(row) == ORACLES[family(row)](numbers(row["problem"])), row


def test_every_equation_holds_and_the_last_gives_the_answer() -> None:
    for row in every_row():
        equations = [formula.split(" = ") for formula in formulas(row)]
        assert equations, row
        for sides in equations:
            assert len(sides) > 1, row
            values = [value(side, x=boxed(row)) for side in sides]
            assert values == pytest.approx([values[0]] * len(values)), row
        assert equations[-1][-1] == str(boxed(row)), row


def test_the_same_arguments_give_the_same_rows() -> None:
    assert practice_problems(300, seed=3, split="held_out") == practice_problems(300, seed=3, split="held_out")


@pytest.mark.slow
def test_every_process_gives_the_same_rows() -> None:
    code = (
        "from dft_lightning.data.problems import practice_problems as p; print(p(200, seed=5), p(50, split='held_out'))"
    )
    here = f"{practice_problems(200, seed=5)} {practice_problems(50, split='held_out')}\n"
    for hash_seed in ("0", "1"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == here


@pytest.mark.parametrize("split", SPLITS)
def test_a_smaller_count_gives_the_beginning(split: Split) -> None:
    for count in (0, 1, 10, 11, 12, 500, available(split) - 1):
        assert practice_problems(count, split=split) == everything(split)[:count]


@pytest.mark.parametrize("split", SPLITS)
def test_seeds_give_other_rows_of_the_same_problems(split: Split) -> None:
    asked = [{(family(row), *sorted(numbers(row["problem"]))) for row in everything(split, seed)} for seed in (0, 1)]
    assert asked[0] == asked[1]
    beginnings = [[row["problem"] for row in practice_problems(100, seed=seed, split=split)] for seed in (0, 1)]
    assert len({*beginnings[0]} & {*beginnings[1]}) < 10


@pytest.mark.parametrize(("seeds", "counts"), [((0, 0), (960, 200)), ((0, 7), (5000, 1000)), ((2, 1), (None, None))])
def test_train_and_held_out_share_no_problem(seeds: tuple[int, int], counts: tuple[int | None, int | None]) -> None:
    def key(row: dict[str, Any]) -> tuple[str, list[int]]:
        return family(row), *sorted(numbers(row["problem"]))

    train, held_out = (
        everything(split, seed)[:count] for split, seed, count in zip(SPLITS, seeds, counts, strict=True)
    )
    assert {row["problem"] for row in train}.isdisjoint(row["problem"] for row in held_out)
    assert {key(row) for row in train}.isdisjoint(key(row) for row in held_out)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_problem_comes_twice(seed: int) -> None:
    texts = Counter(row["problem"] for split in SPLITS for row in everything(split, seed))
    assert texts.most_common(1)[0][1] == 1


def test_there_are_thousands_and_a_fifth_is_held_out() -> None:
    train, held_out = map(available, SPLITS)
    assert train > 4000
    assert 0.15 < held_out / (train + held_out) < 0.25


@pytest.mark.parametrize("count", [-1, 10**9])
def test_a_count_beyond_what_there_is_is_refused(count: int) -> None:
    with pytest.raises(UserError, match=rf"count={count}: there are {available('train')} problems in split='train'"):
        practice_problems(count)
    with pytest.raises(UserError):
        practice_problems(available("train") + 1)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(UserError, match=r"there are 0 problems in split='test' \(train or held_out\)"):
        practice_problems(1, split="test")  # type: ignore[arg-type]


@pytest.mark.parametrize(("split", "count"), [("train", 960), ("held_out", 48), ("held_out", 300)])
def test_the_families_take_turns(split: Split, count: int) -> None:
    shares = Counter(family(row) for row in practice_problems(count, seed=4, split=split))
    assert len(shares) == len(FAMILIES) >= 8
    assert max(shares.values()) - min(shares.values()) <= 1


def test_adding_a_family_leaves_the_rows_of_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    added = FAMILIES[4].name
    before = [row for row in practice_problems(22 * len(FAMILIES)) if family(row) != added]
    monkeypatch.setattr(problems, "FAMILIES", tuple(kind for kind in FAMILIES if kind.name != added))
    assert practice_problems(len(before)) == before


@pytest.mark.parametrize("kind", FAMILIES, ids=lambda kind: kind.name)
def test_every_way_to_ask_and_to_solve_is_reached(kind: problems.Family) -> None:
    rows = [row for row in everything("train") if family(row) == kind.name]
    assert min(len(kind.problems), len(kind.solutions)) >= 3
    for way in kind.problems:
        assert any(matcher(way).fullmatch(row["problem"]) for row in rows), way
    for path in kind.solutions:
        for ending in ENDINGS:
            assert any(matcher(f"{path} {ending}").fullmatch(row["solution"]) for row in rows), (path, ending)


def test_the_solutions_vary() -> None:
    skeletons = {(family(row), skeleton(row["solution"])) for row in everything("train")}
    assert min(Counter(name for name, _ in skeletons).values()) >= 15  # 3 paths × 5 endings
    assert len({row["solution"] for row in practice_problems(960)}) > 900


def test_problems_are_small() -> None:
    for row in every_row():
        assert 15 <= len(row["problem"]) <= 120, row
        assert 50 <= len(row["solution"]) <= 180, row
        assert 2 <= boxed(row) <= 200, row
        assert max(numbers(row["problem"])) <= 210, row


def test_the_language_is_sound() -> None:
    for row in every_row():
        for text in (row["problem"], row["solution"]):
            assert re.match(r"[A-Z\d]", text), text
            assert re.search(r"[.?]$", text), text
            assert not re.search(r"  |[{}]", text.replace(rf"\boxed{{{boxed(row)}}}", "")), text
            assert not re.search(r"\b1 [a-z]+s\b", text), text
            assert not re.search(r"\b[Aa] ([aeiou]|8|11|18)", text), text
        assert row["solution"].count("$") % 2 == 0, row


def test_a_problem_shows_all_its_numbers() -> None:
    # Otherwise two problems could read the same, and the splits would share it.
    for kind in FAMILIES:
        for way in kind.problems:
            fields = {field for _, field, _, _ in string.Formatter().parse(way)}
            shown = fields | ({"step"} if {"a", "b"} <= fields else set())
            assert shown >= set(kind.given[0]), way


def test_given_numbers_are_distinct() -> None:
    for kind in FAMILIES:
        assert all(a != b for a, b in pairwise(sorted(tuple(given.values()) for given in kind.given))), kind.name
