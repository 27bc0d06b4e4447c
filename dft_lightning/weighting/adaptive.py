"""Weightings that are functions of p, set by what the tokens of the whole optimizer step look like."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dft_lightning.weighting.base import Divisor, Scope, Source, TokenStats, TokenWeighting
from dft_lightning.weighting.fields import expect
from dft_lightning.weighting.likelihood import CLIMBS_P, missing
from dft_lightning.weighting.sentence import sequence_means


@dataclass(frozen=True)
class TALR(TokenWeighting):
    """w = max(p^(1/τ), w_min), τ the median over the step's responses of their mean ℓ = −log p.

    Lin et al., "SFT Doesn't Always Hurt General Capabilities: Revisiting Domain-Specific Fine-Tuning in LLMs",
    arXiv 2509.20758: hard tokens are held back the more, the easier the batch is on the whole. Known from others'
    implementations only, where the median is that of the micro-batch; here it is of the whole optimizer step. Between
    two middle responses the median is their mean.

    Args:
        w_min: smallest weight a token can have, in [0, 1].
    """

    w_min: float = 0.01

    scope: ClassVar[Scope] = "step"
    monitor = CLIMBS_P
    formula = "max(p^(1/τ), w_min), τ: median of the responses' mean −log p"
    source = Source(
        "Lin et al.",
        "SFT Doesn't Always Hurt General Capabilities: Revisiting Domain-Specific Fine-Tuning in LLMs",
        "2509.20758",
        note="the median is of the whole optimizer step, not of the micro-batch",
        third=True,
    )

    def __post_init__(self) -> None:
        expect(0.0 <= self.w_min <= 1.0, "TALR.w_min", self.w_min, "a number from 0 to 1")

    def weights(self, tokens: TokenStats) -> Tensor:
        mean, _ = sequence_means(tokens, -tokens.logp)
        tau = mean.quantile(0.5).clamp(min=1e-6)
        return (tokens.logp / tau).exp().clamp(min=self.w_min)


@dataclass(frozen=True)
class InfoSFT(TokenWeighting):
    """w = p·max(0, logit p_bar − logit p), divided by its mean over the step: most for tokens half known.

    Sabbaghi et al., "InfoSFT: Learn More and Forget Less with Information-Aware Token Weighting", arXiv 2605.14967.
    Known from another's implementation only, which divides by the mean of the micro-batch; here it is that of the
    whole optimizer step. The weights as reported are those before the division.

    Args:
        p_bar: above this probability a token has weight 0; strictly between 0 and 1.
    """

    p_bar: float = 0.93

    divisor: ClassVar[Divisor] = "weights"
    monitor = CLIMBS_P
    formula = "p·max(0, logit p_bar − logit p), over its mean"
    source = Source(
        "Sabbaghi et al.",
        "InfoSFT: Learn More and Forget Less with Information-Aware Token Weighting",
        "2605.14967",
        note="divided by the mean weight of the whole optimizer step, not of the micro-batch",
        third=True,
    )

    def __post_init__(self) -> None:
        expect(0.0 < self.p_bar < 1.0, "InfoSFT.p_bar", self.p_bar, "a number between 0 and 1, both excluded")

    def weights(self, tokens: TokenStats) -> Tensor:
        highest = math.log(self.p_bar) - math.log1p(-self.p_bar)
        logit = tokens.logp - missing(tokens).log()  # +inf at p = 1
        return tokens.p * (highest - logit).clamp(min=0)


@dataclass(frozen=True)
class Cayley(TokenWeighting):
    """w = p^a, a = clamp(a0 + (1 − a0)·p/(2 − p), 0.001, 1), a0 half the mean p of the step.

    The gradient of (1 − p^a)/a with a detached. The second objective in the code of Wang et al., "Gradients Must Earn
    Their Influence: Unifying SFT with Generalized Entropic Objectives", arXiv 2602.11424. Their mean is that of the
    micro-batch on one rank; here it is of the whole optimizer step.
    """

    scope: ClassVar[Scope] = "step"
    monitor = CLIMBS_P
    formula = "p^a, a = a0 + (1 − a0)·p/(2 − p), a0: half the mean p"
    source = Source(
        "Wang et al.",
        "Gradients Must Earn Their Influence: Unifying SFT with Generalized Entropic Objectives",
        "2602.11424",
        place="Cayley_Trans in main_verl/trainer/fsdp_sft_trainer.py of luludus/DEFT",
        note="the mean p is of the whole optimizer step, not of the micro-batch; without their 1e-8 in the divisor",
    )

    def weights(self, tokens: TokenStats) -> Tensor:
        p = tokens.p
        lowest = 0.5 * p.mean()
        power = (lowest + (1.0 - lowest) * p / (2.0 - p)).clamp(0.001, 1.0)
        return torch.exp(power * tokens.logp)
