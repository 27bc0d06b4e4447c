"""The pictures, but for the solutions' heat maps: see `heatmap.py`."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from dft_lightning.callbacks.looks.canvas import BEFORE, DOWN, NOW, blank, drawable, plain
from dft_lightning.callbacks.looks.change import Push, visible
from dft_lightning.callbacks.looks.tally import (
    CONFIDENCE_EDGES,
    P_LABELS,
    POSITION_LABELS,
    WEIGHT_EDGES,
    Tally,
    calibration_error,
    percent,
)
from dft_lightning.token_classes import CLASSES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WEIGHT_LABELS = tuple(f"{low:g}" for low in WEIGHT_EDGES[:-1])


def _wrapped(title: str) -> str:
    """Within the picture: the names of nested weightings are long."""
    return "\n".join(textwrap.wrap(title, 90))


def draw(before: list[float], now: list[float], title: str, weighting: str, since: str = "before training") -> "Figure":
    """Per cent of tokens by bin of p, before under now, on a logarithmic axis."""
    figure = blank(8, 4)
    axes = plain(figure.add_subplot())
    places = np.arange(len(P_LABELS))
    axes.bar(places, before, width=0.9, color=BEFORE, label=since)
    axes.bar(places, now, width=0.5, color=NOW, label=title)
    for place, share in zip(places, now, strict=True):
        axes.annotate(f"{share:.1f}", (place, max(share, 0.01)), ha="center", va="bottom", fontsize=7)
    axes.set_yscale("log")
    axes.set_ylim(0.01, 150)
    axes.set_xticks(places, P_LABELS, fontsize=8)
    axes.set_xlabel("probability that the model gives the token")
    axes.set_ylabel("% of the probe's supervised tokens")
    axes.set_title(_wrapped(f"Token probabilities under {weighting}"), fontsize=10)
    axes.legend(loc="upper left", fontsize=8, frameon=False)
    return figure


def draw_weights(tally: Tally, title: str) -> "Figure":
    """Where the weight is: by p (and as a density of weight and p), and by token class."""
    figure = blank(10, 6)
    grid = figure.add_gridspec(2, 2, width_ratios=(2, 1), height_ratios=(1, 1.6))
    over = plain(figure.add_subplot(grid[0, 0]))
    density = plain(figure.add_subplot(grid[1, 0], sharex=over))
    classes = plain(figure.add_subplot(grid[:, 1]))
    places = np.arange(len(P_LABELS))
    over.bar(places - 0.2, tally.shares(), width=0.4, color=BEFORE, label="of the tokens")
    over.bar(places + 0.2, percent(tally.weight_by_p), width=0.4, color=NOW, label="of the total weight")
    over.set_ylabel("%", fontsize=9)
    over.tick_params(labelbottom=False)
    over.legend(loc="best", fontsize=8, frameon=False)
    over.set_title(_wrapped(title), fontsize=10, loc="left")
    _density(density, tally.density)
    density.set_xticks(places, P_LABELS, fontsize=7)
    rows = np.arange(len(CLASSES))
    classes.barh(rows - 0.2, percent(tally.by_class[:, 0]), height=0.4, color=BEFORE, label="of the tokens")
    classes.barh(rows + 0.2, percent(tally.by_class[:, 1]), height=0.4, color=NOW, label="of the total weight")
    classes.set_yticks(rows, CLASSES, fontsize=8)
    classes.invert_yaxis()
    classes.set_xlabel("% by token class", fontsize=9)
    return figure


def _density(axes: "Axes", density: Tensor) -> None:
    """Per cent of the tokens in each bin of weight and p, in colours on a logarithmic scale."""
    from matplotlib.colors import LogNorm

    shares = (100.0 * density / density.sum().clamp(min=1)).numpy()
    cells = np.ma.masked_less_equal(shares, 0.0)
    edges = (np.arange(shares.shape[1] + 1) - 0.5, np.arange(shares.shape[0] + 1) - 0.5)
    mesh = axes.pcolormesh(*edges, cells, norm=LogNorm(0.01, 100.0), cmap="viridis_r")
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.01, fraction=0.04)
    bar.set_label("% of the tokens", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    axes.set_yticks(edges[1][:-1], WEIGHT_LABELS, fontsize=7)
    axes.set_ylabel("weight (lower edge of the bin)", fontsize=9)
    axes.set_xlabel("probability that the model gives the token", fontsize=9)


def draw_pushes(up: list[Push], down: list[Push], texts: Sequence[str], title: str) -> "Figure":
    """Mean change of log p of the tokens pushed most, with 95 % intervals and numbers of places."""
    shown = [*up, *reversed(down)]
    figure = blank(7, max(2.0, 0.24 * len(shown) + 1.2))
    axes = plain(figure.add_subplot())
    rows = np.arange(len(shown))
    axes.barh(
        rows,
        [push.mean for push in shown],
        xerr=[push.half_width for push in shown],
        color=[NOW if push.mean > 0 else DOWN for push in shown],
        error_kw={"lw": 1, "ecolor": "#444444"},
    )
    labels = [f"{drawable(visible(texts[push.token]))}  ({push.count}×)" for push in shown]
    axes.set_yticks(rows, labels, fontsize=8, family="monospace", parse_math=False)
    axes.invert_yaxis()
    axes.axvline(0.0, color="#444444", lw=0.8)
    axes.set_xlabel("mean change of log p in nats, with its 95 % interval", fontsize=9)
    axes.set_title(title, fontsize=10, loc="left")
    return figure


def draw_calibration(calibration: Tensor, title: str) -> "Figure":
    """How often the likeliest token is right, against its probability; and how many tokens there are of each."""
    figure = blank(5, 5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for axes in (plain(upper), plain(lower)):
        axes.set_xlim(0.0, 1.0)
    tokens, confidence, right = (column.numpy() for column in calibration.unbind(1))
    some, middles = tokens > 0, np.array(CONFIDENCE_EDGES[:-1]) + 0.05
    upper.plot([0, 1], [0, 1], color="#888888", lw=1, ls="--", label="calibrated")
    upper.plot(confidence[some] / tokens[some], right[some] / tokens[some], "o-", color=NOW, ms=4, label="the model")
    upper.set_ylim(0.0, 1.0)
    upper.set_ylabel("share in which it is the given token", fontsize=9)
    upper.legend(loc="upper left", fontsize=8, frameon=False)
    error = calibration_error(calibration) if some.any() else float("nan")
    upper.set_title(f"{title}, calibration error {error:.3f}", fontsize=10, loc="left")
    lower.bar(middles, percent(calibration[:, 0]), width=0.09, color=BEFORE)
    lower.set_ylabel("% of tokens", fontsize=9)
    lower.set_xlabel("probability of the likeliest token", fontsize=9)
    return figure


def draw_positions(before: Tensor, now: Tensor, title: str, since: str) -> "Figure":
    """Loss and p by position in the response, each (13, 3) as in `Tally`."""
    figure = blank(9, 3.6)
    left, right = figure.subplots(1, 2)
    for axes, column, name in ((plain(left), 1, "−log p in nats"), (plain(right), 2, "mean p")):
        for sums, colour, label in ((before, "#8a909c", since), (now, NOW, title)):
            some = (sums[:, 0] > 0).numpy()
            means = (sums[:, column] / sums[:, 0].clamp(min=1)).numpy()
            axes.plot(np.flatnonzero(some), means[some], "o-", color=colour, ms=4, label=label)
        axes.set_ylabel(name, fontsize=9)
        axes.set_xlabel("position in the response", fontsize=9)
        last = int(np.flatnonzero((now[:, 0] > 0).numpy()).max(initial=1))
        axes.set_xticks(range(last + 1), POSITION_LABELS[: last + 1], fontsize=7, rotation=45)
        axes.set_ylim(bottom=0.0)
    right.legend(loc="lower right", fontsize=8, frameon=False)
    return figure
