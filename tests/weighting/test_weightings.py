"""Values, gradients and identities of the weightings, in float64."""

import math

import pytest
import torch

from dft_lightning.weighting import (
    DFT,
    ImportanceWeighted,
    MixCE,
    Power,
    ProFit,
    Thresholded,
    TokenStats,
    TokenWeighting,
    Uniform,
)
from dft_lightning.weighting.base import checked_weights


def stats(p, **brought):
    logp = torch.tensor(p, dtype=torch.float64).log()
    sequence = brought.pop("sequence", torch.zeros(len(p), dtype=torch.long))
    return TokenStats(logp=logp, target=torch.zeros(len(p), dtype=torch.long), sequence=sequence, **brought)


def test_golden_values():
    tokens = stats([0.9, 0.05, 1e-30])
    assert Uniform().weights(tokens).tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(DFT().weights(tokens), torch.tensor([0.9, 0.05, 1e-30], dtype=torch.float64))
    torch.testing.assert_close(DFT(floor=0.1).weights(tokens), torch.tensor([0.9, 0.1, 0.1], dtype=torch.float64))


def test_importance_weights_by_hand():
    """Two responses: log-ratios (log 2, log 8) with mean log 4, and (log ½,) alone."""
    tokens = stats(
        [0.2, 0.8, 0.1],
        sequence=torch.tensor([5, 5, 2]),
        ref_logp=torch.tensor([0.1, 0.1, 0.2], dtype=torch.float64).log(),
    )
    torch.testing.assert_close(ImportanceWeighted().weights(tokens), torch.tensor([4.0, 4.0, 0.5]).double())
    token = ImportanceWeighted(level="token")
    torch.testing.assert_close(token.weights(tokens), torch.tensor([1.8, 1.8, 0.5]).double())
    half = ImportanceWeighted(temperature=0.5, clip=(0.0, 1.5))
    torch.testing.assert_close(half.weights(tokens), torch.tensor([1.5, 1.5, math.sqrt(0.5)]).double())
    capped = stats([1.0], ref_logp=torch.tensor([-30.0]).double())
    assert ImportanceWeighted().weights(capped).item() == 16.0


def test_importance_weight_is_exactly_one_while_the_model_is_its_reference():
    logp = -torch.rand(50).float() * 20
    tokens = TokenStats(logp=logp, target=torch.zeros(50), sequence=torch.arange(50) // 7, ref_logp=logp.clone())
    for level in ("sequence", "token"):
        assert torch.equal(ImportanceWeighted(level=level).weights(tokens), torch.ones(50))


@pytest.mark.parametrize("weighting", [Uniform(), DFT(), DFT(floor=0.1), ImportanceWeighted(level="token")], ids=repr)
def test_the_weight_is_minus_the_derivative_of_the_loss_it_stands_for(weighting):
    """w = −∂L/∂log p by autograd, L the undetached objective of each, for p from 1e-30 to 1."""
    logp = torch.tensor([-69.0, -10.0, -2.5, -1.0, -0.01, 0.0], dtype=torch.float64, requires_grad=True)
    ref = torch.full_like(logp, -1.2).detach()
    p = logp.exp()
    objective = {
        Uniform(): -logp,
        DFT(): 1 - p,
        DFT(floor=0.1): torch.where(p > 0.1, 0.1 - p, -0.1 * logp),
        ImportanceWeighted(level="token"): torch.where(
            p / ref.exp() > 1.8, -1.8 * logp, torch.where(p / ref.exp() < 0.2, -0.2 * logp, -p / ref.exp())
        ),
    }[weighting]
    expected = -torch.autograd.grad(objective.sum(), logp)[0]
    tokens = TokenStats(logp=logp.detach(), target=torch.zeros(6), sequence=torch.zeros(6), ref_logp=ref)
    torch.testing.assert_close(weighting.weights(tokens), expected, rtol=1e-12, atol=0)


def test_scopes_and_monitors():
    assert (Uniform().scope, DFT().scope) == ("token", "token")
    assert (ImportanceWeighted().scope, ImportanceWeighted(level="token").scope) == ("sequence", "token")
    assert Uniform().monitor == ("val/nll", "min")
    assert DFT().monitor == ("val/p_mean", "max")  # never −p·log p, by which a collapsed model looks best


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DFT(floor=-0.1), r"DFT.floor is -0.1; expected a number from 0 to 1"),
        (lambda: DFT(floor=float("nan")), "DFT.floor is nan"),
        (lambda: ImportanceWeighted(level="word"), "level is 'word'"),
        (lambda: ImportanceWeighted(clip=(2.0, 1.0)), "expected 0 <= smallest <= largest"),
    ],
)
def test_bad_fields_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_missing_statistic_is_named():
    with pytest.raises(ValueError, match="no 'ref_logp' here: name it"):
        ImportanceWeighted().weights(stats([0.5]))


def test_stats_pick_and_join():
    tokens = stats([0.1, 0.2, 0.3], position=torch.arange(3))
    back = TokenStats.concatenate([tokens[:1], tokens[1:]])
    assert torch.equal(back.logp, tokens.logp)
    assert torch.equal(back.position, tokens.position)
    assert len(tokens[torch.tensor([True, False, True])]) == 2


def test_weights_come_detached_and_in_full_precision():
    class Half(TokenWeighting):
        def weights(self, tokens):
            return tokens.p.half()

    assert checked_weights(Half(), stats([0.5])).dtype == torch.float64


CLIMBS_P, DESCENDS_NLL = ("val/p_mean", "max"), ("val/nll", "min")


@pytest.mark.parametrize(
    ("weighting", "monitor"),
    [
        (MixCE(0.0), CLIMBS_P),
        (MixCE(0.49), CLIMBS_P),
        (MixCE(0.5), DESCENDS_NLL),
        (MixCE(0.75), DESCENDS_NLL),
        (Power(0.0), DESCENDS_NLL),
        (Power(0.49), DESCENDS_NLL),
        (Power(0.5), CLIMBS_P),
        (Power(0.75), CLIMBS_P),
        (Power(10.0), CLIMBS_P),
        *[(ProFit(keep=keep), CLIMBS_P) for keep in ("higher", "middle")],
        (ProFit(keep="lower"), DESCENDS_NLL),
        (Thresholded(0.5), CLIMBS_P),
        (Thresholded(0.5, keep="bottom"), CLIMBS_P),
        (Thresholded(0.5, "logp"), CLIMBS_P),
        (Thresholded(0.5, "logp", "bottom"), DESCENDS_NLL),
    ],
    ids=repr,
)
def test_the_monitor_is_what_most_of_the_weight_is_on(weighting, monitor):
    """p where likely tokens count most, else the likelihood of all."""
    assert weighting.monitor == monitor
