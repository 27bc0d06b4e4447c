"""Weightings around weightings: closed forms, what follows from the parts, both op paths, and what is refused."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from dft_lightning.logprob import weighted_nll
from dft_lightning.logprob.dense import dense_weighted_nll
from dft_lightning.step_weights import weigh_together
from dft_lightning.weighting import (
    DFT,
    Bounded,
    DataWeighted,
    Exempt,
    ImportanceWeighted,
    Mixed,
    Raised,
    Renormalized,
    TokenStats,
    TokenTarget,
    TokenWeighting,
    Uniform,
    WarmUp,
)
from dft_lightning.weighting.base import checked_targets, checked_weights
from dft_lightning.weighting.proof import fingerprint, prove
from dft_lightning.weighting.spec import from_spec, to_spec


@dataclass(frozen=True)
class Chosen(TokenWeighting):
    """w = 1 where p is at least 0.4, divided by the tokens that are chosen."""

    divisor = "selected"

    def weights(self, tokens):
        return (tokens.p >= 0.4).to(tokens.logp)


@dataclass(frozen=True)
class Signed(TokenWeighting):
    """w = p − ½, which may be negative."""

    def weights(self, tokens):
        return tokens.p - 0.5


@dataclass(frozen=True)
class Smooth(TokenTarget):
    """q = π, and the token itself counts p."""

    monitor = ("val/p_mean", "max")

    def weights(self, tokens):
        return tokens.p

    def targets(self, tokens, logp, ref_logp):
        return logp.exp()


@dataclass(frozen=True)
class SmoothOverItsWeights(Smooth):
    divisor = "weights"


P = [0.9, 0.05, 0.5, 1e-30, 1.0]


def stats(p=P, **brought):
    logp = torch.tensor(p, dtype=torch.float64).log()
    zeros = torch.zeros(len(p), dtype=torch.long)
    return TokenStats(**{"logp": logp, "target": torch.arange(len(p)), "sequence": zeros} | brought)


def weights(weighting, tokens=None):
    return checked_weights(weighting, stats() if tokens is None else tokens).tolist()


def expected(*values):
    return pytest.approx(list(values), rel=1e-12)


MEAN = sum(P) / 5
BY_ID = Exempt(DFT(), stop=False, token_ids=(2, 5), weight=0.5)
EACH = [
    Bounded(DFT(), low=0.1, high=0.8),
    Raised(DFT(), power=2.0, temperature=4.0),
    Mixed(DFT(), share=0.25),
    Mixed(DFT(), ImportanceWeighted(), share=0.5, final_share=0.0, until=0.5),
    WarmUp(DFT(), share=0.5),
    WarmUp(DFT(), ImportanceWeighted(), share=0.5, ramp=True),
    Exempt(DFT()),
    BY_ID,
    DataWeighted(DFT()),
    Renormalized(DFT()),
    Bounded(Exempt(Mixed(Raised(DFT(), 0.5), share=0.2)), 0.3),
    DataWeighted(WarmUp(Bounded(ImportanceWeighted(level="token"), 0.5), share=0.3, ramp=True)),
]
OVER_THE_STEP = [
    Bounded(Renormalized(DFT()), 0.1),
    Mixed(Chosen(), Renormalized(Chosen()), share=0.3),
    Exempt(Raised(Renormalized(ImportanceWeighted()), 0.5)),
    DataWeighted(Renormalized(DFT())),
]


class TestFormulas:
    def test_bounded(self):
        assert weights(Bounded(DFT(), 0.1, 0.8)) == [0.8, 0.1, 0.5, 0.1, 0.8]
        assert weights(Bounded(DFT(), 0.1)) == expected(0.9, 0.1, 0.5, 0.1, 1.0)
        assert weights(Bounded(Signed())) == expected(0.4, 0, 0, 0, 0.5)
        assert weights(Bounded(DFT(), 0.1)) == weights(DFT(0.1))

    def test_raised(self):
        assert weights(Raised(DFT(), 2.0)) == expected(0.81, 0.0025, 0.25, 1e-60, 1.0)
        assert weights(Raised(DFT(), 1.0, temperature=2.0)) == expected(*(p**0.5 for p in P))
        assert weights(Raised(DFT(), 3.0, temperature=2.0)) == expected(*(p**1.5 for p in P))
        assert weights(Raised(DFT(), 0.0)) == [1.0] * 5

    def test_a_negative_weight_has_no_power(self):
        with pytest.raises(ValueError, match=r"Raised got a weight of -0\.5 from Signed.*Bounded\(Signed\(…\), 0\)"):
            weights(Raised(Signed(), 2.0))
        with pytest.raises(ValueError, match=r"Raised got a weight of -0\.5"):
            prove(Raised(Signed(), 2.0))
        prove(Raised(Bounded(Signed()), 2.0))

    def test_mixed(self):
        assert weights(Mixed(DFT(), share=0.25)) == expected(*(0.75 * p + 0.25 for p in P))
        other = Mixed(DFT(), DFT(0.5), share=0.25)
        assert weights(other) == expected(*(0.75 * p + 0.25 * max(p, 0.5) for p in P))
        assert weights(Mixed(DFT(), share=0.0)) == weights(DFT())
        assert weights(Mixed(DFT(), share=1.0)) == weights(Uniform())

    @pytest.mark.parametrize(
        ("progress", "share"), [(0.0, 0.8), (0.125, 0.65), (0.25, 0.5), (0.5, 0.2), (0.75, 0.2), (1.0, 0.2)]
    )
    def test_the_share_of_a_mixture_may_change(self, progress, share):
        mixed = Mixed(DFT(), share=0.8, final_share=0.2, until=0.5)
        assert weights(mixed, stats(progress=progress)) == expected(*((1 - share) * p + share for p in P))

    @pytest.mark.parametrize(("progress", "done"), [(0.0, 0.0), (0.1, 0.0), (0.2, 1.0), (0.6, 1.0), (1.0, 1.0)])
    def test_a_warm_up_ends_at_once(self, progress, done):
        warm = WarmUp(DFT(), share=0.2)
        assert weights(warm, stats(progress=progress)) == (weights(DFT()) if done else [1.0] * 5)

    @pytest.mark.parametrize(("progress", "done"), [(0.0, 0.0), (0.05, 0.25), (0.1, 0.5), (0.2, 1.0), (1.0, 1.0)])
    def test_or_goes_over(self, progress, done):
        warm = WarmUp(DFT(), DFT(0.5), share=0.2, ramp=True)
        mix = [done * p + (1 - done) * max(p, 0.5) for p in P]
        assert weights(warm, stats(progress=progress)) == expected(*mix)

    def test_no_warm_up(self):
        for ramp in (False, True):
            assert weights(WarmUp(DFT(), share=0.0, ramp=ramp)) == weights(DFT())

    def test_exempt(self):
        tokens = stats(stop=torch.tensor([False, True, False, False, True]))
        assert weights(Exempt(DFT()), tokens) == expected(0.9, 1.0, 0.5, 1e-30, 1.0)
        assert weights(Exempt(DFT(), weight=0.3), tokens) == expected(0.9, 0.3, 0.5, 1e-30, 0.3)
        ids = Exempt(DFT(), stop=False, token_ids=(0, 3), weight=2.0)
        assert weights(ids) == expected(2.0, 0.05, 0.5, 2.0, 1.0)
        assert weights(Exempt(DFT(), token_ids=(3,)), tokens) == expected(0.9, 1.0, 0.5, 1.0, 1.0)

    def test_data_weighted(self):
        tokens = stats(data_weight=torch.tensor([0.0, 2.0, 1.0, 3.0, 0.5], dtype=torch.float64))
        assert weights(DataWeighted(DFT()), tokens) == expected(0.0, 0.1, 0.5, 3e-30, 0.5)

    def test_renormalized_is_left_to_the_divisor(self):
        """Outermost: the step's sum is divided by Σw, so that the weights stay those of the part."""
        weighting = Renormalized(DFT())
        assert (weighting.divisor, weighting.scope, weights(weighting)) == ("weights", "token", weights(DFT()))
        assert Renormalized(ImportanceWeighted()).scope == "sequence"
        assert Renormalized(Bounded(Renormalized(DFT()), 0.1)).scope == "step"


