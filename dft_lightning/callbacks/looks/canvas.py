"""What all pictures share."""

from functools import cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEFORE, NOW, DOWN = "#c8ccd4", "#2f6db5", "#c0504d"
DPI = 100


def blank(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> "Figure":
    """A figure in inches; not by pyplot, which would keep it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def plain(axes: "Axes") -> "Axes":
    """Without a frame on top and on the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return axes


def drawable(text: str) -> str:
    """The text with a box in place of what the monospaced font has no sign for, which matplotlib would warn about."""
    font = _monospaced()
    return "".join(sign if font.get_char_index(ord(sign)) else "▯" for sign in text)


@cache
def _monospaced() -> Any:
    from matplotlib.font_manager import findfont, get_font

    return get_font(findfont("DejaVu Sans Mono"))
