"""Values worked out by hand, identities, limits, scopes and refusals of the catalogue's weightings."""

import math
from fractions import Fraction

import pytest
import torch

from dft_lightning.weighting import (
    CADFT,
    CHORD,
    DEFT,
    DFT,
    EAFT,
    LUFFY,
    PSFT,
    SRFT,
    TALR,
    Cayley,
    Focal,
    ImportanceWeighted,
    InfoSFT,
    MixCE,
    Power,
    ProFit,
    Rho1,
    SentenceDFT,
    Thresholded,
    TokenStats,
    Uniform,
)
from dft_lightning.weighting import proof as proof_module
from dft_lightning.weighting.base import checked_weights
from dft_lightning.weighting.proof import prove

CLIMB, DESCEND = ("val/p_mean", "max"), ("val/nll", "min")


def stats(p, sequence=None, **brought):
    """Tokens of these probabilities, all of one response unless told otherwise; `ref` and `old` are probabilities."""
    logp = torch.tensor(p, dtype=torch.float64).log()
    for name in {"ref", "old"} & set(brought):
        brought[f"{name}_logp"] = torch.tensor(brought.pop(name), dtype=torch.float64).log()
    brought = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in brought.items()}
    sequence = torch.zeros(len(p), dtype=torch.long) if sequence is None else torch.tensor(sequence)
    return TokenStats(logp=logp, target=torch.zeros(len(p), dtype=torch.long), sequence=sequence, **brought)


E = math.e
GOLDEN = [
    (MixCE(0.2), stats([0.5, 1e-30]), [0.6, 0.2]),  # .2 + .8·.5
    (Power(2.0), stats([0.3, 1e-30]), [0.09, 1e-60]),
    (Thresholded(0.3), stats([0.2, 0.3, 0.9]), [0, 0.3, 0.9]),  # a token at the threshold is kept
    (Thresholded(0.3, "logp"), stats([0.2, 0.3, 0.9]), [0, 1, 1]),
    (Thresholded(0.3, "p", "bottom"), stats([0.2, 0.3, 0.9]), [0.2, 0.3, 0]),
    (ProFit(), stats([0.09, 0.1, 1e-30]), [0, 1, 0]),
    (ProFit(0.8, "lower"), stats([0.8, 0.81, 1e-30]), [1, 0, 1]),
    (ProFit(0.3, "middle"), stats([0.29, 0.3, 0.7, 0.71]), [0, 1, 1, 0]),
    (CHORD(), stats([0.25, 1.0, 1e-30]), [0.1875, 0, 1e-30]),  # .25·.75
    (LUFFY(), stats([0.1, 0.4, 1e-30]), [0.25, 0.16, 1e-29]),  # .1·.1/.04; .1·.4/.25; p/γ
    (Focal(), stats([0.5, 1.0, 1e-30]), [0.25 + 0.5 * math.log(2), 0, 1]),  # (1−p)² + 2·p·(1−p)·log 2
    (Focal(0.5), stats([1.0]), [0]),  # √(1 − p)·1.5 → 0, not 0·∞
    (Focal(3.0, detached=True), stats([0.5, 1.0, 1e-30]), [0.125, 0, 1]),
    # mean −log p of the responses: 1, 3, 2 (of e⁻¹ and e⁻³); median 2: w = √p, at least .01
    (TALR(), stats([E**-1, E**-3, E**-1, E**-3], [0, 1, 2, 2]), [E**-0.5, E**-1.5, E**-0.5, E**-1.5]),
    (TALR(0.2), stats([E**-1, E**-3, E**-1, E**-3], [0, 1, 2, 2]), [E**-0.5, E**-1.5, E**-0.5, E**-1.5]),
    (TALR(0.3), stats([E**-1, E**-3], [0, 1]), [E**-0.5, 0.3]),  # two responses: median 2; e^-1.5 = .223
    # p·(log(.9/.1) − log(p/(1−p))): .5·log 9; .75·(log 9 − log 3); above p_bar and at 1 nothing
    (InfoSFT(0.9), stats([0.5, 0.75, 0.95, 1.0]), [0.5 * math.log(9), 0.75 * math.log(3), 0, 0]),
    # mean p .5, a0 .25; p = .2: a = .25 + .75·.2/1.8 = 1/3; p = .8: a = .25 + .75·.8/1.2 = .75
    (Cayley(), stats([0.2, 0.8]), [0.2 ** (1 / 3), 0.8**0.75]),
    (EAFT(), stats([0.5, 0.5], topk_entropy=[1.5, 0.0]), [0.5, 0]),
    (EAFT(2.0, 1.0), stats([0.5], topk_entropy=[1.5]), [2.25]),
    (DEFT(), stats([0.25, 1e-30], collision=[0.5, 1.0]), [0.5 * 0.5 / 0.500001, 1e-30 / 1.000001]),
    # mean entropies log 2 and log 4
    (SRFT(), stats([0.1] * 3, [0, 0, 7], entropy=[0, 2 * math.log(2), math.log(4)]), [0.25, 0.25, 0.125]),
    (PSFT(), stats([0.5, 0.5, 0.5, 0.1], old=[0.5, 0.4, 0.39, 0.5]), [1, 1.25, 0, 0.2]),  # .5/.39 = 1.282
    # ℓ − ℓ_ref = log(ref/p): 0, log 2, log 4, −log 2, log 8; 60 % of 5 are 3
    (Rho1(), stats([0.1] * 5, ref=[0.1, 0.2, 0.4, 0.05, 0.8]), [0, 1, 1, 0, 1]),
    (Rho1(1.0), stats([0.1] * 5, ref=[0.1, 0.2, 0.4, 0.05, 0.8]), [0, 0, 0, 0, 1]),  # never none
    # mean −log p 1, 2, 3: mean 2, standard deviation 1, z = −1, 0, 1
    (CADFT(), stats([E**-1, E**-2, E**-3], [4, 1, 2]), [E**-1, E**-2, E**-4]),
    (CADFT(), stats([0.3, 0.5]), [0.3, 0.5]),  # one response alone: z = 0
    (SentenceDFT(), stats([0.5, 0.02, 0.3], [0, 0, 1]), [0.1, 0.1, 0.3]),  # √.01
    (SentenceDFT("product"), stats([0.5, 0.02, 0.3], [0, 0, 1]), [0.01, 0.01, 0.3]),
]


