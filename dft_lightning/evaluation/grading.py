r"""Is this answer the right one: the small exact-match grader.

An answer is read by regular expressions and exact fractions and never evaluated, so nothing that a model writes can
run. Every step is linear in the answer's length; numerals beyond `LONGEST_NUMBER` characters or `LARGEST_EXPONENT` are
compared as text only.

Two answers are the same when their texts agree after this normalisation (`normalised`):

- `$`, `\$`, spacing commands (`\,` `\;` `\:` `\!` `~`), `\left`, `\right` and white space are dropped;
- `\text{…}`, `\mathrm{…}` and the like are replaced by what they contain;
- `\dfrac`, `\tfrac`, `\cfrac` are `\frac`, and `\frac12` is `\frac{1}{2}`;
- separators of thousands are dropped where the whole answer is one number (`1,234` or `1{,}234`);
- leading zeros, trailing zeros of a decimal, a trailing `.` and a trailing `%` are dropped (`50\%` is `50`, not `0.5`);

or when both are plain numbers of the same value: `5`, `-0.25`, `3/4`, `\frac{3}{4}`, `4.5e33`, `4.5 \times 10^{33}`.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import nan

RELATIVE_TOLERANCE = Fraction(1, 10_000)  # the one of the Qwen2.5-Math grader, with which the paper's numbers were made
LONGEST_NUMBER = 1_000  # characters; int() of a string is quadratic, and Python refuses 4,300 digits
LARGEST_EXPONENT = 1_000  # 10**999999999 would fill the memory

_BOX = re.compile(r"(?P<open>\\boxed\s*\{)|\\boxed\s+(?P<bare>[^\s${}]+)|\\[{}]|(?P<brace>[{}])")
_NUMERAL = re.compile(
    r"(?:(?<![\w.)\]}])-)?"  # a minus sign after an operand is a subtraction: the last number of `10-5` is 5
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+|/[0-9]+)?|\.[0-9]+)"
)

_DROPPED = re.compile(r"\\?\$|\\[,;:! ]|~|\\(?:left|right)(?![A-Za-z])")
_FRACTION_COMMAND = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_NUMERATOR_DIGIT = re.compile(r"\\frac\s*([0-9])")
_DENOMINATOR_DIGIT = re.compile(r"(\\frac\{[^{}]*\})\s*([0-9])")
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")
_DIGITS = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+")

_RATIO = re.compile(r"([+-]?)(?:([0-9]+)/([0-9]+)|\\frac\{([+-]?[0-9]+)\}\{([+-]?[0-9]+)\})")
_DECIMAL = re.compile(
    r"(?P<mantissa>[+-]?[0-9]+(?:\.[0-9]+)?)"
    r"(?:(?:[eE]|(?:\\times|\\cdot|[×·*x])10\^)(?P<open>\{)?(?P<exponent>[+-]?[0-9]+)(?(open)\}))?"
)


@dataclass(frozen=True)
class _Number:
    value: Fraction
    rounded: bool
    """Written as a decimal or with an exponent, so that its last digit may be a rounded one."""


@dataclass(frozen=True)
class Accuracy:
    """How many of `total` outputs are right; `right` and `right_by_last_number` never count the same output."""

    right: int
    """The boxed answer is the right one."""

    boxed: int
    """There is a boxed answer."""

    right_by_last_number: int
    """Nothing is boxed, but the last number of the text is the right one."""

    total: int

    @property
    def strict(self) -> float:
        """Share that is right and boxed, as the benchmarks count."""
        return self.right / self.total if self.total else nan

    @property
    def lenient(self) -> float:
        """Share that is right, boxed or not: separates knowing the answer from knowing the format."""
        return (self.right + self.right_by_last_number) / self.total if self.total else nan


def exact_match(outputs: Sequence[str], golds: Sequence[str]) -> Accuracy:
    """Grade each output against the gold answer at the same place."""
    right = boxed = by_last_number = 0
    for output, gold in zip(outputs, golds, strict=True):
        if (answer := boxed_answer(output)) is not None:
            boxed += 1
            right += same_answer(answer, gold)
        elif (answer := last_number(output)) is not None:
            by_last_number += same_answer(answer, gold)
    return Accuracy(right, boxed, by_last_number, total=len(outputs))


def boxed_answer(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` (or `\boxed 5`) that is closed and not empty."""
    found_at, answer = -1, None
    open_braces: list[tuple[int, bool]] = []  # where the content starts, and whether `\boxed` opened it
    for token in _BOX.finditer(text):
        if token["open"] or token["brace"] == "{":
            open_braces.append((token.end(), token["open"] is not None))
        elif token["brace"] == "}" and open_braces:
            start, is_box = open_braces.pop()
            if is_box and start > found_at and (content := text[start : token.start()].strip()):
                found_at, answer = start, content
        elif token["bare"]:
            found_at, answer = token.start(), token["bare"].rstrip(".,;:")
    return answer


