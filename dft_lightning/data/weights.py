"""Weights that come with the data: of a row, of a message, or of each token; what is not one makes the row unusable.

A row's weight stands in a column: one number, or a list with one number for each supervised token. A message's weight
is its key `weight`, as in OpenAI's fine-tuning format: it counts for assistant messages, and is 1 where there is
none, as there. Where there are both, they are multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from dft_lightning.chats import UnusableRow

if TYPE_CHECKING:
    from dft_lightning.data.rendering import Rendered

RowWeight: TypeAlias = float | list[float]

_LARGEST = 1e18  # the product of two is a number in float32


def row_weight(row: Mapping[str, Any], column: str) -> RowWeight:
    """What a column says of a row. Raises `UnusableRow`, also where there is nothing: 1 would be a guess."""
    value = row.get(column)
    if value is None:
        raise UnusableRow("the weight is missing or null", column)
    if isinstance(value, list):
        return [_number(each, "a token's weight") for each in value]
    return _number(value, "a row's weight")


def message_weights(chat: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """The weight of each assistant message; None where none has one. Raises `UnusableRow`."""
    given = [message.get("weight") for message in chat if message["role"] == "assistant"]
    if all(weight is None for weight in given):
        return None
    return [1.0 if weight is None else _number(weight, "a message's weight") for weight in given]


def token_weights(rendered: Rendered, of_row: RowWeight | None, of_messages: list[float] | None) -> list[float]:
    """The weight of each supervised token, in order; none at all where there is no weight. Raises `UnusableRow`."""
    if of_row is None and of_messages is None:
        return []
    places = np.flatnonzero(rendered.supervised)
    weights = np.ones(len(places))
    if of_messages is not None:
        assert len(of_messages) == len(rendered.ends)
        weights *= np.array(of_messages)[np.searchsorted(rendered.ends, places)]  # the turn that ends next
    if isinstance(of_row, list) and len(of_row) != len(places):
        detail = f"{len(of_row)} weights, {len(places)} supervised tokens (stop tokens are among them)"
        raise UnusableRow("another number of weights than of supervised tokens", detail)
    if of_row is not None:
        weights *= np.array(of_row)
    return [float(weight) for weight in weights]


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LARGEST:
        raise UnusableRow(f"{what} is no number from 0 to {_LARGEST:g}", f"got {value!r:.60}")
    return float(value)