@pytest.mark.parametrize(("weighting", "tokens", "expected"), GOLDEN, ids=[repr(row[0]) for row in GOLDEN])
def test_by_hand(weighting, tokens, expected):
    torch.testing.assert_close(
        checked_weights(weighting, tokens), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-300
    )


def everything(dtype=torch.float64):
    """Tokens of seven responses, p from 1e-30 to 1, with all that a weighting may ask for."""
    tokens = proof_module._sample(type("All", (Uniform,), {"needs": frozenset({
        "entropy", "topk_entropy", "collision", "rank", "ref_logp", "old_logp"})})(), 0.5)  # fmt: skip
    values = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tokens.tensors().items()}
    return TokenStats(**values)


IDENTITIES = [
    (MixCE(0.0), DFT()),
    (MixCE(1.0), Uniform()),
    (Power(1.0), DFT()),
    (Power(0.0), Uniform()),
    (Focal(0.0), Uniform()),
    (Focal(0.0, detached=True), Uniform()),
    (Thresholded(0.0), DFT()),
    (Thresholded(1.0, "logp", "bottom"), Uniform()),
    (ProFit(0.0), Uniform()),
    (EAFT(0.0), Uniform()),
    (CADFT(0.0), DFT()),
    (Rho1(100.0), Uniform()),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("one", "other"), IDENTITIES, ids=repr)
def test_identities(one, other, dtype):
    tokens = everything(dtype)
    assert torch.equal(checked_weights(one, tokens), checked_weights(other, tokens))


