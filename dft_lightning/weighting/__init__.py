"""Token weightings: what each supervised token is worth."""

from dft_lightning.weighting.base import Source, TokenStats, TokenTarget, TokenWeighting
from dft_lightning.weighting.likelihood import DFT, Uniform
from dft_lightning.weighting.reference import ImportanceWeighted
from dft_lightning.weighting.vocabulary import ASFT, GEM, GIFT, EntropyBonus, LabelSmoothing

__all__ = [
    "ASFT",
    "DFT",
    "GEM",
    "GIFT",
    "EntropyBonus",
    "ImportanceWeighted",
    "LabelSmoothing",
    "Source",
    "TokenStats",
    "TokenTarget",
    "TokenWeighting",
    "Uniform",
]
