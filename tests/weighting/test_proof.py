"""A weighting that looks further than it says is refused at the start."""

from dataclasses import dataclass

import pytest
import torch

from dft_lightning.weighting import DFT, ImportanceWeighted, TokenWeighting, Uniform
from dft_lightning.weighting.proof import prove


@pytest.mark.parametrize(
    "weighting", [Uniform(), DFT(), DFT(0.1), ImportanceWeighted(), ImportanceWeighted(level="token")], ids=repr
)
def test_ours_hold_what_they_declare(weighting):
    prove(weighting)


def weighting(body, declared="token", wants=()):
    @dataclass(frozen=True)
    class Mine(TokenWeighting):
        scope = declared
        needs = frozenset(wants)

        def weights(self, tokens):
            return body(tokens)

    return Mine()


@pytest.mark.parametrize(
    ("mine", "message"),
    [
        (weighting(lambda t: t.p / t.p.mean()), "declare `scope = 'step'`"),
        (weighting(lambda t: t.p / t.p.mean(), "sequence"), "declare `scope = 'step'`"),
        (weighting(lambda t: t.sequence_mean(t.logp).exp()), "declare `scope = 'sequence'`"),
        (weighting(lambda t: t.p.cumsum(0)), "declares scope 'token'"),
        (weighting(lambda t: 1 / (1 - t.p)), "not finite at log p = 0.0"),
        (weighting(lambda t: t.logp.exp_()), "changes the tensors it is given"),
        (weighting(lambda t: t.p.mean()), "expected one weight a token"),
        (weighting(lambda t: t.p, "batch"), "expected one of"),
        (weighting(lambda t: t.p, wants={"entropi"}), "needs names"),
        (weighting(lambda t: t.p * t.need("entropy")), "no 'entropy' here"),
    ],
)
def test_what_cannot_be_trusted_is_refused(mine, message):
    with pytest.raises(ValueError, match=message):
        prove(mine)


def test_wider_scopes_may_be_declared():
    prove(weighting(lambda t: t.p / t.p.mean(), "step"))
    prove(weighting(lambda t: t.sequence_mean(t.logp).exp(), "sequence"))
    prove(weighting(lambda t: t.p * t.need("entropy") * torch.ones_like(t.p), wants={"entropy"}))
