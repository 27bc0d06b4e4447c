r"""School-maths practice problems, made here: small enough for a 135M model to learn in minutes on a CPU.

Each problem can be asked in several ways and solved along several paths, because data with many valid reasoning
paths is what Dynamic Fine-Tuning (arXiv 2508.05629) is for. Rows have the columns of NuminaMath-CoT.

To add a kind of problem, add a `Family` to `FAMILIES`; nothing else has to change.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product, zip_longest
from typing import Any, Literal, TypeAlias

from dft_lightning.errors import UserError

Split: TypeAlias = Literal["train", "held_out"]


@dataclass(frozen=True)
class Family:
    r"""One kind of problem.

    `asked`, `problems` and `solutions` are `str.format` templates over the names in `given`, `derive` and `CAST`. Every
    solution must fit every problem; in it, `$…$` is mathematics only, and the last equation gives the answer.
    """

    name: str
    """Ends the row's `source`."""
    asked: str
    """What the answer is, as in "So … is 24."."""
    given: Sequence[Mapping[str, int]]
    """The numbers of every problem there is. Each way to ask must show them."""
    derive: Callable[..., Mapping[str, Any]]
    """From the given numbers: `answer`, and what the solutions need on the way."""
    problems: tuple[str, ...]
    """Ways to ask."""
    solutions: tuple[str, ...]
    """Paths to the answer, without the last sentence."""


def practice_problems(count: int, *, seed: int = 0, split: Split = "train") -> list[dict[str, Any]]:
    r"""`count` different practice problems, the families taking turns, as rows like those of NuminaMath-CoT.

    A row has `source`, `problem`, `solution` (it ends in `$\boxed{N}$.`, N an integer) and `messages`. The same
    arguments give the same rows everywhere, and a smaller `count` gives their beginning. Whatever the seeds, numbers
    that are in one split of a family are not in the other, in any order and wording.
    """
    decks = [_deck(family, split) for family in FAMILIES]
    available = sum(map(len, decks))
    if not 0 <= count <= available:
        raise UserError(f"count={count}: there are {available} problems in split={split!r} (train or held_out)")
    hands = [_rows(family, deck, f"{split} {seed}") for family, deck in zip(FAMILIES, decks, strict=True)]
    return list(islice((row for turn in zip_longest(*hands) for row in turn if row), count))


Card: TypeAlias = tuple[Mapping[str, int], str]  # given numbers, problem template


def _deck(family: Family, split: Split) -> list[Card]:
    given = [numbers for numbers in family.given if _split_of(family.name, numbers) == split]
    return list(product(given, family.problems))


def _split_of(name: str, given: Mapping[str, int]) -> Split:
    # Sorted, so that 4 pens at $6 do not give away 6 pens at $4; hashed, so that no seed can move a problem over.
    digest = hashlib.sha256(f"{name} {sorted(given.values())}".encode()).digest()
    return "held_out" if digest[0] % 5 == 0 else "train"


def _rows(family: Family, deck: list[Card], seed: str) -> Iterator[dict[str, Any]]:
    # A generator of random numbers for each family, so that adding a family leaves the rows of the others alone.
    rng = random.Random(f"{family.name} {seed}")
    rng.shuffle(deck)
    return (_row(family, given, problem, rng) for given, problem in deck)


def _row(family: Family, given: Mapping[str, int], problem: str, rng: random.Random) -> dict[str, Any]:
    fields = {**given, **family.derive(**given), **{role: rng.choice(actors) for role, actors in CAST.items()}}
    fields["asked"] = family.asked.format(**fields)
    problem = problem.format(**fields)
    solution = f"{rng.choice(family.solutions)} {rng.choice(ENDINGS)}".format(**fields)
    messages = [{"role": "user", "content": problem}, {"role": "assistant", "content": solution}]
    return {"source": f"practice/{family.name}", "problem": problem, "solution": solution, "messages": messages}