class TestInsideOthers:
    """A part that has a divisor of its own keeps it."""

    def test_mean_1_over_the_step(self):
        assert weights(Bounded(Renormalized(DFT()))) == expected(*(p / MEAN for p in P))
        assert weights(Mixed(Renormalized(DFT()), share=0.5)) == expected(*(0.5 * p / MEAN + 0.5 for p in P))
        assert weights(Bounded(Renormalized(Renormalized(DFT())))) == expected(*(p / MEAN for p in P))

    def test_the_mean_over_those_selected(self):
        assert weights(Bounded(Chosen())) == expected(5 / 3, 0, 5 / 3, 0, 5 / 3)
        assert weights(Exempt(Chosen(), stop=False, token_ids=(1,))) == expected(5 / 3, 1, 5 / 3, 0, 5 / 3)
        assert weights(Bounded(Renormalized(Chosen()))) == weights(Bounded(Chosen()))

    def test_without_any_weight_there_is_nothing_to_divide_by(self):
        low = stats([0.1, 0.2])
        assert weights(Bounded(Chosen()), low) == weights(Bounded(Renormalized(Chosen())), low) == [0.0, 0.0]

    @pytest.mark.parametrize("weighting", OVER_THE_STEP, ids=repr)
    def test_they_look_at_the_step(self, weighting):
        assert (weighting.scope, weighting.divisor) == ("step", "tokens")
        prove(weighting)

    @pytest.mark.parametrize("weighting", OVER_THE_STEP, ids=repr)
    def test_however_the_step_is_cut_up(self, weighting):
        generator = torch.Generator().manual_seed(0)
        logp = -3 * torch.rand(40, generator=generator)
        tokens = TokenStats(
            logp=logp,
            target=torch.arange(40),
            sequence=torch.arange(40) // 4,
            position=torch.arange(40) % 4,
            ref_logp=logp + torch.rand(40, generator=generator),
            data_weight=torch.rand(40, generator=generator),
            stop=torch.arange(40) % 4 == 3,
        )
        (whole,) = weigh_together(weighting, [tokens])
        torch.testing.assert_close(whole, checked_weights(weighting, tokens))
        parts = weigh_together(weighting, [tokens[:13], tokens[13:13], tokens[13:]])
        assert torch.equal(torch.cat(parts), whole)


