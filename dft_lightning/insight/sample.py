"""One pass of the base model over a sample of the rows: all that any weighting can ask of their tokens.

Shapes: N supervised tokens of the sample.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dft_lightning.insight.subject import Subject
from dft_lightning.insight.targets import worth_and_pull
from dft_lightning.normalizer import token_factor
from dft_lightning.step_weights import by_row
from dft_lightning.token_classes import CLASSES, class_of, token_texts
from dft_lightning.weighting import TokenStats, TokenWeighting, Uniform
from dft_lightning.weighting.base import DISTRIBUTION_STATISTICS, checked_weights

if TYPE_CHECKING:
    from dft_lightning.data.batch import Batch
    from dft_lightning.data.store import TokenizedRows

_STOP = CLASSES.index("stop")
#: What stands for bytes that are no whole character; what is shown of them until it is whole; the most tokens of one.
_CUT, _PART, _LONGEST = "\ufffd", "·", 8


@dataclass(frozen=True)
class Vocabulary:
    """What the ids of a tokenizer stand for.

    Args:
        texts: of each id.
        classes: (V,) number in `CLASSES` of each id.
        decode: of ids to their text, for characters that several tokens make together.
    """

    texts: list[str]
    classes: Tensor
    decode: Callable[[list[int]], str] | None = None

    @staticmethod
    def of(tokenizer: Any, size: int | None = None) -> "Vocabulary":
        """That of a tokenizer, for a head of so many rows."""
        return Vocabulary(token_texts(tokenizer), class_of(tokenizer, size), tokenizer.decode)

    def text(self, token: int) -> str:
        """The text of an id; "" where the tokenizer knows none."""
        return self.texts[token] if token < len(self.texts) else ""

    def texts_of(self, ids: list[int]) -> list[str]:
        """The text of each token in a row of them; a character that several make stands with the last of these."""
        shown: list[str] = []
        begun: list[int] = []
        for token in ids:
            text = self.text(token)
            begun = [*begun, token] if begun or _CUT in text else []
            whole = self.decode(begun) if begun and self.decode is not None else text
            if begun and _CUT in whole and len(begun) < _LONGEST:
                text = _PART
            elif begun:
                text, begun = whole, []
            shown.append(text)
        return shown

    def text_at(self, ids: list[int], place: int) -> str:
        """The text of one token in a row of them; of the parts of a character but the last, with what they are of."""
        if _CUT not in self.text(ids[place]):
            return self.text(ids[place])
        shown = self.texts_of(ids[: place + _LONGEST])[place:]
        return next((_PART * (number > 0) + text for number, text in enumerate(shown) if text != _PART), _PART)

    def stops(self, ids: np.ndarray, supervised: np.ndarray) -> np.ndarray:
        """Which tokens of a row end a turn that is learnt, (T,): special ones at the end of a supervised stretch."""
        ends = supervised & ~np.append(supervised[1:], False)
        special = (self.classes[torch.from_numpy(np.asarray(ids, dtype=np.int64))] == _STOP).numpy()
        return np.asarray(ends & special)


@dataclass(frozen=True)
class Sample:
    """The supervised tokens of some rows, on the CPU.

    Args:
        tokens: with every statistic; `sequence` is the row, `ref_logp` and `old_logp` are the model's own.
        factor: (N,) n_t, by how the run normalises.
        classes: (N,) number in `CLASSES` of each token.
        source: (N,) number in `sources` of each token's row.
        sources: what the rows' column `source` says.
        turns: supervised tokens of each turn.
        rows: the rows.
        targets: see `worth_and_pull`, (N,) each, of the weightings with targets over the vocabulary, by their repr.
    """

    tokens: TokenStats
    factor: Tensor
    classes: Tensor
    source: Tensor
    sources: list[str]
    turns: list[int]
    rows: "TokenizedRows"
    targets: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @cached_property
    def pull(self) -> Tensor:
        """The norm of the gradient of −log p by the logits, (N,) float64: that of softmax − onehot.

        √((1−p)² + Σ_{v≠y} p_v²), where the sum is the collision probability less p².
        """
        p, collision = self.tokens.p.double(), self.tokens.need("collision").double()
        return ((1 - p).square() + (collision - p.square()).clamp(min=0)).sqrt()

    def weights(self, weighting: TokenWeighting) -> Tensor:
        """What the tokens are worth, (N,) float64, as if the sample were one optimizer step."""
        if weighting.vocabulary:
            return self.targets[repr(weighting)][0].double()
        return checked_weights(weighting, self.tokens).double()

    def mass(self, weighting: TokenWeighting) -> Tensor:
        """The norm of each token's part of the gradient by the logits, (N,)."""
        if weighting.vocabulary:
            return self.factor * self.targets[repr(weighting)][1].double()
        return self.factor * self.weights(weighting).abs() * self.pull

    @cached_property
    def places(self) -> dict[int, Tensor]:
        """Where the tokens of each row are, in the order of the row."""
        found: dict[int, Tensor] = {}
        for row in torch.unique(self.tokens.sequence).tolist():
            where = torch.nonzero(self.tokens.sequence == row).flatten()
            found[row] = where[torch.argsort(self.tokens.need("position")[where])]
        return found

    def text_of(self, token: int, vocabulary: Vocabulary) -> str:
        """The text of a token of the sample, as it is in its row."""
        row = next(row for row in map(self.rows.__getitem__, range(len(self.rows))) if row["row"] == self._row(token))
        targets = np.flatnonzero(np.asarray(row["supervised"]) & (np.arange(len(row["input_ids"])) > 0))
        place = int(targets[int(self.tokens.need("position")[token])])
        return vocabulary.text_at([int(each) for each in row["input_ids"]], place)

    def _row(self, token: int) -> int:
        return int(self.tokens.sequence[token])


