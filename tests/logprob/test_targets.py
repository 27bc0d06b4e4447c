"""Weightings with a target over the vocabulary: against autograd of the published losses, and through both op paths."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dft_lightning.logprob import LogitTransform, ReferenceHead, dense_weighted_nll, rows, weighted_nll
from dft_lightning.weighting import (
    ASFT,
    DFT,
    GEM,
    GIFT,
    TALR,
    EntropyBonus,
    LabelSmoothing,
    Mixed,
    TokenStats,
    TokenTarget,
    TokenWeighting,
    Uniform,
)

N, H, V = 37, 13, 101


@dataclass(frozen=True)
class SentenceProbability(TokenWeighting):
    """A user's weighting of sequence scope."""

    scope = "sequence"

    def weights(self, tokens: TokenStats) -> Tensor:
        return tokens.sequence_mean(tokens.logp).exp()


@dataclass(frozen=True)
class Spread(TokenTarget):
    """A user's target that wants a statistic, too."""

    needs = frozenset({"entropy", "ref_logp"})

    def weights(self, tokens: TokenStats) -> Tensor:
        return tokens.need("entropy")

    def targets(self, tokens: TokenStats, logp: Tensor, ref_logp: Tensor | None) -> Tensor:
        return (tokens.need("ref_logp").exp() * tokens.need("entropy"))[:, None] * (0.5 * logp).exp()


ALL = [
    ASFT(),
    ASFT(0.7, "reverse"),
    GEM(),
    GEM(0.4, "logsigmoid"),
    GIFT(),
    GIFT(2.0),
    LabelSmoothing(),
    EntropyBonus(Uniform()),
    EntropyBonus(DFT(0.1), 0.5),
    EntropyBonus(SentenceProbability(), -0.2),
    EntropyBonus(ASFT(), 0.3),
    Spread(),
]
TRANSFORMS = [LogitTransform(), LogitTransform(scale=0.6, softcap=4.0)]


def problem(dtype=torch.float64, spread=1.0):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    leaves = [(spread * random(N, H)).to(dtype).requires_grad_(), random(V, H).to(dtype).requires_grad_()]
    reference = ReferenceHead(random(N, H - 2).to(dtype), random(V, H - 2).to(dtype), LogitTransform(scale=1.3))
    brought = {
        "sequence": torch.arange(N) * 4 // N,
        "factor": torch.rand(N, generator=generator, dtype=torch.float64) + 0.5,
        "ref_logp": -5 * torch.rand(N, generator=generator, dtype=torch.float64),
    }
    return leaves, torch.randint(0, V, (N,), generator=generator), reference, brought


def gradients(function, weighting, leaves, target, reference, brought, **options):
    for leaf in leaves:
        leaf.grad = None
    loss, tokens = function(*leaves, target, weighting, reference=reference, **brought, **options)
    (0.7 * loss).backward()
    return loss.detach(), tokens, [leaf.grad.clone() for leaf in leaves]


def relative(ours, truth):
    return float((ours.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "scaled and capped"])
@pytest.mark.parametrize("weighting", ALL, ids=repr)
@pytest.mark.parametrize("chunk_rows", [1, 9, 1000])
def test_equals_the_oracle(weighting, transform, chunk_rows, monkeypatch):
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 4 * V * 8)  # some blocks to a chunk
    given = problem()
    expected = gradients(dense_weighted_nll, weighting, *given, transform=transform)
    got = gradients(weighted_nll, weighting, *given, transform=transform, chunk_rows=chunk_rows)
    assert relative(got[0], expected[0]) < 1e-10
    for ours, truth in zip(got[2], expected[2], strict=True):
        assert relative(ours, truth) < 1e-10
    for name, truth in expected[1].tensors().items():
        torch.testing.assert_close(got[1].tensors()[name], truth, rtol=1e-9, atol=1e-12)


def published(weighting: TokenWeighting, logp: Tensor, target: Tensor, ref: Tensor) -> Tensor:
    """The loss of each token as it is published, by log-probabilities (N, V) of model and reference."""
    own = logp.gather(1, target[:, None])[:, 0]
    p = logp.exp()
    match weighting:
        case ASFT(strength, "forward"):
            return -own.detach().exp() * own + strength * (ref.exp() * (ref - logp)).sum(1)
        case ASFT(strength, "reverse"):
            return -own.detach().exp() * own + strength * (p * (logp - ref)).sum(1)
        case GEM(beta, h):
            q = (logp.detach() / beta).softmax(1)
            ahead = torch.sigmoid(0.01 * (logp - own[:, None])).detach() if h == "logsigmoid" else 1.0
            return -(q * ahead * (own[:, None] - logp)).sum(1)
        case GIFT(beta):
            tilted = (ref + beta * F.one_hot(target, V)).softmax(1)
            return -(tilted * logp).sum(1)
        case LabelSmoothing(smoothing):
            return F.cross_entropy(logp, target, label_smoothing=smoothing, reduction="none")
        case EntropyBonus(_, strength):
            return -own + strength * (p * logp).sum(1)
    raise AssertionError(weighting)