class TestWhatFollowsFromTheParts:
    def test_needs(self):
        assert Bounded(ImportanceWeighted()).needs == {"ref_logp"}
        assert Mixed(DFT(), ImportanceWeighted()).needs == WarmUp(DFT(), ImportanceWeighted()).needs == {"ref_logp"}
        assert DataWeighted(Exempt(ImportanceWeighted())).needs == {"ref_logp", "stop", "data_weight"}
        assert Exempt(DFT(), stop=False, token_ids=(1,)).needs == frozenset()

    def test_scope(self):
        assert Bounded(DFT()).scope == "token"
        assert Mixed(DFT(), ImportanceWeighted()).scope == "sequence"
        assert WarmUp(ImportanceWeighted(), Bounded(Renormalized(DFT()))).scope == "step"

    def test_the_monitor_is_that_of_the_main_part(self):
        assert Exempt(Mixed(DFT(), Uniform())).monitor == ("val/p_mean", "max")
        assert WarmUp(Uniform(), DFT()).monitor == ("val/nll", "min")

    @pytest.mark.parametrize("weighting", EACH, ids=repr)
    def test_they_hold_what_they_declare(self, weighting):
        prove(weighting)
        assert weighting.formula
        assert weighting.divisor == ("weights" if isinstance(weighting, Renormalized) else "tokens")

    @pytest.mark.parametrize("weighting", [*EACH, *OVER_THE_STEP], ids=repr)
    def test_as_plain_data_and_back(self, weighting):
        assert from_spec(to_spec(weighting)) == weighting

    def test_ids_in_a_list(self):
        assert Exempt(DFT(), token_ids=[1, 2]) == from_spec(to_spec(Exempt(DFT(), token_ids=(1, 2))))

    def test_the_default_parts_are_written_out(self):
        assert Mixed(DFT()) == Mixed(DFT(), Uniform())
        assert to_spec(WarmUp(DFT()))["init_args"]["start"]["class_path"].endswith(".Uniform")

    def test_what_looks_further_than_it_says_is_named_also_inside(self):
        @dataclass(frozen=True)
        class Careless(TokenWeighting):
            def weights(self, tokens):
                return tokens.p / tokens.p.mean()

        with pytest.raises(ValueError, match=r"^Careless declares scope 'token'.*declare `scope = 'step'`"):
            prove(Exempt(Bounded(Careless())))

    def test_what_looks_further_only_late_in_training_is_found(self):
        @dataclass(frozen=True)
        class Late(TokenWeighting):
            def weights(self, tokens):
                return tokens.p / tokens.p.mean() if tokens.progress > 0.9 else tokens.p

        with pytest.raises(ValueError, match="Late declares scope 'token'"):
            prove(Late())

    def test_fingerprints(self):
        seen = [weighting for weighting in EACH if weighting != BY_ID]  # the sample has neither id
        different = [*seen, *OVER_THE_STEP, DFT(), WarmUp(DFT(), share=0.2), Mixed(DFT(), share=0.25, final_share=0.3)]
        assert len({fingerprint(weighting) for weighting in different}) == len(different)
        assert fingerprint(Mixed(DFT(), share=0.0)) == fingerprint(WarmUp(DFT(), share=0.0)) == fingerprint(DFT())

    def test_those_of_before_still_match(self):
        """Checkpoints hold them."""
        assert fingerprint(Uniform()).startswith("a2497a549e6e")
        assert fingerprint(DFT(0.1)).startswith("dc7bdf6e127a")
        assert fingerprint(ImportanceWeighted()).startswith("02e6e967184b")