def last_number(text: str) -> str | None:
    """The last numeral of a text, as it is written there: `-7`, `1,234.5`, `3/4`, `1e5`."""
    numerals = deque(_NUMERAL.finditer(text), maxlen=1)
    return numerals[0][0] if numerals else None


def same_answer(given: str, gold: str) -> bool:
    """Whether `given` is the answer `gold`, by the rules at the top of this file.

    Numbers are equal exactly where `gold` is an integer or both are ratios of integers; where one of them is rounded
    (a decimal, an exponent), within a relative tolerance of 1e-4.
    """
    given, gold = normalised(given), normalised(gold)
    if given == gold:
        return given != ""
    value, target = _number(given), _number(gold)
    if value is None or target is None:
        return False
    is_integer = target.value.denominator == 1 and not target.rounded
    if is_integer or not (value.rounded or target.rounded):
        return value.value == target.value
    return abs(value.value - target.value) <= RELATIVE_TOLERANCE * abs(target.value)


def normalised(answer: str) -> str:
    """The answer without what does not change its meaning; the list is at the top of this file."""
    answer = _DROPPED.sub("", answer).replace("{,}", ",").replace("−", "-").replace(r"\%", "%")
    answer = _TEXT_COMMAND.sub(r"\1", _FRACTION_COMMAND.sub(r"\\frac", answer))
    answer = _DENOMINATOR_DIGIT.sub(r"\1{\2}", _NUMERATOR_DIGIT.sub(r"\\frac{\1}", answer))
    answer = answer.strip().rstrip("%.").rstrip()
    if _THOUSANDS.fullmatch(answer):
        answer = answer.replace(",", "")
    return _DIGITS.sub(_without_idle_zeros, "".join(answer.split()))


def _without_idle_zeros(digits: re.Match[str]) -> str:
    whole, _, decimals = digits[0].partition(".")
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    return f"{whole}.{decimals}" if decimals else whole


def _number(answer: str) -> _Number | None:
    """The value of a normalised answer, if it is a plain number of reasonable size."""
    if len(answer) > LONGEST_NUMBER:
        return None
    if ratio := _RATIO.fullmatch(answer):
        return _ratio(ratio)
    if decimal := _DECIMAL.fullmatch(answer):
        return _decimal(decimal)
    return None


def _ratio(match: re.Match[str]) -> _Number | None:
    numerator, denominator = int(match[2] or match[4]), int(match[3] or match[5])
    if denominator == 0:
        return None
    sign = -1 if match[1] == "-" else 1
    return _Number(Fraction(sign * numerator, denominator), rounded=False)


def _decimal(match: re.Match[str]) -> _Number | None:
    mantissa, exponent = match["mantissa"], int(match["exponent"] or 0)
    if abs(exponent) > LARGEST_EXPONENT:
        return None
    value = Fraction(mantissa) * Fraction(10) ** exponent
    return _Number(value, rounded="." in mantissa or match["exponent"] is not None)
