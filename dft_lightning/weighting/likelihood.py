"""Weightings that are functions of the target's probability p alone."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dft_lightning.weighting.base import Source, TokenStats, TokenWeighting
from dft_lightning.weighting.fields import expect

Monitor = tuple[str, Literal["min", "max"]]

#: For objectives that climb a bounded function of p, under which plain NLL may rise while all goes well.
CLIMBS_P: Monitor = ("val/p_mean", "max")
DESCENDS_NLL: Monitor = TokenWeighting.monitor

BEYOND = "Beyond Log Likelihood: Probability-Based Objectives for Supervised Fine-Tuning across the Model Capability"
BEYOND += " Continuum"


def missing(tokens: TokenStats) -> Tensor:
    """1 − p (N,), exact also where p rounds to 1, and never below 0."""
    return (-torch.expm1(tokens.logp)).clamp(min=0)


@dataclass(frozen=True)
class Uniform(TokenWeighting):
    """w = 1: supervised fine-tuning, the plain negative log-likelihood."""

    formula = "1"

    def weights(self, tokens: TokenStats) -> Tensor:
        return torch.ones_like(tokens.logp)


@dataclass(frozen=True)
class DFT(TokenWeighting):
    """w = max(p, floor): Dynamic Fine-Tuning; with floor 0 its gradient is that of Σ(1 − p).

    Wu et al., "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification",
    arXiv 2508.05629, equation 9. The floor is from the authors' earlier code, who advise 0.1 where tokens get
    ignored, such as a stop token to which the base model gives next to no probability.

    Args:
        floor: smallest weight a token can have, in [0, 1]; 0 is the paper's objective.
    """

    floor: float = 0.0

    monitor = CLIMBS_P
    formula = "max(p, floor)"
    source = Source(
        "Wu et al.",
        "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification",
        "2508.05629",
        place="equation 9",
        note="the floor is from the authors' earlier code; 0, as in the paper, is the default",
    )

    def __post_init__(self) -> None:
        expect(0.0 <= self.floor <= 1.0, "DFT.floor", self.floor, "a number from 0 to 1")

    def weights(self, tokens: TokenStats) -> Tensor:
        return tokens.p.clamp(min=self.floor)


@dataclass(frozen=True)
class MixCE(TokenWeighting):
    """w = eta + (1 − eta)·p: forward and reverse cross-entropy mixed; eta 0 is DFT, 1 is SFT.

    Zhang et al., "MixCE: Training Autoregressive Language Models by Mixing Forward and Reverse Cross-Entropies",
    ACL 2023, arXiv 2305.16958. Its reverse part is the authors' approximation, the model's own p as a detached weight
    on the data's tokens, two years before DFT.

    Args:
        eta: share of plain cross-entropy, in [0, 1]. The authors tune it on each data set: there is no one default.
    """

    eta: float = 0.5

    formula = "eta + (1 − eta)·p"
    source = Source(
        "Zhang et al.",
        "MixCE: Training Autoregressive Language Models by Mixing Forward and Reverse Cross-Entropies",
        "2305.16958",
        place="bloomberg/MixCE-acl2023",
        note="eta is tuned on each data set; 0.5 here is no published default",
    )

    def __post_init__(self) -> None:
        expect(0.0 <= self.eta <= 1.0, "MixCE.eta", self.eta, "a number from 0 to 1")

    @property
    def monitor(self) -> Monitor:  # type: ignore[override]  # decided by a field
        return CLIMBS_P if self.eta < 0.5 else DESCENDS_NLL

    def weights(self, tokens: TokenStats) -> Tensor:
        return self.eta + (1.0 - self.eta) * tokens.p


@dataclass(frozen=True)
class Power(TokenWeighting):
    """w = p^alpha: the gradient of (1 − p^alpha)/alpha; alpha 0 is SFT, 1 is DFT.

    Li et al., "Beyond Log Likelihood: Probability-Based Objectives for Supervised Fine-Tuning across the Model
    Capability Continuum", arXiv 2510.00526: a large alpha leans on what a capable model knows already (the authors
    use 8 and 10), a small one on the data.

    Args:
        alpha: the exponent, at least 0.
    """

    alpha: float = 10.0

    formula = "p^alpha"
    source = Source(
        "Li et al.",
        BEYOND,
        "2510.00526",
        place="GeneralFamily in main_verl/trainer/fsdp_sft_trainer.py of GaotangLi/Beyond-Log-Likelihood",
        note="their code divides by alpha, and so cannot take 0, which is SFT here",
    )

    def __post_init__(self) -> None:
        expect(0.0 <= self.alpha < math.inf, "Power.alpha", self.alpha, "a number of at least 0")

    @property
    def monitor(self) -> Monitor:  # type: ignore[override]  # decided by a field
        return CLIMBS_P if self.alpha >= 0.5 else DESCENDS_NLL

    def weights(self, tokens: TokenStats) -> Tensor:
        return (self.alpha * tokens.logp).exp()


@dataclass(frozen=True)
class CHORD(TokenWeighting):
    """w = p·(1 − p): most for tokens the model is in two minds about, none for the certain and the impossible.

    φ of Zhang et al., "On-Policy RL Meets Off-Policy Experts: Harmonizing Supervised Fine-Tuning and Reinforcement
    Learning via Dynamic Weighting", arXiv 2508.11408: the weight of its expert data. The mixture with a loss on the
    policy's own samples, which μ schedules there, is no part of this.
    """

    monitor = CLIMBS_P
    formula = "p·(1 − p)"
    source = Source(
        "Zhang et al.",
        "On-Policy RL Meets Off-Policy Experts: Harmonizing Supervised Fine-Tuning and Reinforcement Learning via "
        "Dynamic Weighting",
        "2508.11408",
        place="CHORD-φ",
        note="the supervised part alone, without the mixture with reinforcement learning",
    )

    def weights(self, tokens: TokenStats) -> Tensor:
        return tokens.p * missing(tokens)


@dataclass(frozen=True)
class LUFFY(TokenWeighting):
    """w = gamma·p/(p + gamma)²: the gradient of −p/(p + gamma), largest (1/4) at p = gamma.

    Policy shaping of Yan et al., "Learning to Reason under Off-Policy Guidance", arXiv 2504.14945, for demonstrations
    whose own policy is taken as 1 and whose advantage is 1: unlikely tokens that decide get more than DFT gives them.

    Args:
        gamma: where the weight is largest, above 0.
    """

    gamma: float = 0.1

    monitor = CLIMBS_P
    formula = "gamma·p/(p + gamma)²"
    source = Source(
        "Yan et al.",
        "Learning to Reason under Off-Policy Guidance",
        "2504.14945",
        place="policy shaping",
        note="its off-policy part alone, at advantage 1",
    )

    def __post_init__(self) -> None:
        expect(0.0 < self.gamma < math.inf, "LUFFY.gamma", self.gamma, "a number above 0")

    def weights(self, tokens: TokenStats) -> Tensor:
        p = tokens.p
        return self.gamma * p / (p + self.gamma).square()


@dataclass(frozen=True)
class Focal(TokenWeighting):
    """w = (1 − p)^gamma·(1 − gamma·p·log p/(1 − p)): the gradient of the focal loss −(1 − p)^gamma·log p.

    Lin et al., "Focal Loss for Dense Object Detection", arXiv 1708.02002, equation 4: what is right already counts
    less, the opposite of DFT. In the paper the factor is differentiated, too; many language-model trainers detach it.

    Args:
        gamma: the exponent, at least 0; 0 is SFT.
        detached: w = (1 − p)^gamma, the factor as a mere weight.
    """

    gamma: float = 2.0
    detached: bool = False

    formula = "(1 − p)^gamma − gamma·p·(1 − p)^(gamma−1)·log p; detached: (1 − p)^gamma"
    source = Source(
        "Lin et al.",
        "Focal Loss for Dense Object Detection",
        "1708.02002",
        place="equation 4",
        note="the factor is differentiated, as in the paper; detached=true for trainers that do not",
    )

    def __post_init__(self) -> None:
        expect(0.0 <= self.gamma < math.inf, "Focal.gamma", self.gamma, "a number of at least 0")

    def weights(self, tokens: TokenStats) -> Tensor:
        rest = missing(tokens)
        factor = rest**self.gamma
        if self.detached:
            return factor
        ratio = torch.where(rest > 0, tokens.logp / rest, -1.0)  # log p/(1 − p) → −1 as p → 1
        return factor * (1.0 - self.gamma * tokens.p * ratio)