@pytest.mark.parametrize("chunk_rows", [1, 7, 64])
@pytest.mark.parametrize("weighting", EACH, ids=repr)
def test_both_op_paths_agree(weighting, chunk_rows):
    """Float64: rounding of some hundred products stays below 1e-12."""
    generator = torch.Generator().manual_seed(0)
    brought = {
        "position": torch.arange(37) % 9,
        "ref_logp": -5 * torch.rand(37, generator=generator, dtype=torch.float64),
        "data_weight": 2 * torch.rand(37, generator=generator, dtype=torch.float64),
        "stop": torch.arange(37) % 9 == 8,
    }
    outcomes = []
    for function, options in ((weighted_nll, {"chunk_rows": chunk_rows}), (dense_weighted_nll, {})):
        generator.manual_seed(1)
        hidden = torch.randn(37, 19, generator=generator, dtype=torch.float64).requires_grad_()
        head = torch.randn(101, 19, generator=generator, dtype=torch.float64).requires_grad_()
        targets = torch.randint(101, (37,), generator=generator)
        sequence, progress = torch.arange(37) // 9, 0.2
        loss, tokens = function(
            hidden, head, targets, weighting, sequence=sequence, progress=progress, **options, **brought
        )
        loss.backward()
        outcomes.append((loss.detach(), tokens.weight, hidden.grad, head.grad))
    for ours, truth in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)