ENDINGS = (
    r"The answer is $\boxed{{{answer}}}$.",
    r"So {asked} is $\boxed{{{answer}}}$.",
    r"Therefore, {asked} is $\boxed{{{answer}}}$.",
    r"Hence, the answer is $\boxed{{{answer}}}$.",
    r"This means that {asked} is $\boxed{{{answer}}}$.",
)

# Names take "'s"; things take "a" before them and "s" behind them.
CAST = {
    "name": ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Julia", "Leo", "Maria", "Noah"),
    "friend": ("Alice", "Bruno", "Clara", "Daniel", "Eva", "Frank", "Hannah", "Jack", "Kim", "Oliver", "Paula", "Tom"),
    "item": ("pen", "book", "sticker", "marble", "ball", "stamp", "card", "ribbon", "candle", "balloon", "pencil"),
    "unit": ("centimeter", "meter", "yard"),
    "way": ("kilometer", "mile"),
    "place": ("garden", "room", "field", "floor", "terrace", "lawn"),
}

FAMILIES = (
    Family(
        name="collecting",
        asked="the total number of {item}s",
        given=[{"have": have, "more": more} for have in range(11, 60) if have % 10 for more in range(2, 10)],
        derive=lambda have, more: {
            "answer": have + more,
            "tens": have - have % 10,
            "ones": have % 10,
            "sum": have % 10 + more,
        },
        problems=(
            "{name} has {have} {item}s and gets {more} more. How many {item}s does {name} have now?",
            "There are {have} {item}s in a box. {name} adds {more} more. How many {item}s are in the box now?",
            "{name} bought {have} {item}s last week and {more} {item}s today. How many {item}s is that in total?",
            "One bag holds {have} {item}s, another bag holds {more}. How many {item}s do both bags hold together?",
        ),
        solutions=(
            "To find {asked}, we add {more} to {have}: ${have} + {more} = {answer}$.",
            "There are {have} {item}s and {more} more {item}s, so we add: ${have} + {more} = {answer}$.",
            "First, we add the ones: ${ones} + {more} = {sum}$. Then, we add the tens: ${tens} + {sum} = {answer}$.",
        ),
    ),
    Family(
        name="shopping",
        asked="the total cost in dollars",
        given=[{"price": price, "number": number} for price, number in product(range(2, 11), range(3, 10))],
        derive=lambda price, number: {"answer": price * number, "fewer": number - 1, "part": price * (number - 1)},
        problems=(
            "{name} buys {number} {item}s for ${price} each. How many dollars does {name} pay?",
            "One {item} costs ${price}. How many dollars do {number} {item}s cost?",
            "At the market, a {item} costs ${price}. {name} takes {number} of them. What is the cost in dollars?",
        ),
        solutions=(
            r"To find {asked}, we multiply the number of {item}s by the price: ${number} \times {price} = {answer}$.",
            r"Each {item} costs {price} dollars, so {number} {item}s cost ${number} \times {price} = {answer}$.",
            r"First, {fewer} {item}s cost ${fewer} \times {price} = {part}$. One more: ${part} + {price} = {answer}$.",
        ),
    ),
    Family(
        name="change",
        asked="the amount left in dollars",
        given=[{"money": money, "price": price} for money, price in product(range(11, 31), range(2, 10))],
        derive=lambda money, price: {"answer": money - price},
        problems=(
            "{name} has ${money} and buys a {item} for ${price}. How many dollars are left?",
            "{name} pays for a {item} with ${money}. The {item} costs ${price}. What is the change in dollars?",
            "A {item} costs ${price}. {name} gives ${money}. How many dollars does {name} get back?",
            "From a gift of ${money}, {name} spends ${price} on a {item}. How many dollars remain?",
        ),
        solutions=(
            "To find {asked}, we subtract the price of the {item}: ${money} - {price} = {answer}$.",
            "The {item} costs {price} dollars, so we subtract {price} from {money}: ${money} - {price} = {answer}$.",
            "Of the {money} dollars, {price} dollars are spent, so we subtract: ${money} - {price} = {answer}$.",
        ),
    ),
    Family(
        name="area",
        asked="the area in square {unit}s",
        given=[{"length": a, "width": b} for a, b in product(range(3, 13), range(2, 10)) if a != b],
        derive=lambda length, width: {"answer": length * width},
        problems=(
            "A rectangle is {length} {unit}s long and {width} {unit}s wide. What is its area in square {unit}s?",
            "The sides of a rectangle are {length} {unit}s and {width} {unit}s. Find its area in square {unit}s.",
            "A rectangular {place} measures {length} {unit}s by {width} {unit}s. How many square {unit}s is its area?",
        ),
        solutions=(
            r"To find {asked}, we multiply the length by the width: ${length} \times {width} = {answer}$.",
            r"The area of a rectangle is its length times its width, so it is ${length} \times {width} = {answer}$.",
            r"There are {width} rows of {length} unit squares, so we multiply: ${width} \times {length} = {answer}$.",
        ),
    ),
    Family(
        name="perimeter",
        asked="the perimeter in {unit}s",
        given=[{"length": a, "width": b} for a, b in product(range(3, 16), range(2, 10)) if a != b],
        derive=lambda length, width: {"answer": 2 * (length + width), "half": length + width},
        problems=(
            "A rectangle is {length} {unit}s long and {width} {unit}s wide. What is its perimeter in {unit}s?",
            "The sides of a rectangle are {length} {unit}s and {width} {unit}s. Find its perimeter in {unit}s.",
            "A rectangular {place} measures {length} {unit}s by {width} {unit}s. How many {unit}s is it all around?",
        ),
        solutions=(
            "To find {asked}, we add all four sides: ${length} + {width} + {length} + {width} = {answer}$.",
            r"The length plus the width is ${length} + {width} = {half}$. Twice that is $2 \times {half} = {answer}$.",
            "The two halves of the perimeter are ${length} + {width} = {half}$ each: ${half} + {half} = {answer}$.",
        ),
    ),
    Family(
        name="sharing",
        asked="the number of {item}s in each share",
        given=[{"total": a * b, "shares": b} for a, b in product(range(2, 11), range(2, 10))],
        derive=lambda total, shares: {"answer": total // shares},
        problems=(
            "{name} shares {total} {item}s equally among {shares} friends. How many {item}s does each friend get?",
            "{name} packs {total} {item}s equally into {shares} bags. How many {item}s are in each bag?",
            "{name} lays {total} {item}s in {shares} equal rows. How many {item}s are in each row?",
        ),
        solutions=(
            r"To find {asked}, we divide {total} by {shares}: ${total} \div {shares} = {answer}$.",
            r"The {total} {item}s make {shares} equal shares, so we divide: ${total} \div {shares} = {answer}$.",
            r"We know that ${shares} \times {answer} = {total}$, so each share is ${total} \div {shares} = {answer}$.",
        ),
    ),
    Family(
        name="missing_number",
        asked="the missing number",
        given=[{"known": known, "total": known + gap} for known, gap in product(range(3, 31), range(2, 10))],
        derive=lambda known, total: {"answer": total - known},
        problems=(
            "Which number must be added to {known} to get {total}?",
            "Solve for $x$: $x + {known} = {total}$.",
            "{name} adds {known} to a secret number and gets {total}. What is the secret number?",
            "Which number is missing: {known} + __ = {total}?",
        ),
        solutions=(
            "To find {asked}, we subtract {known} from {total}: ${total} - {known} = {answer}$.",
            "Let $x + {known} = {total}$. We subtract {known} from both sides: $x = {total} - {known} = {answer}$.",
            "The missing number is the difference between {total} and {known}: ${total} - {known} = {answer}$.",
        ),
    ),
    Family(
        name="percent",
        asked="{percent}% of {whole}",
        given=[{"percent": p, "whole": 100 // p * part} for p, part in product((10, 20, 25, 50), range(2, 16))],
        derive=lambda percent, whole: {"answer": whole * percent // 100, "parts": 100 // percent},
        problems=(
            "What is {percent}% of {whole}?",
            "There are {whole} {item}s on a table, and {percent}% of them are red. How many {item}s are red?",
            "{name} makes {whole} {item}s and sells {percent}% of them. How many {item}s are sold?",
            "Of the {whole} {item}s in a box, {percent}% belong to {name}. How many {item}s does {name} own?",
        ),
        solutions=(
            r"To find {asked}, we divide {whole} by {parts}: ${whole} \div {parts} = {answer}$.",
            r"Since {percent}% is one part out of {parts}, we divide by {parts}: ${whole} \div {parts} = {answer}$.",
            r"We write {percent}% as 0.{percent} and multiply it by {whole}: $0.{percent} \times {whole} = {answer}$.",
        ),
    ),
    Family(
        name="distance",
        asked="the distance in {way}s",
        given=[{"speed": a, "hours": b} for a, b in product(range(3, 13), range(3, 10))],
        derive=lambda speed, hours: {"answer": speed * hours, "fewer": hours - 1, "part": speed * (hours - 1)},
        problems=(
            "{name} cycles at {speed} {way}s per hour for {hours} hours. How many {way}s does {name} cycle?",
            "A boat sails {speed} {way}s every hour. How many {way}s does it sail in {hours} hours?",
            "A tractor drives for {hours} hours at {speed} {way}s per hour. How far does it get in {way}s?",
            "A balloon drifts for {hours} hours, {speed} {way}s in each hour. How many {way}s does it drift?",
        ),
        solutions=(
            r"To find {asked}, we multiply the speed by the time: ${speed} \times {hours} = {answer}$.",
            r"Each hour adds {speed} {way}s, so {hours} hours make ${hours} \times {speed} = {answer}$ {way}s.",
            r"First, {fewer} hours make ${fewer} \times {speed} = {part}$. One more: ${part} + {speed} = {answer}$.",
        ),
    ),
    Family(
        name="ages",
        asked="{name}'s age",
        given=[{"age": age, "gap": gap} for age, gap in product(range(4, 31), range(2, 10))],
        derive=lambda age, gap: {"answer": age + gap},
        problems=(
            "{friend} is {age} years old. {name} is {gap} years older. How old is {name}?",
            "{name} is {gap} years older than {friend}, who is {age}. What is {name}'s age?",
            "How old is {name}, if {friend} is {age} years old and {name} is {gap} years older?",
        ),
        solutions=(
            "To find {asked}, we add {gap} to {friend}'s age: ${age} + {gap} = {answer}$.",
            "{friend} is {age} and {name} is {gap} years older, so we add: ${age} + {gap} = {answer}$.",
            "When {friend} was born, {name} was {gap}. After {age} years, {name} is ${gap} + {age} = {answer}$.",
        ),
    ),
    Family(
        name="sequence",
        asked="the next number",
        given=[{"a": a, "step": step} for a, step in product(range(2, 26), range(2, 10))],
        derive=lambda a, step: {"b": a + step, "c": a + 2 * step, "d": a + 3 * step, "answer": a + 4 * step},
        problems=(
            "Which number comes next: {a}, {b}, {c}, {d}, ...?",
            "A sequence grows in equal steps: {a}, {b}, {c}, {d}. What is the next number?",
            "{name} writes down {a}, {b}, {c}, {d} and goes on in the same way. What is the next number?",
        ),
        solutions=(
            "To find {asked}, we add the step ${d} - {c} = {step}$ to the last number: ${d} + {step} = {answer}$.",
            "The difference between the numbers is ${b} - {a} = {step}$, so we add {step}: ${d} + {step} = {answer}$.",
            "The numbers go up by {step}, since ${a} + {step} = {b}$. After {d} comes ${d} + {step} = {answer}$.",
        ),
    ),
)
