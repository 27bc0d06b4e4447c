"""All that `dft diagnose` finds, as one value, and as JSON."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dft_lightning.callbacks.token_probabilities import ENTROPY_EDGES, P_EDGES, P_LABELS, histogram
from dft_lightning.insight.choice import why_not
from dft_lightning.insight.flow import Flow, Groups, flow_of, groups_of
from dft_lightning.insight.gradients import compare
from dft_lightning.insight.sample import Sample, Vocabulary, spread, take
from dft_lightning.insight.stop import Stop, stop_of
from dft_lightning.insight.subject import Subject
from dft_lightning.insight.verdict import Signs, Verdict, judge, signs_of
from dft_lightning.weighting import TokenWeighting

#: A token is at an extreme where the model is all but sure of it, or has all but ruled it out.
LOW, HIGH = 0.01, 0.99
_SHOWN = 12


@dataclass(frozen=True)
class Frequent:
    """A token of the vocabulary among those at an extreme.

    Args:
        share: of the tokens at that extreme.
        p: mean over its places there.
    """

    id: int
    text: str
    count: int
    share: float
    p: float


@dataclass(frozen=True)
class Extreme:
    """Tokens at one end of the probabilities: their share in all, and the most frequent of them."""

    share: float
    tokens: list[Frequent]


@dataclass(frozen=True)
class Diagnosis:
    """What one pass of the base model, and a few gradients, say of the data.

    Args:
        facts: model, data and machine, for the head of the page.
        p: counts by bin of `P_EDGES`.
        entropy: counts by bin of `ENTROPY_EDGES`.
        low: tokens with p < `LOW`.
        high: tokens with p > `HIGH`.
        groups: title, labels and the tokens' shares of each way to sort them.
        flows: of each weighting, by its name.
        stop: whether stopping can be learnt.
        gradient_rows: rows of the step whose gradients were compared.
    """

    facts: dict[str, str]
    p: list[int]
    entropy: list[int]
    signs: Signs
    low: Extreme
    high: Extreme
    groups: list[Groups]
    flows: dict[str, Flow]
    stop: Stop
    gradient_rows: int
    verdict: Verdict

    @property
    def tokens(self) -> int:
        """Supervised tokens of the sample."""
        return sum(self.p)

    def token_shares(self, groups: Groups) -> list[float]:
        """The share of the tokens in each group."""
        return groups.shares(torch.ones(self.tokens))


def diagnose(
    subject: Subject,
    weightings: Mapping[str, TokenWeighting],
    *,
    sample_rows: int,
    gradient_rows: int,
    say: Callable[[str], None],
) -> Diagnosis:
    """Look at the rows with the subject's model.

    Args:
        weightings: to compare, by name.
        sample_rows: rows of the one pass, spread evenly over the training rows.
        gradient_rows: of these, rows of the step whose gradient is computed under each weighting; 0 leaves it out.
        say: told what is being done.
    """
    rows = subject.rows.select(spread(len(subject.rows), sample_rows))
    head = subject.network.base.get_output_embeddings().weight.shape[0]
    vocabulary = Vocabulary.of(subject.module.tokenizer, head)
    say(f"One pass over {len(rows)} rows …")
    sample = take(subject, rows, vocabulary, weightings.values())
    picked = spread(len(rows), gradient_rows).tolist() if gradient_rows else []
    if picked:
        say(f"Gradients of {len(weightings)} weightings over {len(picked)} rows …")
    directions = compare(subject, sample, picked, weightings) if picked else {}
    groups = groups_of(sample)
    signs = signs_of(sample)
    p = sample.tokens.p.double()
    return Diagnosis(
        facts=_facts(subject, sample),
        p=_counts(p, P_EDGES),
        entropy=_counts(sample.tokens.need("entropy"), ENTROPY_EDGES),
        signs=signs,
        low=_extreme(sample, p < LOW, vocabulary),
        high=_extreme(sample, p > HIGH, vocabulary),
        groups=groups,
        flows={name: flow_of(sample, each, groups, directions.get(name)) for name, each in weightings.items()},
        stop=stop_of(sample),
        gradient_rows=len(picked),
        verdict=judge(signs),
    )


def _facts(subject: Subject, sample: Sample) -> dict[str, str]:
    network, options = subject.network, subject.data.options
    dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
    weighting = subject.module.weighting
    reason = why_not(weighting)
    return {
        "model": subject.module.source.name,
        "precision": f"{subject.precision}, weights in {dtype}, on {subject.device.type}",
        "data": str(options.path or options.dataset),
        "sample": f"{len(sample.rows):,} of {len(subject.rows):,} training rows, "
        f"{len(sample.tokens):,} supervised tokens",
        "configured weighting": repr(weighting) + (f"; not compared: {reason}" if reason else ""),
        "normalised by": subject.module.normalize,
        "before training": "the model is its own reference and earlier policy, and schedules are at their start: what "
        "compares with a reference gives weight 1 here by construction",
    }


def _counts(values: Tensor, edges: tuple[float, ...]) -> list[int]:
    return [int(count) for count in histogram(values, edges).tolist()]


def _extreme(sample: Sample, where: Tensor, vocabulary: Vocabulary) -> Extreme:
    places = torch.nonzero(where).flatten()
    target, p = sample.tokens.target[where], sample.tokens.p.double()[where]
    ids, counts = torch.unique(target, return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:_SHOWN]
    tokens = [
        Frequent(
            token,
            sample.text_of(int(places[target == token][0]), vocabulary),
            count,
            count / len(p),
            float(p[target == token].mean()),
        )
        for token, count in zip(ids[order].tolist(), counts[order].tolist(), strict=True)
    ]
    return Extreme(float(where.double().mean()), tokens)


def as_json(found: Diagnosis) -> dict[str, Any]:
    """The diagnosis as plain data; keys are stable."""
    return {
        "facts": found.facts,
        "tokens": found.tokens,
        "verdict": asdict(found.verdict),
        "signs": asdict(found.signs) | {"excess": found.signs.excess},
        "p": {"edges": list(P_EDGES), "labels": list(P_LABELS), "counts": found.p},
        "entropy": {"edges": list(ENTROPY_EDGES), "counts": found.entropy},
        "extremes": {f"p < {LOW}": asdict(found.low), f"p > {HIGH}": asdict(found.high)},
        "stop": {name: value for name, value in asdict(found.stop).items() if name != "quantiles"}
        | {"quantiles": {str(share): value for share, value in found.stop.quantiles.items()}},
        "groups": {
            group.title: {"labels": list(group.labels), "tokens": found.token_shares(group)} for group in found.groups
        },
        "gradient_rows": found.gradient_rows,
        "weightings": {name: asdict(flow) for name, flow in found.flows.items()},
    }
