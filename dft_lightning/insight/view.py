"""Rows as the model sees them: read back from the batch itself, not from the rows that it was made of.

Shapes: B rows of T positions, N supervised tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dft_lightning.data.batch import Collator
from dft_lightning.data.packing import Packed, Row
from dft_lightning.errors import UserError
from dft_lightning.insight.sample import Vocabulary, as_initial
from dft_lightning.insight.targets import worth_and_pull
from dft_lightning.weighting import TokenStats, TokenWeighting, Uniform
from dft_lightning.weighting.base import DISTRIBUTION_STATISTICS, checked_weights

if TYPE_CHECKING:
    from dft_lightning.data.batch import Batch
    from dft_lightning.data.store import TokenizedRows
    from dft_lightning.insight.subject import Subject


@dataclass(frozen=True)
class Score:
    """What the model makes of a supervised token, and what the weighting makes of that."""

    p: float
    weight: float
    entropy: float
    rank: int


@dataclass(frozen=True)
class Shown:
    """A token of a row.

    Args:
        learnt: whether it is a target of the loss.
        stop: whether it ends a turn that is learnt.
        score: None where it is not learnt, or no model was asked.
    """

    id: int
    text: str
    learnt: bool
    stop: bool
    score: Score | None = None


@dataclass(frozen=True)
class Document:
    """A sequence in a row.

    Args:
        row: its index among the training rows, what `--rows` takes.
        origin: its index in the source.
        source: what the column `source` says.
    """

    row: int
    origin: int
    source: str
    tokens: list[Shown]


@dataclass(frozen=True)
class Line:
    """A row of the tensor that the model reads: documents that do not see each other, and positions without a token."""

    documents: list[Document]
    padding: int


def laid_out(subject: "Subject", asked: Sequence[int] | None, first: int) -> list[Row]:
    """Which training rows are shown, as lists of those that share a row of the tensor.

    Args:
        asked: indices of training rows; None for the first few, or where rows are packed, those of the fullest packed
            row of the first step.
        first: how many are a few.
    """
    rows, layout = subject.rows, subject.data.layout
    if asked is None:
        if isinstance(layout, Packed):
            return subject.data.sampler().rows(0, 0)[:1]
        return [[index] for index in range(min(first, len(rows)))]
    if wrong := [index for index in asked if not 0 <= index < len(rows)]:
        raise UserError(f"--rows has {wrong[0]}; there are {len(rows):,} training rows, from 0 on")
    if isinstance(layout, Packed):
        unique = np.array(list(dict.fromkeys(asked)))
        return layout.rows(unique, rows.lengths[unique])
    return [[index] for index in asked]


def batch_of(subject: "Subject", layout: Sequence[Row]) -> "Batch":
    """The rows as the run's own collator lays them out."""
    kind, pad = subject.data.layout, subject.module.tokenizer.pad_token_id
    collate = Collator(0 if pad is None else pad, packed=isinstance(kind, Packed), width=kind.width)
    return collate([[subject.rows[index] for index in row] for row in layout])


@torch.no_grad()
def scores(subject: "Subject", batch: "Batch", weighting: TokenWeighting) -> list[Score]:
    """Of each supervised token of the batch, (N,); all of them are taken to be one optimizer step."""
    network = subject.network
    if batch.position_ids is not None:
        with subject.arithmetic():
            network.check_borders()
    with subject.arithmetic():
        moved = batch.to(subject.device)
        _, tokens = network(moved, Uniform(), wanted=DISTRIBUTION_STATISTICS, **subject.head_options)
    stop = _stops(batch, Vocabulary.of(subject.module.tokenizer)).to(subject.device)
    tokens = replace(as_initial(tokens, moved), weight=None, stop=stop)
    if weighting.vocabulary:
        with subject.arithmetic():
            return _listed(tokens, worth_and_pull(network, moved, weighting, tokens)[0])
    return _listed(tokens, checked_weights(weighting, tokens))


def _listed(tokens: TokenStats, weight: torch.Tensor) -> list[Score]:
    columns = (tokens.p, weight, tokens.need("entropy"), tokens.need("rank"))
    return [Score(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def _stops(batch: "Batch", vocabulary: Vocabulary) -> torch.Tensor:
    """Which supervised tokens end a turn, (N,) bool."""
    learnt = _learnt(batch)
    flags = [vocabulary.stops(ids, mask) for ids, mask in zip(batch.input_ids.numpy(), learnt, strict=True)]
    return torch.from_numpy(np.stack(flags)).flatten()[batch.supervised + 1]


def _learnt(batch: "Batch") -> np.ndarray:
    """Which positions hold a target, (B, T): each follows one that is supervised."""
    learnt = np.zeros(batch.input_ids.numel(), dtype=bool)
    learnt[batch.supervised.numpy() + 1] = True
    assert torch.equal(batch.input_ids.flatten()[batch.supervised + 1], batch.target)
    return learnt.reshape(tuple(batch.input_ids.shape))


def lines(
    subject: "Subject", layout: Sequence[Row], batch: "Batch", vocabulary: Vocabulary, found: list[Score] | None
) -> list[Line]:
    """The batch row by row, document by document.

    Args:
        found: scores of the supervised tokens, in the batch's order; None without a model.
    """
    learnt, origin, width = _learnt(batch), subject.data.origin["train"], batch.input_ids.shape[1]
    by_place: dict[int, Score] = {}
    if found is not None:
        by_place = dict(zip((batch.supervised + 1).tolist(), found, strict=True))
    made, lengths = [], iter(batch.lengths)
    for number, row in enumerate(layout):
        start, documents = 0, []
        for index in row:
            end = start + next(lengths)
            piece = slice(start, end)
            tokens = _tokens(batch.input_ids[number, piece].numpy(), learnt[number, piece], vocabulary)
            place = number * width + start
            tokens = [replace(token, score=by_place.get(place + step)) for step, token in enumerate(tokens)]
            documents.append(_document(subject.rows, index, origin, tokens))
            start = end
        made.append(Line(documents, width - start))
    return made


def _document(rows: "TokenizedRows", index: int, origin: Any, tokens: list[Shown]) -> Document:
    row = rows[index]
    return Document(index, int(origin[row["row"]]), row["source"], tokens)


def _tokens(ids: np.ndarray, learnt: np.ndarray, vocabulary: Vocabulary) -> list[Shown]:
    stops = vocabulary.stops(ids, learnt)
    columns = zip(ids.tolist(), vocabulary.texts_of(ids.tolist()), learnt.tolist(), stops.tolist(), strict=True)
    return [Shown(token, text, mask, stop) for token, text, mask, stop in columns]
