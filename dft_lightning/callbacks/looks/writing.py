"""What goes to TensorBoard beside the pictures: scalars, histograms, and the layout of the page of custom scalars."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dft_lightning.callbacks.looks.tally import (
    ENTROPY_EDGES,
    P_EDGES,
    P_LABELS,
    POSITION_LABELS,
    RANK_EDGES,
    WEIGHT_EDGES,
    Tally,
    percent,
)
from dft_lightning.token_classes import CLASSES

#: The page "Custom scalars": chapters, their charts, and the tags (regular expressions) in each.
LAYOUT: dict[str, dict[str, list[Any]]] = {
    "1 What training does": {
        "objective and NLL": ["Multiline", ["train/objective$", "train/nll$", "val/nll$", "probe/nll$"]],
        "mean p": ["Multiline", ["train/p_mean$", "val/p_mean$", "probe/p_mean$"]],
        "% of the probe's tokens by p": ["Multiline", ["probe_p_bins/.*"]],
        "KL to the initial model": ["Multiline", ["probe/kl_initial$"]],
    },
    "2 Where the weight goes": {
        "mean weight and effective sample size": ["Multiline", ["train/weight_mean$", "train/effective_sample_size$"]],
        "% of the weight by p": ["Multiline", ["trained_weight_by_p/.*"]],
        "% of the weight by token class": ["Multiline", ["trained_weight_by_class/.*"]],
        "mean p by token class": ["Multiline", ["probe_p_by_class/.*"]],
    },
    "3 What becomes of the distribution": {
        "entropy": ["Multiline", ["probe/entropy_mean$", "trained/entropy_mean$"]],
        "top-1, top-5 and P(stop)": ["Multiline", ["probe/top1$", "probe/top5$", "probe/p_stop$"]],
        "calibration error": ["Multiline", ["probe/calibration_error$", "trained/calibration_error$"]],
        "NLL by position": ["Multiline", ["probe_nll_by_position/.*"]],
    },
    "4 How it runs": {
        "gradient norm": ["Multiline", ["train/grad_norm$"]],
        "learning rate": ["Multiline", ["train/lr$"]],
        "tokens a second": ["Multiline", ["throughput/tokens_per_second$"]],
    },
}
_HISTOGRAMS = {"p": P_EDGES, "weight": WEIGHT_EDGES, "entropy": ENTROPY_EDGES, "rank": RANK_EDGES}


def write(writer: Any, name: str, tally: Tally, step: int) -> None:
    """Scalars, shares by p, class and position, and histograms, to a TensorBoard writer."""
    for key, value in tally.scalars().items():
        writer.add_scalar(f"{name}/{key}", value, step)
    for tag, value in _by_bin(name, tally).items():
        writer.add_scalar(tag, value, step)
    for key, edges in _HISTOGRAMS.items():
        counts = getattr(tally, key)
        if counts.sum() > 0:
            _write_histogram(writer, f"{name}_histograms/{key}", edges, counts, step)


def _by_bin(name: str, tally: Tally) -> dict[str, float]:
    """Values by tag; of a bin without tokens there is no mean."""
    found = {f"{name}_p_bins/{_numbered(P_LABELS, n)}": share for n, share in enumerate(tally.shares())}
    if tally.weight_by_p.sum() > 0:
        shares = percent(tally.weight_by_p)
        found |= {f"{name}_weight_by_p/{_numbered(P_LABELS, n)}": share for n, share in enumerate(shares)}
    tokens, weight, p = tally.by_class.unbind(1)
    if weight.sum() > 0:
        shares = percent(weight)
        found |= {f"{name}_weight_by_class/{label}": share for label, share in zip(CLASSES, shares, strict=True)}
    for n in torch.nonzero(tokens).flatten().tolist():
        found[f"{name}_p_by_class/{CLASSES[n]}"] = float(p[n] / tokens[n])
    tokens, nll, p = tally.by_position.unbind(1)
    for n in torch.nonzero(tokens).flatten().tolist():
        found[f"{name}_nll_by_position/{_numbered(POSITION_LABELS, n)}"] = float(nll[n] / tokens[n])
        found[f"{name}_p_by_position/{_numbered(POSITION_LABELS, n)}"] = float(p[n] / tokens[n])
    return found


def _numbered(labels: tuple[str, ...], number: int) -> str:
    """So that TensorBoard, which sorts by name, keeps the order."""
    return f"{number:02d} {labels[number]}"


def _write_histogram(writer: Any, tag: str, edges: tuple[float, ...], counts: Tensor, step: int) -> None:
    middles = torch.tensor([(low + high) / 2 for low, high in pairwise(edges)], dtype=torch.float64)
    writer.add_histogram_raw(
        tag,
        min=edges[0],
        max=edges[-1],
        num=int(counts.sum()),
        sum=float((counts * middles).sum()),
        sum_squares=float((counts * middles.square()).sum()),
        bucket_limits=list(edges[1:]),
        bucket_counts=counts.tolist(),
        global_step=step,
    )
