"""Whether data look like what DFT helps, or hurts, for this model: a heuristic, with its evidence and its limits.

Published and reported: DFT helps where a problem has many valid ways to its answer (worked maths and code; Wu et al.,
arXiv 2508.05629). It hurts where one answer of low entropy is right: short factual questions (Natural Questions in the
same paper, version 3: base 31.2, SFT 36.6, DFT 30.1), and by users' reports text recognition, the model's own identity,
literature, finance. Nothing more is known; where to draw the lines between is our own choice, by the paper's figure 2.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from dft_lightning.callbacks.token_probabilities import P_EDGES, histogram
from dft_lightning.insight.sample import Sample
from dft_lightning.token_classes import CLASSES

#: Per cent of tokens in each bin of p under the base model of arXiv 2508.05629, figure 2: where DFT has helped.
FIGURE_2 = (1.163, 0.764, 1.767, 5.078, 3.206, 2.730, 2.477, 2.564, 2.643, 2.991, 3.677, 5.405, 65.535)
#: Most tokens of a turn that is one short answer rather than a way to it.
SHORT = 16
#: Least share of digits, operators and LaTeX in worked solutions and code.
SYMBOLS = 0.10
#: Largest share of tokens with p < 0.01 that the model can be said to know the text: four times figure 2's 3.7 %.
UNEXPECTED = 0.15
#: Least share of tokens with p from 0.1 to 0.9, where DFT's choice among ways is made; figure 2 has 25.7 %.
OPEN = 0.10
#: Most nats a token by which the text surprises the model beyond its own uncertainty.
EXCESS = 1.0

LIMITS = (
    "A heuristic over a sample, before any training: it knows the kind of text and what this model makes of it, not "
    "what you will evaluate. The lines it draws are our choice around few published results (worked maths and code: "
    "DFT helped; Natural Questions: it hurt; users report harm on text recognition, identity, literature, finance). A "
    "short run with each weighting and your own evaluation decides."
)

Leaning = Literal["helps", "unclear", "hurts"]


@dataclass(frozen=True)
class Signs:
    """What the verdict goes by, as numbers.

    Args:
        answer: median of the supervised tokens of a turn.
        symbols: share of digits, operators and LaTeX commands.
        unexpected: share of tokens with p < 0.01.
        open: share of tokens with p from 0.1 to 0.9.
        nll: mean −log p, nats.
        entropy: mean entropy of the model's own distribution, nats.
    """

    answer: float
    symbols: float
    unexpected: float
    open: float
    nll: float
    entropy: float

    @property
    def excess(self) -> float:
        """Nats a token by which the text surprises the model more than what it would write itself."""
        return self.nll - self.entropy


@dataclass(frozen=True)
class Evidence:
    """One sign, the line it is held against, and what it speaks for."""

    what: str
    value: str
    line: str
    speaks: Literal["for", "against", "neither"]
    why: str


@dataclass(frozen=True)
class Verdict:
    """What the data look like.

    Args:
        kind: of text.
        leaning: whether DFT helps or hurts on such data.
        said: the same in a sentence or two.
        evidence: sign by sign.
        limits: of all this.
    """

    kind: Literal["short answers", "worked solutions", "open text"]
    leaning: Leaning
    said: str
    evidence: list[Evidence]
    limits: str = LIMITS


def signs_of(sample: Sample) -> Signs:
    """From the sample's tokens."""
    tokens = sample.tokens
    counts = histogram(tokens.p.double(), P_EDGES) / len(tokens)
    symbols = torch.tensor([CLASSES.index(name) for name in ("digit", "operator", "LaTeX command")])
    return Signs(
        answer=float(torch.tensor(sample.turns, dtype=torch.float64).median()),
        symbols=float(torch.isin(sample.classes, symbols).double().mean()),
        unexpected=float(counts[:3].sum()),
        open=float(counts[4:12].sum()),
        nll=float(-tokens.logp.double().mean()),
        entropy=float(tokens.need("entropy").double().mean()),
    )


def judge(signs: Signs) -> Verdict:
    """The kind of text decides first, then whether the model knows such text."""
    evidence = _evidence(signs)
    against = [one for one in evidence[2:] if one.speaks == "against"]
    if signs.answer <= SHORT:
        said = (
            "Short answers: as a rule one is right, and there are no ways to choose among. DFT hurts on such data "
            "where it was measured; a token that the model gives probability p learns p times as fast as under SFT. "
            "Take SFT (Uniform), or put the way to the answer into the data."
        )
        return Verdict("short answers", "hurts", said, evidence)
    if signs.symbols >= SYMBOLS:
        return _worked(against, evidence)
    said = "Open text, such as chat or prose: nothing published says that DFT helps here. "
    if against:
        said += f"And this model does not expect it ({_listed(against)}), which DFT would hardly mend: take SFT."
        return Verdict("open text", "hurts", said, evidence)
    said += "The model expects what it reads, so DFT may sharpen it; compare with SFT in a short run."
    return Verdict("open text", "unclear", said, evidence)


def _worked(against: list[Evidence], evidence: list[Evidence]) -> Verdict:
    kind: Literal["worked solutions"] = "worked solutions"
    if against:
        said = (
            "Worked solutions, what DFT helps with as a rule; but this model stands far from them "
            f"({_listed(against)}), and DFT learns such tokens slowly or never. Give DFT a floor (0.1 is the authors' "
            "advice), or begin with SFT."
        )
        return Verdict(kind, "unclear", said, evidence)
    said = (
        "Worked solutions that the model half expects: many ways lead to an answer, and weights by p choose among "
        "them. This is what DFT has helped with."
    )
    return Verdict(kind, "helps", said, evidence)


def _listed(evidence: list[Evidence]) -> str:
    return "; ".join(f"{one.what} {one.value}, line {one.line}" for one in evidence)


def _evidence(signs: Signs) -> list[Evidence]:
    return [
        Evidence(
            "tokens of a turn, median",
            f"{signs.answer:.0f}",
            f"{SHORT}",
            "against" if signs.answer <= SHORT else "neither",
            "a short answer leaves no choice of ways",
        ),
        Evidence(
            "digits, operators, LaTeX",
            f"{signs.symbols:.1%}",
            f"{SYMBOLS:.0%}",
            "for" if signs.symbols >= SYMBOLS and signs.answer > SHORT else "neither",
            "long turns with many of them are worked maths or code, where DFT was found to help",
        ),
        Evidence(
            "tokens with p < 0.01",
            f"{signs.unexpected:.1%}",
            f"{UNEXPECTED:.0%}",
            "against" if signs.unexpected > UNEXPECTED else "for",
            "what the model does not expect, DFT leaves unlearnt; in the paper's figure 2 it is 3.7 % before training",
        ),
        Evidence(
            "tokens with p from 0.1 to 0.9",
            f"{signs.open:.1%}",
            f"{OPEN:.0%}",
            "for" if signs.open >= OPEN else "against",
            "here the choice among ways is made; in the paper's figure 2 it is 25.7 %",
        ),
        Evidence(
            "surprise beyond the model's own entropy",
            f"{signs.excess:+.2f} nats",
            f"{EXCESS:+.1f} nats",
            "against" if signs.excess > EXCESS else "for",
            f"−log p {signs.nll:.2f} against entropy {signs.entropy:.2f}: text that the model could have written has "
            "both alike; facts and formats that it does not know cost more",
        ),
    ]
