"""Which tokens of the vocabulary training has pushed up and down most."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

#: What would be taken for markup in a cell of a table.
_MARKDOWN = {"|": "&#124;", "`": "&#96;"} | {sign: f"\\{sign}" for sign in "\\*_<>[]#$~"}
#: Of a two-sided 95 % interval, by the normal distribution.
_Z = 1.959964


@dataclass(frozen=True)
class Push:
    """The mean change of log p of a token id, over the places where it is the target.

    `half_width` is that of the mean's 95 % interval by the normal approximation, 1.96·s/√n. Places of one solution are
    not independent, so it is rather too narrow.
    """

    token: int
    mean: float
    half_width: float
    count: int


def pushes(targets: Tensor, before: Tensor, now: Tensor, at_least: int = 5) -> list[Push]:
    """The change since `before`, the largest first, of each id that is a target at so many places or more.

    Args:
        targets: (M,) ids.
        before: (M,) log p in nats; what is not finite then or `now` is left out.
        at_least: 2 or more.
    """
    change = (now - before).double().numpy()
    finite = np.isfinite(change)
    ids, which, counts = np.unique(targets.numpy()[finite], return_inverse=True, return_counts=True)
    change = change[finite]
    mean = np.bincount(which, change, len(ids)) / np.maximum(counts, 1)
    squares = np.bincount(which, (change - mean[which]) ** 2, len(ids))
    half = _Z * np.sqrt(squares / np.maximum(counts - 1, 1) / np.maximum(counts, 1))
    return [
        Push(int(ids[place]), float(mean[place]), float(half[place]), int(counts[place]))
        for place in np.argsort(-mean, kind="stable")
        if counts[place] >= at_least
    ]


def extremes(found: list[Push], most: int = 10) -> tuple[list[Push], list[Push]]:
    """Those pushed up most, the largest first, and those pushed down most, the lowest first."""
    up = [push for push in found if push.mean > 0][:most]
    down = [push for push in reversed(found) if push.mean < 0][:most]
    return up, down


def table(up: list[Push], down: list[Push], texts: Sequence[str]) -> str:
    """Markdown for TensorBoard.

    Args:
        texts: of each id of the vocabulary.
    """
    if not up and not down:
        return "No token stands at five places of the probe or more and has changed."
    head = "| token | id | mean change of log p | 95 % interval | places |\n|---|---|---|---|---|\n"
    parts = []
    for title, chosen in (("Pushed up", up), ("Pushed down", down)):
        rows = [_row(push, texts) for push in chosen]
        parts.append(f"**{title}**\n\n{head}{''.join(rows)}" if rows else f"**{title}**: none")
    return "\n\n".join(parts)


def visible(text: str) -> str:
    """A token's text with its white space to be seen."""
    return text.replace(" ", "␣").replace("\n", "↵").replace("\t", "→").replace("\r", "↵") or "∅"


def _row(push: Push, texts: Sequence[str]) -> str:
    text = visible(texts[push.token])
    low, high = push.mean - push.half_width, push.mean + push.half_width
    shown = "".join(_MARKDOWN.get(sign, sign) for sign in text)
    return f"| {shown} | {push.token} | {push.mean:+.3f} | {low:+.3f} to {high:+.3f} | {push.count} |\n"
