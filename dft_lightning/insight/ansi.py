"""Rows in the terminal: coloured where it can, and readable where it cannot."""

from collections.abc import Callable, Iterator
from typing import Literal

from dft_lightning.insight.text import printable
from dft_lightning.insight.view import Document, Line, Shown

By = Literal["p", "weight", "mask"]

#: What is learnt stands between the first two; the third follows upon a stop token.
OPEN, CLOSE, STOP = "⟦", "⟧", "■"
#: Backgrounds of the 256-colour table, from what is near 0 to what is near 1: red, orange, yellow, green.
_RAMP = (203, 209, 215, 221, 227, 191, 155, 119)
_LEARNT = 153
_GREY, _BLACK, _RESET = "\x1b[38;5;245m", "\x1b[38;5;16m", "\x1b[0m"


def render(lines: list[Line], by: By, *, colour: bool) -> str:
    """All rows, with a legend first.

    Args:
        by: what the colour of a learnt token shows; a weight, as a share of the largest one shown.
    """
    most = max((token.score.weight for token in _tokens(lines) if token.score), default=0.0)
    parts = [_legend(by, most, colour)]
    for number, line in enumerate(lines):
        if len(lines) > 1 or len(line.documents) > 1 or line.padding:
            padding = f", then {line.padding} positions of padding" if line.padding else ""
            parts.append(f"═══ row {number} of the batch: {len(line.documents)} documents{padding}")
        for place, document in enumerate(line.documents):
            parts.append(f"─── {heading(document, place, len(line.documents))}")
            parts.append("".join(_pieces(document.tokens, by, most, colour)))
    return "\n".join(parts)


def heading(document: Document, place: int, of: int) -> str:
    """What a document is, and its means."""
    learnt = [token for token in document.tokens if token.learnt]
    scores = [token.score for token in learnt if token.score]
    said = f"document {place + 1} of {of}: " if of > 1 else ""
    said += f"training row {document.row} (row {document.origin} of the source"
    said += f", {printable(document.source)}), " if document.source else "), "
    said += f"{len(document.tokens)} tokens, {len(learnt)} learnt, {sum(token.stop for token in learnt)} stop"
    if scores:
        p, weight = (sum(getattr(score, name) for score in scores) / len(scores) for name in ("p", "weight"))
        said += f"; mean p {p:.3f}, mean weight {weight:.3f}"
    return said


def visible(text: str) -> str:
    """A token's text, with its line breaks seen and kept, and nothing in it that a terminal obeys."""
    return "↵\n".join(printable(part) for part in text.split("\n"))


def _tokens(lines: list[Line]) -> Iterator[Shown]:
    return (token for line in lines for document in line.documents for token in document.tokens)


def _legend(by: By, most: float, colour: bool) -> str:
    said = f"{OPEN}learnt{CLOSE}, {STOP} a stop token, ↵ a line break"
    if not colour:
        return said
    if by == "mask":
        return f"{_paint('learnt', _LEARNT)} {_GREY}not learnt{_RESET}; {said}"
    end = "1" if by == "p" else f"{most:.3g}"
    return f"{by}: 0 {''.join(_paint('  ', shade) for shade in _RAMP)} {end}; {_GREY}not learnt{_RESET}; {said}"


def _pieces(tokens: list[Shown], by: By, most: float, colour: bool) -> Iterator[str]:
    inside = False
    for token in tokens:
        if token.learnt != inside:
            yield OPEN if token.learnt else CLOSE
            inside = token.learnt
        text = visible(token.text)
        yield _coloured(token, text, by, most) if colour else text
        yield STOP if token.stop else ""
    yield CLOSE if inside else ""


def _coloured(token: Shown, text: str, by: By, most: float) -> str:
    """Line by line, so that no background runs to the edge of the window."""
    if not token.learnt:
        return _each_line(text, lambda part: f"{_GREY}{part}{_RESET}")
    shade = _LEARNT
    if by != "mask" and token.score is not None:
        value = token.score.p if by == "p" else token.score.weight / (most or 1.0)
        shade = _RAMP[min(int(max(value, 0.0) * len(_RAMP)), len(_RAMP) - 1)]
    return _each_line(text, lambda part: _paint(part, shade))


def _each_line(text: str, paint: Callable[[str], str]) -> str:
    return "\n".join(paint(part) if part else "" for part in text.split("\n"))


def _paint(text: str, shade: int) -> str:
    return f"\x1b[48;5;{shade}m{_BLACK}{text}{_RESET}"
