"""Weightings that keep some tokens and leave out others by the target's probability p."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dft_lightning.weighting.base import Divisor, Source, TokenStats, TokenWeighting
from dft_lightning.weighting.fields import expect
from dft_lightning.weighting.likelihood import BEYOND, CLIMBS_P, DESCENDS_NLL, Monitor


@dataclass(frozen=True)
class Thresholded(TokenWeighting):
    """w = p or 1 for tokens above (or below) a threshold, 0 for the others, which are not counted either.

    Li et al., "Beyond Log Likelihood: Probability-Based Objectives for Supervised Fine-Tuning across the Model
    Capability Continuum", arXiv 2510.00526: the study by which its authors tell which tokens an objective lives on.
    As in their code a token at the threshold is kept, and those that are left out leave the denominator.

    Args:
        threshold: q, from 0 to 1; a probability, not a share of the tokens.
        on: the objective on the tokens that are kept: "p" is DFT's, "logp" is SFT's.
        keep: "top" keeps p ≥ q, "bottom" keeps p ≤ q.
    """

    threshold: float
    on: Literal["p", "logp"] = "p"
    keep: Literal["top", "bottom"] = "top"

    divisor: ClassVar[Divisor] = "selected"
    formula = 'p·1[p ≥ threshold]; 1[…] for on="logp", ≤ for keep="bottom"'
    source = Source(
        "Li et al.",
        BEYOND,
        "2510.00526",
        place="OnlyTopP, OnlyBottomP, OnlyTopLogP and OnlyBottomLogP in the authors' trainer",
        note="the threshold is always a probability, for log p, too; tokens left out leave the denominator",
    )

    def __post_init__(self) -> None:
        expect(0.0 <= self.threshold <= 1.0, "Thresholded.threshold", self.threshold, "a probability from 0 to 1")
        expect(self.on in ("p", "logp"), "Thresholded.on", self.on, '"p" or "logp"')
        expect(self.keep in ("top", "bottom"), "Thresholded.keep", self.keep, '"top" or "bottom"')

    @property
    def monitor(self) -> Monitor:  # type: ignore[override]  # decided by fields
        return DESCENDS_NLL if (self.on, self.keep) == ("logp", "bottom") else CLIMBS_P

    def weights(self, tokens: TokenStats) -> Tensor:
        p = tokens.p
        kept = p >= self.threshold if self.keep == "top" else p <= self.threshold
        counted = p.clamp(min=torch.finfo(p.dtype).tiny)  # what is kept is counted, however unlikely
        return kept * (counted if self.on == "p" else torch.ones_like(p))


@dataclass(frozen=True)
class ProFit(TokenWeighting):
    """w = 1 where p is at least the threshold, else 0: unlikely tokens are taken for mere wording, and masked.

    Liu et al., "ProFit: Leveraging High-Value Signals in SFT via Probability-Guided Token Selection",
    arXiv 2601.09195. Its random selection, a baseline, is not offered. The authors' code divides by all supervised
    tokens where the trainer tells it their number, as here, and by the kept ones where it does not; for the latter
    take `Thresholded` with on="logp".

    Args:
        threshold: τ, from 0 to 1.
        keep: "higher" keeps p ≥ τ, "lower" keeps p ≤ τ (their example: 0.8), "middle" keeps τ ≤ p ≤ upper (0.3, 0.7).
        upper: upper end for "middle".
    """

    threshold: float = 0.1
    keep: Literal["higher", "lower", "middle"] = "higher"
    upper: float = 0.7

    formula = '1[p ≥ threshold]; ≤ for "lower", 1[threshold ≤ p ≤ upper] for "middle"'
    source = Source(
        "Liu et al.",
        "ProFit: Leveraging High-Value Signals in SFT via Probability-Guided Token Selection",
        "2601.09195",
        place="src/llamafactory/train/trainer_utils.py of Utaotao/ProFit",
        note="divided by all supervised tokens; their code divides by the kept ones where the number is not known: "
        'Thresholded(threshold, on="logp")',
    )

    def __post_init__(self) -> None:
        expect(0.0 <= self.threshold <= 1.0, "ProFit.threshold", self.threshold, "a probability from 0 to 1")
        choices = ("higher", "lower", "middle")
        expect(self.keep in choices, "ProFit.keep", self.keep, '"higher", "lower" or "middle"')
        if self.keep == "middle":
            expect(self.threshold <= self.upper <= 1.0, "ProFit.upper", self.upper, "threshold <= upper <= 1")

    @property
    def monitor(self) -> Monitor:  # type: ignore[override]  # decided by a field
        return DESCENDS_NLL if self.keep == "lower" else CLIMBS_P

    def weights(self, tokens: TokenStats) -> Tensor:
        p = tokens.p
        kept = p <= self.threshold if self.keep == "lower" else p >= self.threshold
        if self.keep == "middle":
            kept = kept & (p <= self.upper)
        return kept.to(p.dtype)