@pytest.mark.parametrize(
    "weighting",
    [
        ASFT(0.3),
        ASFT(0.3, "reverse"),
        GEM(),
        GEM(0.4, "logsigmoid"),
        GIFT(),
        GIFT(3.0),
        LabelSmoothing(0.2),
        EntropyBonus(Uniform(), 0.4),
    ],
    ids=repr,
)
@pytest.mark.parametrize("spread", [0.1, 1.0, 15.0])
def test_the_gradient_is_that_of_the_published_loss(weighting, spread):
    """By autograd in float64; with the widest spread, p goes below 1e-30."""
    leaves, target, reference, _ = problem(spread=spread)
    logp = (leaves[0] @ leaves[1].T).log_softmax(1)
    ref = reference.transform.forward_(reference.hidden @ reference.weight.T).log_softmax(1)
    truth = torch.autograd.grad(published(weighting, logp, target, ref).sum(), leaves)
    loss, _ = weighted_nll(*leaves, target, weighting, reference=reference, chunk_rows=8)
    for ours, expected in zip(torch.autograd.grad(loss, leaves), truth, strict=True):
        assert relative(ours, expected) < 1e-9
    if spread == 15.0:
        assert logp.gather(1, target[:, None]).min() < -69


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_reference_that_is_the_model_pulls_nowhere(direction):
    leaves, target, _, _ = problem()
    same = ReferenceHead(leaves[0].detach().clone(), leaves[1].detach().clone())
    anchored = gradients(weighted_nll, ASFT(10.0, direction), leaves, target, same, {})
    alone = gradients(weighted_nll, DFT(), leaves, target, None, {})
    for ours, truth in zip(anchored[2], alone[2], strict=True):
        assert relative(ours, truth) < 1e-12


