"""Token weightings: what each supervised token is worth."""

from dft_lightning.weighting.adaptive import TALR, Cayley, InfoSFT
from dft_lightning.weighting.base import Source, TokenStats, TokenTarget, TokenWeighting
from dft_lightning.weighting.distribution import DEFT, EAFT, SRFT
from dft_lightning.weighting.likelihood import (
    CHORD,
    DFT,
    LUFFY,
    Focal,
    MixCE,
    Power,
    Uniform,
)
from dft_lightning.weighting.mixing import Mixed, WarmUp
from dft_lightning.weighting.modifiers import Bounded, DataWeighted, Exempt, Raised, Renormalized
from dft_lightning.weighting.reference import PSFT, ImportanceWeighted, Rho1
from dft_lightning.weighting.selection import ProFit, Thresholded
from dft_lightning.weighting.sentence import CADFT, SentenceDFT
from dft_lightning.weighting.vocabulary import ASFT, GEM, GIFT, EntropyBonus, LabelSmoothing

__all__ = [
    "ASFT",
    "CADFT",
    "CHORD",
    "DEFT",
    "DFT",
    "EAFT",
    "GEM",
    "GIFT",
    "LUFFY",
    "PSFT",
    "SRFT",
    "TALR",
    "Bounded",
    "Cayley",
    "DataWeighted",
    "EntropyBonus",
    "Exempt",
    "Focal",
    "ImportanceWeighted",
    "InfoSFT",
    "LabelSmoothing",
    "MixCE",
    "Mixed",
    "Power",
    "ProFit",
    "Raised",
    "Renormalized",
    "Rho1",
    "SentenceDFT",
    "Source",
    "Thresholded",
    "TokenStats",
    "TokenTarget",
    "TokenWeighting",
    "Uniform",
    "WarmUp",
]
