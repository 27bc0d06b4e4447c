"""Weightings around others that would drop what is in them, and targets that would never be asked for."""

from dataclasses import dataclass

import pytest
import torch

from dft_lightning.weighting import DFT, GEM, Mixed, Renormalized, Thresholded, TokenTarget, TokenWeighting, Uniform
from dft_lightning.weighting.composition import held, nested
from dft_lightning.weighting.proof import prove


@dataclass(frozen=True)
class Twice(TokenWeighting):
    """A wrapper that knows of weights only."""

    of: TokenWeighting

    def weights(self, tokens):
        return 2 * self.of.weights(tokens)


@dataclass(frozen=True)
class Forgetful(TokenWeighting):
    """Targets, but no `vocabulary`."""

    def weights(self, tokens):
        return tokens.p

    def targets(self, tokens, logp, ref_logp):
        return logp.exp()


@dataclass(frozen=True)
class Zeroing(TokenTarget):
    """Changes what it is given."""

    def targets(self, tokens, logp, ref_logp):
        tokens.logp.zero_()
        return torch.ones_like(logp)


@dataclass(frozen=True)
class Signed(TokenWeighting):
    """Below zero for unlikely tokens."""

    divisor = "weights"

    def weights(self, tokens):
        return tokens.p - 0.5


@pytest.mark.parametrize(
    ("weighting", "said"),
    [
        (Twice(GEM()), "GEM inside Twice would lose its targets"),
        (Twice(Renormalized(DFT())), "Renormalized inside Twice would lose its divisor"),
        (Twice(Thresholded(0.1)), "Thresholded inside Twice would lose its divisor"),
        (Mixed(Twice(Twice(GEM()))), "GEM inside Twice would lose its targets"),
        (Forgetful(), "only a TokenTarget or a Modifier is asked for"),
        (Zeroing(), "changes the tensors it is given"),
        (Signed(), "divides by the sum of its weights, and one is negative"),
    ],
    ids=repr,
)
def test_refused(weighting, said):
    with pytest.raises(ValueError, match=said):
        prove(weighting)


def test_a_wrapper_of_plain_weights_is_taken():
    prove(Twice(DFT()))
    prove(Mixed(Twice(Uniform())))


@dataclass(frozen=True)
class Several(TokenWeighting):
    """Parts in a tuple, and other fields."""

    parts: tuple[TokenWeighting, ...]
    share: float = 0.5

    def weights(self, tokens):
        return tokens.p


def test_all_that_a_weighting_is_made_of():
    inner = Twice(Uniform())
    whole = Several((Mixed(DFT(0.1), inner), GEM()))
    assert held(whole) == [Mixed(DFT(0.1), inner), GEM()]
    assert list(nested(whole)) == [whole, Mixed(DFT(0.1), inner), DFT(0.1), inner, Uniform(), GEM()]
    assert (held(DFT()), list(nested(DFT()))) == ([], [DFT()])
    bare = type("Bare", (TokenWeighting,), {"weights": lambda self, tokens: tokens.p})()
    assert (held(bare), list(nested(bare))) == ([], [bare])
