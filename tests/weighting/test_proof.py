"""A weighting that looks further than it says is refused at the start."""

from dataclasses import dataclass

import pytest
import torch

from dft_lightning.weighting import DFT, ImportanceWeighted, Mixed, TokenTarget, TokenWeighting, Uniform
from dft_lightning.weighting.proof import fingerprint, prove


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


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        ("logp", "97bbdb103079"),
        ("target", "8d079d394037"),
        ("sequence", "67e365ae551b"),
        ("position", "b88599bf17e6"),
        ("ref_logp", "7d4d0ee86a2f"),
        ("old_logp", "4c638dcb9507"),
        ("reward", "eaf429e4f56f"),
        ("data_weight", "df41c9456648"),
        ("stop", "e8dbcb23c8a8"),
        ("entropy", "3cb9896b650e"),
        ("topk_entropy", "c8bd8a0490b8"),
        ("collision", "7f19038a61ab"),
        ("rank", "04436586ba48"),
        ("top_p", "2bd24d241feb"),
    ],
)
def test_the_fingerprint_of_a_formula_is_that_of_earlier_versions(read, expected):
    """Whatever it reads: checkpoints hold it, and one with another fingerprint is refused as another formula."""
    needs = {read} - {"logp", "target", "position", "sequence"}
    assert fingerprint(weighting(lambda t: getattr(t, read).double(), wants=needs)).startswith(expected)


@dataclass(frozen=True)
class Pulled(TokenTarget):
    """Targets that read all that they are given."""

    needs = frozenset({"ref_distribution"})

    def targets(self, tokens, logp, ref_logp):
        return (1.0 + tokens.p[:, None]) * logp.exp() - tokens.target[:, None] * ref_logp.exp()


def test_the_fingerprint_of_targets_is_that_of_earlier_versions():
    assert fingerprint(Pulled()).startswith("7ac4d20d0655")


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.25, 0.5, 0.75, 1.0])
def test_a_formula_that_differs_at_one_point_of_the_training_only_has_a_fingerprint_of_its_own(progress):
    once = weighting(lambda t: t.p * (2.0 if t.progress == progress else 1.0))
    assert fingerprint(once) != fingerprint(weighting(lambda t: t.p))


def test_a_divisor_of_its_own_shows_in_the_fingerprint_and_the_schedule_only_where_there_is_one():
    over = {each: weighting(lambda t: t.p) for each in ("tokens", "weights", "selected")}
    for name, each in over.items():
        type(each).divisor = name
    assert len({fingerprint(each) for each in over.values()}) == 3
    assert fingerprint(over["tokens"]) == fingerprint(DFT())


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda t: t.p * torch.inf, "not finite"),
        (lambda t: t.logp.exp_(), "changes the tensors"),
        (lambda t: t.p / t.p.mean(), "declare `scope = 'step'`"),
        (lambda t: t.sequence_mean(t.p), "declare `scope = 'sequence'`"),
    ],
)
def test_a_schedule_is_looked_at_all_over_the_training(bad, message, progress):
    with pytest.raises(ValueError, match=message):
        prove(weighting(lambda t: bad(t) if t.progress == progress else t.p))


@pytest.mark.parametrize(
    ("divisor", "worth", "message"),
    [
        ("batch", 1.0, "Mine.divisor is 'batch'; expected one of tokens, weights, selected"),
        ("weights", -0.5, "one is negative at log p"),
        ("weights", 0.0, None),
        ("weights", 0.5, None),
        ("tokens", -0.5, None),
        ("selected", -0.5, None),
    ],
)
def test_divisors(divisor, worth, message):
    mine = weighting(lambda t: torch.where(t.logp < -20, worth, 1.0))
    type(mine).divisor = divisor
    if message is None:
        return prove(mine)
    with pytest.raises(ValueError, match=message):
        prove(mine)
    return None


def test_the_part_that_looks_further_is_named_inside_others():
    """A Mixed says the scope of its parts, so that only the part itself can be wrong."""
    inner = weighting(lambda t: t.p / t.p.mean())
    with pytest.raises(ValueError, match="Mine declares scope 'token'"):
        prove(Mixed(Mixed(DFT(), inner)))


def target(body, wants=()):
    @dataclass(frozen=True)
    class Mine(TokenTarget):
        needs = frozenset(wants)

        def targets(self, tokens, logp, ref_logp):
            return body(tokens, logp, ref_logp)

    return Mine()


def spoilt(tensor, result):
    tensor.add_(1.0)
    return result


REFERENCE = ("ref_distribution",)


@pytest.mark.parametrize(
    ("mine", "message"),
    [
        (target(lambda t, z, r: z.exp() / z.mean()), "change with the other tokens"),
        (target(lambda t, z, r: z.exp() * t.p.mean()), "change with the other tokens"),
        (target(lambda t, z, r: r - r.mean(), REFERENCE), "change with the other tokens"),
        (target(lambda t, z, r: z.exp() / 0.0), "not finite"),
        (target(lambda t, z, r: torch.where(z < -20.0, z.exp(), torch.inf)), "not finite"),
        (target(lambda t, z, r: spoilt(t.logp, z.exp())), "changes the tensors it is given"),
        (target(lambda t, z, r: spoilt(z, torch.ones_like(z))), "changes the tensors it is given"),
        (target(lambda t, z, r: spoilt(r, z.exp()), REFERENCE), "changes the tensors it is given"),
        (target(lambda t, z, r: z.exp() * (torch.inf if t.progress == 1.0 else 1.0)), "not finite"),
    ],
)
def test_targets_that_cannot_be_trusted_are_refused(mine, message):
    with pytest.raises(ValueError, match=message):
        prove(mine)
    with pytest.raises(ValueError, match=message):
        prove(Mixed(Uniform(), mine, share=0.5))


def test_targets_get_the_reference_that_they_name_and_no_other():
    prove(target(lambda t, z, r: z.exp() - r.exp(), REFERENCE))
    prove(target(lambda t, z, r: z.exp() if r is None else torch.full_like(z, torch.nan)))