@pytest.mark.parametrize(
    ("weighting", "compared"),
    [
        (ImportanceWeighted(), "ref_logp"),
        (ImportanceWeighted("token"), "ref_logp"),
        (Rho1(), "ref_logp"),  # all tie
        (PSFT(), "old_logp"),
    ],
    ids=repr,
)
def test_what_compares_with_a_model_is_uniform_while_it_is_that_model(weighting, compared):
    tokens = everything(torch.float32)
    same = TokenStats(**(tokens.tensors() | {compared: tokens.logp.clone()}))
    assert torch.equal(checked_weights(weighting, same), torch.ones(len(tokens)))


def test_rounding_is_no_excess():
    """The reference's log p are rounded otherwise than the live model's: that does not choose tokens."""
    tokens = everything(torch.float32)
    rounded = tokens.logp + 1e-5 * torch.randn(len(tokens), generator=torch.Generator().manual_seed(0))
    near = TokenStats(**(tokens.tensors() | {"ref_logp": rounded}))
    assert torch.equal(Rho1().weights(near), torch.ones(len(tokens)))


def test_the_sentence_of_one_token_is_dft():
    tokens = stats([0.3, 1e-30, 1.0], [0, 1, 2])
    for mean in ("geometric", "product"):
        torch.testing.assert_close(SentenceDFT(mean).weights(tokens), tokens.p, rtol=1e-12, atol=0)


def test_deft_runs_from_sft_to_dft_with_certainty():
    tokens = stats([1e-4, 1e-4], collision=[1e-4, 1.0])
    unsure, sure = DEFT().weights(tokens).tolist()
    assert unsure > 0.98
    assert sure == pytest.approx(1e-4, rel=1e-5)


OURS = {
    Uniform(): ("token", "tokens", DESCEND),
    DFT(0.1): ("token", "tokens", CLIMB),
    MixCE(0.2): ("token", "tokens", CLIMB),
    MixCE(0.7): ("token", "tokens", DESCEND),
    Power(): ("token", "tokens", CLIMB),
    Power(0.1): ("token", "tokens", DESCEND),
    Thresholded(0.2): ("token", "selected", CLIMB),
    Thresholded(0.2, "logp", "bottom"): ("token", "selected", DESCEND),
    ProFit(): ("token", "tokens", CLIMB),
    ProFit(keep="lower"): ("token", "tokens", DESCEND),
    CHORD(): ("token", "tokens", CLIMB),
    LUFFY(): ("token", "tokens", CLIMB),
    Focal(): ("token", "tokens", DESCEND),
    Focal(0.5): ("token", "tokens", DESCEND),
    Focal(detached=True): ("token", "tokens", DESCEND),
    TALR(): ("step", "tokens", CLIMB),
    InfoSFT(): ("token", "weights", CLIMB),
    Cayley(): ("step", "tokens", CLIMB),
    EAFT(): ("token", "tokens", DESCEND),
    DEFT(): ("token", "tokens", CLIMB),
    SRFT(): ("sequence", "tokens", DESCEND),
    PSFT(): ("token", "tokens", DESCEND),
    Rho1(): ("step", "selected", DESCEND),
    CADFT(): ("step", "tokens", CLIMB),
    SentenceDFT(): ("sequence", "tokens", CLIMB),
    SentenceDFT("product"): ("sequence", "tokens", CLIMB),
}


@pytest.mark.parametrize("weighting", OURS, ids=repr)
def test_what_is_declared_is_proved_and_no_wider_than_it_has_to_be(weighting):
    prove(weighting)
    seen = proof_module._scope_seen(weighting, proof_module._sample(weighting, 0.5))
    assert (seen, weighting.divisor, weighting.monitor) == OURS[weighting]
    assert seen == weighting.scope