@pytest.mark.parametrize(
    ("weighting", "other"),
    [
        (ASFT(0.0), DFT()),
        (LabelSmoothing(0.0), Uniform()),
        (EntropyBonus(DFT(), 0.0), DFT()),
        (GIFT(200.0), Uniform()),
    ],
    ids=repr,
)
def test_identities(weighting, other):
    leaves, target, reference, brought = problem()
    ours = gradients(weighted_nll, weighting, leaves, target, reference, brought)
    truth = gradients(weighted_nll, other, leaves, target, None, brought)
    assert relative(ours[0], truth[0]) < 1e-12
    torch.testing.assert_close(ours[1].weight, truth[1].weight, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(ours[2], truth[2], strict=True):
        assert relative(mine, theirs) < 1e-12


@pytest.mark.parametrize("weighting", ALL, ids=repr)
def test_float32_is_as_good_as_float32_can_be(weighting):
    """Bound as for token weights: 5e-6, some 40 units of rounding for sums over some hundred terms."""
    expected = gradients(dense_weighted_nll, weighting, *problem())
    got = gradients(weighted_nll, weighting, *problem(torch.float32), chunk_rows=16)
    assert got[1].weight.dtype == torch.float32
    for ours, truth in zip(got[2], expected[2], strict=True):
        assert relative(ours, truth) < 5e-6


@pytest.mark.parametrize("logits", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("weighting", [ASFT(), GEM(), LabelSmoothing(), EntropyBonus(Uniform())], ids=repr)
def test_bfloat16_inputs(weighting, logits):
    """The gradient by the logits, the products and the end result are each rounded to bfloat16, to 2^-9 of an element.

    Together they stay below one unit, 2^-8 (DFT's own gradient here is off by 3.3e-3). With bfloat16 logits each of
    these, up to some 10 nats, is off by up to 2^-9 of itself.
    """
    leaves, target, reference, brought = problem(torch.bfloat16)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = gradients(dense_weighted_nll, weighting, exact, target, reference, brought)
    got = gradients(weighted_nll, weighting, leaves, target, reference, brought, logits=logits)
    for ours, truth in zip(got[2], expected[2], strict=True):
        assert relative(ours, truth) < (2.0**-8 if logits is None else 2.5e-2)


@dataclass(frozen=True)
class Elsewhere(TokenTarget):
    """Every word but the given one."""

    def targets(self, tokens: TokenStats, logp: Tensor, ref_logp: Tensor | None) -> Tensor:
        return torch.ones_like(logp).scatter(1, tokens.target[:, None], 0.0)


LOGP = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
REF = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("weighting", "gradient"),
    [
        # (w + Σq)·p − w·onehot − q: 0.9·(.5, .3, .2) − (.5, 0, 0) − 0.4·(.25, .5, .25)
        (ASFT(0.4), [-0.15, 0.07, 0.08]),
        # p − 0.7·onehot − 0.1 on each of three words
        (LabelSmoothing(0.3), [-0.3, 0.2, 0.1]),
        # q − onehot with q = p²/Σp² = (.25, .09, .04)/.38
        (GEM(0.5), [-0.342105263, 0.236842105, 0.105263158]),
        # p − q with q = (.75, .5, .25)/1.5, as the tilt triples the given word
        (GIFT(math.log(3.0)), [0.0, -1 / 30, 1 / 30]),
        # p − onehot + p·(ln p + H), H = 0.5·0.693147 + 0.3·1.203973 + 0.2·1.609438 = 1.029653
        (EntropyBonus(Uniform(), 1.0), [-0.331747, 0.247704, 0.084043]),
    ],
    ids=repr,
)
def test_by_hand(weighting, gradient):
    """Three words of probability .5, .3 and .2 (the reference's: .25, .5, .25), the first of which is given."""
    logits, one = LOGP.clone().requires_grad_(), torch.eye(3, dtype=torch.float64)
    loss, _ = weighted_nll(logits, one, torch.tensor([0]), weighting, reference=ReferenceHead(REF, one))
    loss.backward()
    torch.testing.assert_close(logits.grad[0].tolist(), gradient, rtol=0, atol=1e-6)


def test_a_weight_of_zero_leaves_the_targets():
    """Rows whose own weight is zero are left out of the products of token weightings only."""
    leaves, target, reference, _ = problem()
    for weighting in (GIFT(0.0), Elsewhere()):
        ours = gradients(weighted_nll, weighting, leaves, target, reference, {})
        truth = gradients(dense_weighted_nll, weighting, leaves, target, reference, {})
        for mine, theirs in zip(ours[2], truth[2], strict=True):
            assert relative(mine, theirs) < 1e-10
    assert not ours[1].weight.any()
    assert ours[2][0].any()
    tilted = gradients(weighted_nll, GIFT(0.0), leaves, target, reference, {})
    assert relative(tilted[1].weight, reference_p(reference, target)) < 1e-10


def reference_p(reference, target):
    ref = reference.transform.forward_(reference.hidden @ reference.weight.T).softmax(1)
    return ref.gather(1, target[:, None])[:, 0]


def test_without_gradients_the_loss_is_the_same():
    given = problem()
    loss, _, _ = gradients(weighted_nll, EntropyBonus(SentenceProbability()), *given, chunk_rows=5)
    with torch.no_grad():
        leaves, target, reference, brought = given
        alone, _ = weighted_nll(
            *leaves, target, EntropyBonus(SentenceProbability()), reference=reference, chunk_rows=5, **brought
        )
    torch.testing.assert_close(alone, loss, rtol=1e-12, atol=0)


def test_no_tokens():
    leaves, target, reference, _ = problem()
    none = ReferenceHead(reference.hidden[:0], reference.weight)
    loss, tokens = weighted_nll(leaves[0][:0], leaves[1], target[:0], ASFT(), reference=none)
    loss.backward()
    assert loss == 0.0
    assert len(tokens) == 0
    assert not leaves[1].grad.any()


def test_a_missing_or_other_reference_is_refused():
    leaves, target, reference, _ = problem()
    with pytest.raises(ValueError, match="ASFT needs the reference's distribution"):
        weighted_nll(*leaves, target, ASFT())
    for hidden, weight in [
        (reference.hidden[1:], reference.weight),
        (reference.hidden[:, 1:], reference.weight),
        (reference.hidden, reference.weight[1:]),
        (reference.hidden, reference.weight[:, 0]),
    ]:
        with pytest.raises(ValueError, match=r"expected \(37, H\) and \(101, H\)"):
            weighted_nll(*leaves, target, ASFT(), reference=ReferenceHead(hidden, weight))
    weighted_nll(*leaves, target, Uniform())  # has no use for it


@dataclass(frozen=True)
class WrongShape(TokenTarget):
    """Forgets the vocabulary."""

    def targets(self, tokens: TokenStats, logp: Tensor, ref_logp: Tensor | None) -> Tensor:
        return tokens.logp


def test_targets_of_another_shape_are_refused():
    leaves, target, _, _ = problem()
    with pytest.raises(ValueError, match=r"WrongShape.targets returned \(4,\); expected a weight a word, \(4, 101\)"):
        weighted_nll(leaves[0][:4], leaves[1], target[:4], WrongShape())


class Largest(TorchDispatchMode):
    """The most elements that any operation has made, leaving out those of the size of the head's gradient."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (V,):
                self.most = max(self.most, tensor.numel())
        return made


def test_no_more_than_a_chunk_is_held():
    """Whatever is as wide as the vocabulary has at most a chunk's rows."""
    leaves, target, reference, _ = problem()
    with Largest() as largest:
        weighted_nll(*leaves, target, ASFT(), reference=reference, chunk_rows=16)
    assert 0 < largest.most <= 16 * V


@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_likely_tokens_keep_their_log_probability(shift):
    """1 − p is about 1e-4 under logits of some 35 nats; taken off their log-sum-exp it would be lost to rounding."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn((N, V), generator=generator) + shift
    logits[:, 0] = logits.logsumexp(1) + 9.0
    one, target = torch.eye(V), torch.zeros(N, dtype=torch.long)
    truth = dense_weighted_nll(logits, one, target, LabelSmoothing(0.0))[1].logp
    for weighting in (LabelSmoothing(0.0), Uniform()):
        ours = weighted_nll(logits, one, target, weighting)[1].logp
        assert relative(ours, truth) < 2e-3  # what rounding the logits themselves to 2^-19 leaves of 1e-4


def test_a_target_inside_a_step_scope_mixture_gets_its_statistics():
    """The weights are known by then, but the targets are still to be asked for."""
    leaves, target, _, brought = problem()
    mixture, weight = Mixed(Spread(), TALR()), torch.rand(N, dtype=torch.float64)
    loss, _ = weighted_nll(*leaves, target, mixture, weight=weight, **brought)
    loss.backward()
    assert leaves[0].grad.any()


@pytest.mark.parametrize("inner", [LabelSmoothing(0.2), ASFT(0.4), Uniform()], ids=repr)
@pytest.mark.parametrize("strength", [0.3, -0.2])
def test_an_entropy_bonus_adds_to_the_gradient_that_is_there(inner, strength):
    """Its part of the gradient is that of −strength·H, whatever the weighting around which it is."""
    leaves, target, reference, brought = problem()
    factor = brought["factor"]
    without = gradients(weighted_nll, inner, leaves, target, reference, brought)[2]
    with_bonus = gradients(weighted_nll, EntropyBonus(inner, strength), leaves, target, reference, brought)[2]
    for leaf in leaves:
        leaf.grad = None
    logp = (leaves[0] @ leaves[1].T).log_softmax(1)
    (0.7 * strength * (factor[:, None] * logp.exp() * logp).sum()).backward()
    for before, after, leaf in zip(without, with_bonus, leaves, strict=True):
        assert relative(after - before, leaf.grad) < 1e-10


@pytest.mark.parametrize("weighting", [ASFT(0.4), ASFT(0.4, "reverse"), GEM(), LabelSmoothing(0.2)], ids=repr)
def test_a_word_that_is_impossible_gets_what_the_others_leave_it(weighting):
    """log p = −∞ for the model and its reference: 0·log 0 is 0, and the other words' targets are as without it."""
    logp = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.1, 0.8, 0.0]], dtype=torch.float64).log()
    ref_logp = torch.tensor([[0.2, 0.6, 0.2, 0.0], [0.3, 0.3, 0.4, 0.0]], dtype=torch.float64).log()
    target = torch.tensor([1, 2])
    tokens = TokenStats(logp=logp.gather(1, target[:, None])[:, 0], target=target, sequence=target)
    found = weighting.targets(tokens, logp, ref_logp)
    if isinstance(weighting, LabelSmoothing):
        assert torch.equal(found, torch.full_like(found, 0.2 / 4))
        return
    torch.testing.assert_close(found[:, :3], weighting.targets(tokens, logp[:, :3], ref_logp[:, :3]))
    assert found[:, 3].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("strength", [-0.3, 0.3])
def test_an_entropy_bonus_with_an_impossible_word(strength):
    logp = torch.tensor([[0.5, 0.3, 0.2, 0.0]], dtype=torch.float64).log()
    tokens = TokenStats(logp=logp[:, 1], target=torch.tensor([1]), sequence=torch.tensor([0]))
    bonus = EntropyBonus(Uniform(), strength)
    found = bonus.targets(tokens, logp, None)
    torch.testing.assert_close(found[:, :3], bonus.targets(tokens, logp[:, :3], None))
    assert found[0, 3] == 0.0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("chunk_rows", [1, 16, 36])
def test_the_last_chunk_may_be_smaller(chunk_rows):
    """Nothing is resized for it, of which PyTorch would warn."""
    leaves, target, reference, _ = problem()
    loss, _ = weighted_nll(*leaves, target, ASFT(), reference=reference, chunk_rows=chunk_rows)
    theirs, _ = dense_weighted_nll(*leaves, target, ASFT(), reference=reference)
    torch.testing.assert_close(loss, theirs.to(loss.dtype))
