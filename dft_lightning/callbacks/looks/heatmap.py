"""Pictures of solutions: every token a box in the colour of its probability, at the start and now."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dft_lightning.callbacks.looks.canvas import DPI, blank, drawable
from dft_lightning.callbacks.looks.change import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 64
_LINES = 22
#: An advance of whole pixels, so that the signs of a line stand above the boxes: DejaVu Sans Mono's is .602 em.
_CELL = 8
_POINTS = _CELL / 0.602 * 72 / DPI
_LINE = 18  # pixels
_MARGIN = 10
_TITLE = 30


@dataclass(frozen=True)
class Box:
    """A piece of a token on a line of text."""

    token: int
    line: int
    column: int
    text: str


def boxes(texts: Sequence[str], columns: int = _COLUMNS, lines: int = _LINES) -> list[Box]:
    """Where the tokens of a solution stand; what is after the last line is left out.

    A token that does not fit goes to the next line; one with a line break ends its line.
    """
    placed, line, column = [], 0, 0
    for token, text in enumerate(texts):
        shown = drawable(visible(text))[:columns]
        if column + len(shown) > columns:
            line, column = line + 1, 0
        if line >= lines:
            break
        placed.append(Box(token, line, column, shown))
        column += len(shown)
        if "\n" in text:
            line, column = line + 1, 0
    return placed


def draw_solutions(
    solutions: Sequence[tuple[Sequence[str], npt.NDArray[np.float64], npt.NDArray[np.float64]]], since: str, title: str
) -> "Figure":
    """A solution below another, `since` on the left, `title` (now) on the right.

    Args:
        solutions: texts of the tokens, their p at the start, and their p now.
    """
    placed = [boxes(texts) for texts, *_ in solutions]
    heights = [max((box.line for box in one), default=0) + 1 for one in placed]
    width = 2 * _COLUMNS * _CELL + 3 * _MARGIN
    height = _TITLE + sum(heights) * _LINE + _MARGIN * (len(placed) + 1) + _TITLE
    figure = blank(width / DPI, height / DPI, layout=None)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    lefts = (_MARGIN, 2 * _MARGIN + _COLUMNS * _CELL)
    for left, name in zip(lefts, (since, title), strict=True):
        axes.text(left, _TITLE / 2, f"p of each token, {name}", va="center", fontsize=10)
    top = _TITLE
    for one, lines, (_, *looks) in zip(placed, heights, solutions, strict=True):
        for left, p in zip(lefts, looks, strict=True):
            _solution(axes, one, p, left, top)
        top += lines * _LINE + _MARGIN
    _legend(axes, width, height)
    return figure


def _solution(axes: "Axes", placed: list[Box], p: npt.NDArray[np.float64], left: int, top: int) -> None:
    """Boxes in one go, then a text a line: a text a token would take ten times as long."""
    from matplotlib.collections import PolyCollection

    corners = []
    for box in placed:
        x, y = left + box.column * _CELL, top + box.line * _LINE
        right, bottom = x + len(box.text) * _CELL, y + _LINE
        corners.append([(x, y), (right, y), (right, bottom), (x, bottom)])
    colours = _colours(np.array([p[box.token] for box in placed]))
    axes.add_collection(PolyCollection(corners, facecolors=colours, edgecolors="white", linewidths=0.6))
    for line in sorted({box.line for box in placed}):
        text = "".join(box.text for box in placed if box.line == line)
        middle = top + (line + 0.5) * _LINE
        axes.text(left, middle, text, va="center", family="DejaVu Sans Mono", fontsize=_POINTS, parse_math=False)


def _colours(p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """from red (p = 0) by yellow to blue (1), light enough to read on; a place of no colour where p is no number."""
    from matplotlib import colormaps

    rgba = np.asarray(colormaps["RdYlBu"](np.nan_to_num(p)))
    rgba[:, :3] = 0.45 + 0.55 * rgba[:, :3]
    rgba[~np.isfinite(p), :3] = 0.9
    return rgba


def _legend(axes: "Axes", width: int, height: int) -> None:
    from matplotlib.collections import PolyCollection

    scale, y, size = np.linspace(0.0, 1.0, 11), height - _TITLE // 2 - 7, 26
    lefts = [_MARGIN + 24 + size * place for place in range(len(scale))]
    corners = [[(x, y), (x + size, y), (x + size, y + 14), (x, y + 14)] for x in lefts]
    axes.add_collection(PolyCollection(corners, facecolors=_colours(scale)))
    for x, share in zip(lefts, scale, strict=True):
        axes.text(x + size / 2, y + 7, f"{share:.1f}", ha="center", va="center", fontsize=7)
    axes.text(_MARGIN, y + 7, "p", va="center", fontsize=9)
    axes.text(width - _MARGIN, y + 7, "␣ space  ↵ line break", ha="right", va="center", fontsize=8)