def spread(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` indices spread evenly over `count`, first and last among them."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(int))


def micro_batches(subject: Subject, rows: "TokenizedRows") -> "Iterator[Batch]":
    """All rows once, in order of length."""
    for batch in subject.data.scoring_loader(rows, "train", workers=0):
        yield batch.to(subject.device)


@torch.no_grad()
def take(
    subject: Subject, rows: "TokenizedRows", vocabulary: Vocabulary, weightings: Iterable[TokenWeighting] = ()
) -> Sample:
    """One pass over the rows, and one more for each of the weightings that has targets over the vocabulary."""
    parts, factors = [], []
    found: dict[str, list[tuple[Tensor, Tensor]]] = {repr(each): [] for each in weightings if each.vocabulary}
    for batch in micro_batches(subject, rows):
        with subject.arithmetic():
            _, tokens = subject.network(batch, Uniform(), wanted=DISTRIBUTION_STATISTICS, **subject.head_options)
        factor = token_factor(subject.module.normalize, batch)
        tokens = replace(as_initial(tokens, batch), weight=None)
        parts.append(_on_cpu(by_row(tokens, batch)))
        for each in (each for each in weightings if each.vocabulary):
            with subject.arithmetic():
                worth, pull = worth_and_pull(subject.network, batch, each, tokens)
            found[repr(each)].append((worth.cpu(), pull.cpu()))
        factors.append(torch.ones(len(tokens), dtype=torch.float64) if factor is None else factor.cpu())
    tokens = TokenStats.concatenate(parts)
    stop, sources, turns = _facts_of_rows(rows, vocabulary)
    names = sorted(set(sources.values()))
    row_of = tokens.sequence.tolist()
    ends = [stop[row][place] for row, place in zip(row_of, tokens.need("position").tolist(), strict=True)]
    return Sample(
        tokens=replace(tokens, stop=torch.tensor(ends, dtype=torch.bool)),
        factor=torch.cat(factors),
        classes=vocabulary.classes[tokens.target].long(),
        source=torch.tensor([names.index(sources[row]) for row in row_of]),
        sources=names,
        turns=turns,
        rows=rows,
        targets={name: _joined(batches) for name, batches in found.items()},
    )


def _joined(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    first, second = zip(*batches, strict=True)
    return torch.cat(first), torch.cat(second)


def as_initial(tokens: TokenStats, batch: "Batch") -> TokenStats:
    """With what a weighting may ask for beside the distribution, before any training.

    The model is its own reference and its own earlier policy then; without weights in the data each token has 1.
    """
    given: Tensor | None = getattr(batch, "data_weight", None)
    one = torch.ones_like(tokens.logp)
    return replace(
        tokens,
        ref_logp=tokens.logp,
        old_logp=tokens.logp,
        data_weight=one if given is None else given.to(one),
        stop=batch.stop,
    )


def _on_cpu(tokens: TokenStats) -> TokenStats:
    moved: dict[str, Any] = {name: value.cpu() for name, value in tokens.tensors().items()}
    return replace(tokens, **moved)


def _facts_of_rows(
    rows: "TokenizedRows", vocabulary: Vocabulary
) -> tuple[dict[int, np.ndarray], dict[int, str], list[int]]:
    """By row: which of its targets end a turn, and its source; and the supervised tokens of each turn of all rows."""
    stop, sources, turns = {}, {}, []
    for row in (rows[index] for index in range(len(rows))):
        supervised = np.asarray(row["supervised"]) & (np.arange(len(row["input_ids"])) > 0)  # the first is no target
        stop[row["row"]] = vocabulary.stops(row["input_ids"], supervised)[supervised]
        sources[row["row"]] = row["source"] or "(none)"
        borders = np.flatnonzero(np.diff(np.concatenate([[False], supervised, [False]]).astype(int)))
        turns += (borders[1::2] - borders[::2]).tolist()
    return stop, sources, turns