@pytest.mark.parametrize("weighting", OURS, ids=repr)
def test_finite_in_float32_and_where_log_p_rounds_above_0(weighting):
    """A log-softmax in float32 can leave 1e-7 above 0; p = 1e-30 and 1 are in the sample."""
    tokens = everything(torch.float32)
    above = TokenStats(**(tokens.tensors() | {"logp": tokens.logp.where(tokens.logp < -1e-3, 1e-7)}))
    for given in (tokens, above):
        assert torch.isfinite(checked_weights(weighting, given)).all()


@pytest.mark.parametrize("weighting", [TALR(), CADFT()], ids=repr)
def test_a_step_in_which_all_is_certain_has_finite_weights(weighting):
    weights = weighting.weights(stats([1.0, 1.0, 1.0], [0, 0, 1]))
    assert weights.tolist() == [1.0, 1.0, 1.0]


NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixCE(1.1), "MixCE.eta is 1.1; expected a number from 0 to 1"),
        (lambda: MixCE(NAN), "MixCE.eta is nan"),
        (lambda: Power(-1.0), "Power.alpha is -1.0; expected a number of at least 0"),
        (lambda: Power(math.inf), "Power.alpha is inf"),
        (lambda: Thresholded(2.0), "Thresholded.threshold is 2.0; expected a probability"),
        (lambda: Thresholded(0.5, on="nll"), 'Thresholded.on is \'nll\'; expected "p" or "logp"'),
        (lambda: Thresholded(0.5, keep="all"), 'Thresholded.keep is \'all\'; expected "top" or "bottom"'),
        (lambda: ProFit(-0.1), "ProFit.threshold is -0.1"),
        (lambda: ProFit(keep="random"), "ProFit.keep is 'random'; expected"),
        (lambda: ProFit(0.8, "middle"), "ProFit.upper is 0.7; expected threshold <= upper <= 1"),
        (lambda: LUFFY(0.0), "LUFFY.gamma is 0.0; expected a number above 0"),
        (lambda: Focal(-2.0), "Focal.gamma is -2.0"),
        (lambda: TALR(1.5), "TALR.w_min is 1.5"),
        (lambda: InfoSFT(1.0), "InfoSFT.p_bar is 1.0; expected a number between 0 and 1, both excluded"),
        (lambda: EAFT(-1.0), "EAFT.alpha is -1.0"),
        (lambda: EAFT(divide_by=0.0), "EAFT.divide_by is 0.0; expected a number above 0"),
        (lambda: SRFT(0.0), "SRFT.scale is 0.0"),
        (lambda: PSFT(clip=0.0), "PSFT.clip is 0.0"),
        (lambda: PSFT(window=0), "PSFT.window is 0; expected a number of steps, at least 1"),
        (lambda: Rho1(0.0), "Rho1.percent is 0.0; expected a number above 0 and up to 100"),
        (lambda: Rho1(NAN), "Rho1.percent is nan"),
        (lambda: CADFT(-1.0), "CADFT.beta is -1.0"),
        (lambda: SentenceDFT("mean"), "SentenceDFT.mean is 'mean'; expected"),
    ],
)
def test_wrong_fields_are_refused(make, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


@pytest.mark.parametrize("count", [1, 3, 10, 100, 700])
@pytest.mark.parametrize("percent", [0.1, 1.0, 14.0, 29.0, 33.3, 57.0, 60.0, 99.9, 100.0])
def test_rho_1_keeps_the_percentage_rounded_up(count, percent):
    """By exact arithmetic: 29 % of 100 tokens are 29, though 29.0 * 100 / 100 may be rounded."""
    ref = torch.linspace(0.001, 0.999, count, dtype=torch.float64)[torch.randperm(count)]
    kept = Rho1(percent).weights(stats([0.0009] * count, ref=ref.tolist()))
    assert int(kept.sum()) == max(1, math.ceil(Fraction(str(percent)) * count / 100))
    assert set(kept.tolist()) <= {0.0, 1.0}
    assert float(ref[kept > 0].min()) > float(ref[kept == 0].max()) if 0 < kept.sum() < count else True