class TestTargetsOverTheVocabulary:
    @pytest.fixture
    def rows(self):
        logp = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(1)
        given = {"data_weight": torch.tensor([0.0, 2, 1, 3, 0.5]).double(), "stop": torch.arange(5) == 1}
        return replace(stats(**given), logp=logp[torch.arange(5), torch.arange(5)]), logp

    def test_what_is_done_to_the_weight_is_done_to_them(self, rows):
        tokens, logp = rows
        q = logp.exp()

        def targets(weighting, progress=0.5):
            return checked_targets(weighting, replace(tokens, progress=progress), logp)

        torch.testing.assert_close(targets(Mixed(Smooth(), DFT(), share=0.25)), 0.75 * q)
        torch.testing.assert_close(targets(Mixed(DFT(), Smooth(), share=0.25)), 0.25 * q)
        torch.testing.assert_close(targets(Mixed(Smooth(), Smooth(), share=0.25)), q)
        torch.testing.assert_close(targets(WarmUp(Smooth(), share=0.2, ramp=True), 0.1), 0.5 * q)
        assert not targets(WarmUp(Smooth(), share=0.2), 0.1).any()
        torch.testing.assert_close(targets(DataWeighted(Smooth())), tokens.data_weight[:, None] * q)
        exempt = targets(Exempt(Smooth()))
        assert not exempt[1].any()
        torch.testing.assert_close(exempt[[0, 2, 3, 4]], q[[0, 2, 3, 4]])

    @pytest.mark.parametrize("wrap", [Mixed, WarmUp, Exempt, DataWeighted])
    def test_they_show(self, wrap):
        assert wrap(Smooth()).vocabulary
        assert not wrap(DFT()).vocabulary
        assert wrap(DFT()).targets(stats(), torch.zeros(5, 7), None) is None
        prove(wrap(Smooth()))

    @pytest.mark.parametrize("wrap", [Bounded, Raised, Renormalized])
    def test_or_it_is_refused(self, wrap):
        name = wrap.__name__
        message = rf"^{name} is a function of one weight a token, but Smooth has .* Mixed\(Smooth\(…\), {name}"
        with pytest.raises(ValueError, match=message):
            wrap(Smooth())
        with pytest.raises(ValueError, match="but Exempt has a weight for every word"):
            wrap(Exempt(Smooth()))
        Mixed(Smooth(), wrap(DFT()))

    @pytest.mark.parametrize("wrap", [Mixed, WarmUp, Exempt, DataWeighted])
    def test_a_divisor_over_the_step_that_they_could_not_know(self, wrap):
        with pytest.raises(
            ValueError, match=f"SmoothOverItsWeights is divided by its weights.* inside {wrap.__name__}"
        ):
            wrap(SmoothOverItsWeights())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bounded(DFT), r"Bounded is made of <class .*expected a weighting, as in Bounded\(DFT\(\)\)"),
        (lambda: Mixed(DFT(), "Uniform"), "Mixed is made of 'Uniform'"),
        (lambda: Bounded(DFT(), 0.5, 0.1), "Bounded.low is 0.5 and high 0.1; expected low <= high"),
        (lambda: Bounded(DFT(), math.nan), "Bounded.low is nan"),
        (lambda: Bounded(DFT(), 0.0, math.nan), "high nan"),
        (lambda: Raised(DFT(), -1.0), "Raised.power is -1.0; expected 0 or more"),
        (lambda: Raised(DFT(), math.nan), "Raised.power is nan"),
        (lambda: Raised(DFT(), temperature=0.0), "Raised.temperature is 0.0; expected more than 0"),
        (lambda: Mixed(DFT(), share=1.5), "Mixed.share is 1.5; expected a share from 0 to 1"),
        (lambda: Mixed(DFT(), final_share=-0.1), "Mixed.final_share is -0.1"),
        (lambda: Mixed(DFT(), until=0.0), "Mixed.until is 0"),
        (lambda: WarmUp(DFT(), share=math.nan), "WarmUp.share is nan"),
        (lambda: Exempt(DFT(), stop=False), "Exempt exempts nothing: set stop to true, or name token_ids"),
        (lambda: Exempt(DFT(), token_ids=(-1,)), r"Exempt.token_ids has \[-1\]; expected ids"),
        (lambda: Exempt(DFT(), token_ids=("<|im_end|>",)), r"Exempt.token_ids has \['<|im_end|>'\]"),
        (lambda: Exempt(DFT(), weight=-1.0), "Exempt.weight is -1.0; expected 0 or more"),
    ],
)
def test_bad_fields_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
