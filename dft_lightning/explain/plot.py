"""Curves over p as text, and as an image."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dft_lightning.explain.curves import Curve

_BLOCKS = " ▁▂▃▄▅▆▇█"
_MARGIN = 8
#: matplotlib's colours begin anew after so many.
_COLOURS, _STYLES = 10, ("-", "--", ":", "-.")


def as_text(title: str, labels: Sequence[str], values: Sequence[Tensor]) -> str:
    """One bar chart a curve (G,), one below the other on a common scale, under a title."""
    low = min(0.0, *(float(curve.min()) for curve in values), 0.0)
    high = max(float(curve.max()) for curve in values)
    high = high if high > low else low + 1.0
    lines = [title]
    for label, curve in zip(labels, values, strict=True):
        lines += [f"{'':{_MARGIN}}  {label}"] if label else []
        lines += _bars(curve.tolist(), low, high, 8 if len(values) == 1 else 4)
    return "\n".join([*lines, _axis(len(values[0]))])


def _bars(values: list[float], low: float, high: float, height: int) -> list[str]:
    eighths = [round((value - low) / (high - low) * height * 8) for value in values]
    lines = []
    for row in reversed(range(height)):
        mark = f"{high:{_MARGIN}.3g}" if row == height - 1 else f"{low:{_MARGIN}.3g}" if row == 0 else " " * _MARGIN
        lines.append(f"{mark} ┤{''.join(_BLOCKS[min(max(eighth - 8 * row, 0), 8)] for eighth in eighths)}".rstrip())
    return lines


def _axis(width: int) -> str:
    """The ends of the axis of p, and its middle."""
    half = width // 2
    return f"{'':{_MARGIN}} └{'─' * width}\n{'':{_MARGIN}}  {'p = 0':<{half - 1}}{'0.5':<{width - half}}1"


def as_image(path: Path, title: str, points: Tensor, drawn: Sequence[Curve]) -> None:
    """Both curves side by side, as an image of the format that the path's ending names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = figure.subplots(1, 2)
    for panel, name in zip(panels, ("weight w", "push on the target's logit, w·(1 − p)"), strict=True):
        for number, curve in enumerate(drawn):
            style = _STYLES[number // _COLOURS % len(_STYLES)]
            values = curve.weight if name == "weight w" else curve.push
            panel.plot(points.tolist(), values.tolist(), label=curve.label, linestyle=style)
        panel.set_xlabel("p")
        panel.set_title(name)
        panel.axhline(0, color="grey", linewidth=0.5)
        if any(curve.label for curve in drawn):
            panel.legend(frameon=False)
    figure.savefig(path, dpi=120)
