"""Token weightings: what each supervised token is worth."""

from dft_lightning.weighting.base import Source, TokenStats, TokenTarget, TokenWeighting
from dft_lightning.weighting.likelihood import DFT, Uniform
from dft_lightning.weighting.mixing import Mixed, WarmUp
from dft_lightning.weighting.modifiers import Bounded, DataWeighted, Exempt, Raised, Renormalized
from dft_lightning.weighting.reference import ImportanceWeighted

__all__ = [
    "DFT",
    "Bounded",
    "DataWeighted",
    "Exempt",
    "ImportanceWeighted",
    "Mixed",
    "Raised",
    "Renormalized",
    "Source",
    "TokenStats",
    "TokenTarget",
    "TokenWeighting",
    "Uniform",
    "WarmUp",
]
