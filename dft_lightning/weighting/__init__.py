"""Token weightings: what each supervised token is worth."""

from dft_lightning.weighting.base import TokenStats, TokenWeighting
from dft_lightning.weighting.likelihood import DFT, Uniform
from dft_lightning.weighting.reference import ImportanceWeighted

__all__ = ["DFT", "ImportanceWeighted", "TokenStats", "TokenWeighting", "Uniform"]
