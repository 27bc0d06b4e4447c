"""Plots as SVG text: self-contained, sharp at any size, values on hovering.

Texts that are given are escaped here.
"""

from collections.abc import Mapping, Sequence
from colorsys import hls_to_rgb
from html import escape

#: Told apart by people with any colour vision (Okabe and Ito); the first is for the tokens themselves.
COLOURS = ("#8a8f98", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a51a3", "#7f5539")
#: Of the circle: multiples of it are never near one another.
_GOLDEN = 0.381966
_WIDTH, _HEIGHT = 720, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 14, 46


def colour(number: int) -> str:
    """The colour of the n-th series; after those above, others around the circle, darker and lighter in turn."""
    if number < len(COLOURS):
        return COLOURS[number]
    parts = hls_to_rgb(number * _GOLDEN % 1, (0.3, 0.45, 0.6)[number % 3], 0.6)
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


def bars(labels: Sequence[str], shares: Sequence[float], axis: str, beside: Sequence[float] | None = None) -> str:
    """Shares as bars, with another series as a line of marks where it is given.

    Args:
        axis: what the labels are values of.
        beside: shares of the same bins in something to compare with.
    """
    top = _ceiling([*shares, *(beside or ())])
    width = (_WIDTH - _LEFT - _RIGHT) / len(labels)
    parts = _frame(top, labels, axis)
    for place, (label, share) in enumerate(zip(labels, shares, strict=True)):
        x, y = _LEFT + place * width, _y(share, top)
        tip = f"<title>{escape(label)}: {share:.2%}</title>"
        parts.append(_rectangle(x + width * 0.08, y, width * 0.84, _HEIGHT - _BOTTOM - y, colour(1), tip))
        if share > 0:
            parts.append(_text(x + width / 2, y - 3, f"{100 * share:.1f}", "middle", "value"))
    for place, share in enumerate(beside or ()):
        x, y = _LEFT + place * width, _y(share, top)
        tip = f"<title>{share:.2%}</title>"
        parts.append(f'<path d="M{x:.1f} {y:.1f}h{width:.1f}" stroke="{colour(2)}" stroke-width="2">{tip}</path>')
    return _svg(parts)


def lines(labels: Sequence[str], series: Mapping[str, Sequence[float]], axis: str) -> str:
    """Shares of several series over ordered groups."""
    top = _ceiling([share for shares in series.values() for share in shares])
    width = (_WIDTH - _LEFT - _RIGHT) / len(labels)
    parts = _frame(top, labels, axis)
    for number, (name, shares) in enumerate(series.items()):
        points = [(_LEFT + (place + 0.5) * width, _y(share, top)) for place, share in enumerate(shares)]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = ' stroke-dasharray="4 3"' if number == 0 else ""
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour(number)}" stroke-width="2"{dashes}/>')
        for (x, y), label, share in zip(points, labels, shares, strict=True):
            tip = f"<title>{escape(name)}, {escape(label)}: {share:.2%}</title>"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour(number)}">{tip}</circle>')
    return _svg(parts) + legend(list(series))


def stacks(labels: Sequence[str], series: Mapping[str, Sequence[float]]) -> str:
    """One bar a series, cut into its shares of the groups."""
    left, height = 190, 24
    parts = []
    for row, (name, shares) in enumerate(series.items()):
        x, y = float(left), row * (height + 8) + 2
        short = name if len(name) <= 28 else name[:27] + "…"
        parts.append(_text(left - 8, y + height * 0.68, short, "end", "label"))
        for number, (label, share) in enumerate(zip(labels, shares, strict=True)):
            width = share * (_WIDTH - left - _RIGHT)
            tip = f"<title>{escape(name)}, {escape(label)}: {share:.2%}</title>"
            parts.append(_rectangle(x, y, width, height, colour(number), tip))
            if width > 30:
                parts.append(_text(x + width / 2, y + height * 0.68, f"{100 * share:.0f}", "middle", "inside"))
            x += width
    return _svg(parts, height=len(series) * (height + 8)) + legend(list(labels))


def legend(names: Sequence[str]) -> str:
    """Which colour is which."""
    keys = [
        f'<span class="key"><i style="background:{colour(number)}"></i>{escape(name)}</span>'
        for number, name in enumerate(names)
    ]
    return f'<p class="legend">{"".join(keys)}</p>'


def strip(values: Sequence[float], marks: Mapping[float, str]) -> str:
    """Probabilities as ticks on a logarithmic axis from 1e-6 to 1, with lines at some values."""
    height, low = 78, -6.0
    parts = []

    def place(p: float) -> float:
        exponent = max(_log10(p), low)
        return _LEFT + (exponent - low) / -low * (_WIDTH - _LEFT - _RIGHT)

    for power in range(int(low), 1):
        x = place(10.0**power)
        parts.append(f'<path d="M{x:.1f} 18V48" class="grid"/>')
        sign = "≤" if power == low else ""
        parts.append(_text(x, 64, f"{sign}1e{power}" if power < -2 else f"{10.0**power:g}", "middle", "label"))
    for p in values:
        x = place(p)
        tip = f"<title>p = {p:.3g}</title>"
        parts.append(f'<path d="M{x:.1f} 20V46" stroke="{colour(1)}" stroke-width="2" opacity=".55">{tip}</path>')
    for p, name in marks.items():
        x = place(p)
        parts.append(f'<path d="M{x:.1f} 14V52" stroke="{colour(2)}" stroke-dasharray="3 2"/>')
        parts.append(_text(x, 11, name, "middle", "value"))
    return _svg(parts, height=height)


def _log10(p: float) -> float:
    from math import log10

    return log10(p) if p > 0 else -1e9


def _ceiling(shares: Sequence[float]) -> float:
    """The top of the axis: the next of 5, 10, 20, … per cent above the largest share."""
    most = max(shares, default=0.0)
    return next((step / 100 for step in (5, 10, 20, 30, 40, 50, 60, 80) if most <= step / 100), 1.0)


def _y(share: float, top: float) -> float:
    return _HEIGHT - _BOTTOM - share / top * (_HEIGHT - _TOP - _BOTTOM)


def _frame(top: float, labels: Sequence[str], axis: str) -> list[str]:
    """Grid, per cent on the left, labels below."""
    parts = []
    for step in range(5):
        share = top * step / 4
        y = _y(share, top)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" class="grid"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{100 * share:g} %", "end", "label"))
    width = (_WIDTH - _LEFT - _RIGHT) / len(labels)
    for place, label in enumerate(labels):
        parts.append(_text(_LEFT + (place + 0.5) * width, _HEIGHT - _BOTTOM + 16, label, "middle", "label"))
    parts.append(_text((_WIDTH + _LEFT) / 2, _HEIGHT - 8, axis, "middle", "label"))
    return parts


def _rectangle(x: float, y: float, width: float, height: float, fill: str, inside: str) -> str:
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{max(height, 0):.1f}"'
    return f'<rect {box} fill="{fill}">{inside}</rect>'


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def _svg(parts: Sequence[str], height: int = _HEIGHT) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">{"".join(parts)}</svg>'
