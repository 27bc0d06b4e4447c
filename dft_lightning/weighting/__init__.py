"""Token weightings: what each supervised token is worth."""

from dft_lightning.weighting.base import Source, TokenStats, TokenTarget, TokenWeighting
from dft_lightning.weighting.likelihood import DFT, Uniform
from dft_lightning.weighting.reference import ImportanceWeighted

__all__ = ["DFT", "ImportanceWeighted", "Source", "TokenStats", "TokenTarget", "TokenWeighting", "Uniform"]
