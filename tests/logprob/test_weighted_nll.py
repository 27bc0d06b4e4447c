"""The chunked loss against the float64 oracle: values, statistics and gradients."""

import os
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dft_lightning.logprob import LogitTransform, dense_weighted_nll, passes, rows, weighted_nll
from dft_lightning.weighting import DFT, ImportanceWeighted, TokenStats, TokenWeighting, Uniform


@dataclass(frozen=True)
class EntropyOverRank(TokenWeighting):
    """A user's weighting that needs statistics of the whole distribution."""

    needs = frozenset({"entropy", "topk_entropy", "collision", "rank", "top_p"})

    def weights(self, tokens: TokenStats) -> Tensor:
        spread = tokens.need("entropy") + tokens.need("topk_entropy") + tokens.need("collision")
        return spread / (1.0 + tokens.need("rank")) + tokens.need("top_p")


@dataclass(frozen=True)
class SentenceProbability(TokenWeighting):
    """A user's weighting of sequence scope: the geometric mean of p over the response."""

    scope = "sequence"

    def weights(self, tokens: TokenStats) -> Tensor:
        return tokens.sequence_mean(tokens.logp).exp()


WEIGHTINGS = [
    Uniform(),
    DFT(),
    DFT(floor=0.1),
    ImportanceWeighted(),
    ImportanceWeighted(level="token"),
    EntropyOverRank(),
    SentenceProbability(),
]
TRANSFORMS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "scale": 1.7, "softcap": 5.0},
}


def problem(rows=37, width=19, vocabulary=101, dtype=torch.float32, spread=1.0, seed=0):
    """Random hidden states, head and targets, with what a token brings along."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64) * spread
    head = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    sequence = torch.arange(rows) * 5 // max(rows, 1)
    ref_logp = -5 * torch.rand(rows, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (hidden, head, bias)]
    return (
        *leaves,
        targets,
        {"sequence": sequence, "ref_logp": ref_logp, "factor": 0.5 + torch.rand(rows, generator=generator)},
    )


def transform_of(name, bias):
    options = dict(TRANSFORMS[name])
    if options.pop("bias", False):
        options["bias"] = bias
    return LogitTransform(**options)


def run(function, hidden, head, bias, targets, weighting, brought, transform="plain", **options):
    leaves = [hidden, head, bias]
    for leaf in leaves:
        leaf.grad = None
    loss, tokens = function(
        hidden, head, targets, weighting, transform=transform_of(transform, bias), **brought, **options
    )
    (0.7 * loss).backward()
    grads = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
    return loss.detach(), tokens, [grad.clone() for grad in grads]


def values(outcome) -> list[Tensor]:
    """Loss, log p, weights and gradients of a `run`."""
    loss, tokens, grads = outcome
    return [loss, tokens.logp, tokens.weight, *grads]


def relative(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
@pytest.mark.parametrize("chunk_rows", [1, 8, 1000])
def test_equals_the_oracle_in_float64(weighting, transform, chunk_rows):
    hidden, head, bias, targets, brought = problem(dtype=torch.float64)
    expected = run(dense_weighted_nll, hidden, head, bias, targets, weighting, brought, transform)
    got = run(weighted_nll, hidden, head, bias, targets, weighting, brought, transform, chunk_rows=chunk_rows)
    assert relative(got[0], expected[0]) < 1e-10
    for ours, truth in zip(got[2], expected[2], strict=True):
        assert relative(ours, truth) < 1e-10
    for name, truth in expected[1].tensors().items():
        torch.testing.assert_close(got[1].tensors()[name], truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
@pytest.mark.parametrize(("rows", "vocabulary"), [(64, 128), (37, 101), (1, 3)])
def test_float32_is_as_good_as_float32_can_be(weighting, rows, vocabulary):
    """Bound: 5e-6, about 40 units of float32 rounding (1.2e-7) for sums over some hundred terms."""
    hidden, head, bias, targets, brought = problem(rows, vocabulary=vocabulary)
    expected = run(dense_weighted_nll, hidden, head, bias, targets, weighting, brought)
    got = run(weighted_nll, hidden, head, bias, targets, weighting, brought, chunk_rows=16)
    assert relative(got[0], expected[0]) < 5e-6
    assert max(relative(a, b) for a, b in zip(got[2][:2], expected[2][:2], strict=True)) < 5e-6


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
def test_bfloat16_inputs_lose_no_more_than_the_naive_computation(weighting):
    """Truth: float64 on the rounded inputs. Ours must beat the plain formula run in bfloat16."""
    hidden, head, bias, targets, brought = problem(256, 64, 512, dtype=torch.bfloat16, spread=0.2)
    truth = run(dense_weighted_nll, hidden, head, bias, targets, weighting, brought)
    ours = run(weighted_nll, hidden, head, bias, targets, weighting, brought, chunk_rows=64)
    logp = (hidden @ head.T).log_softmax(1).gather(1, targets[:, None])[:, 0]
    weight = truth[1].need("weight").to(torch.bfloat16) * brought["factor"].to(torch.bfloat16)
    naive = torch.autograd.grad((weight * -logp).sum() * 0.7, [hidden, head])
    for mine, plain, true in zip(ours[2][:2], naive, truth[2][:2], strict=True):
        assert relative(mine, true) <= relative(plain, true)
    assert ours[1].logp.dtype == ours[1].need("weight").dtype == ours[0].dtype == torch.float32
    assert (ours[1].logp - truth[1].logp).abs().max() < 1e-5  # logits are accumulated in float32, not rounded to bf16


def test_the_weight_carries_no_gradient():
    """Trap 4: grad of DFT is grad of Σ(1 − p), also where p < 1/e, where an attached weight would flip its sign."""
    hidden, head, _, targets, _ = problem(dtype=torch.float64, spread=0.1)
    loss, tokens = weighted_nll(hidden, head, targets, DFT())
    loss.backward()
    assert (tokens.p < 0.3).all()
    p = (hidden @ head.T).softmax(1).gather(1, targets[:, None])
    expected = torch.autograd.grad((1 - p).sum(), [hidden, head])
    torch.testing.assert_close(hidden.grad, expected[0], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(head.grad, expected[1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
def test_no_rows_give_a_differentiable_zero(weighting):
    hidden, head, bias, targets, brought = problem(rows=0)
    loss, tokens, grads = run(weighted_nll, hidden, head, bias, targets, weighting, brought)
    assert loss == 0
    assert len(tokens) == 0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.parametrize("weighting", [DFT(), SentenceProbability()], ids=repr)
def test_extreme_probabilities_stay_finite(weighting):
    """p from 1e-30 to 1: no inf·0 (trap 25)."""
    head = torch.eye(4, requires_grad=True)
    hidden = torch.tensor([[69.0, 0, 0, 0], [-69.0, 0, 0, 0], [500.0, 0, 0, 0], [-500.0, 0, 0, 0]], requires_grad=True)
    loss, tokens = weighted_nll(hidden, head, torch.zeros(4, dtype=torch.long), weighting, wanted=["entropy"])
    loss.backward()
    for tensor in (loss, hidden.grad, head.grad, tokens.entropy, tokens.weight):
        assert torch.isfinite(tensor).all()


def test_forbidden_tokens_count_nothing():
    """Logits of −∞, as of a padded vocabulary: probability 0 and 0·log 0 = 0, no inf·0 (trap 25)."""
    hidden, head, bias, targets, _ = problem(dtype=torch.float64)
    names = ["entropy", "topk_entropy", "collision", "rank", "top_p"]
    kept, forbidden = 101, torch.cat([bias.detach(), torch.full((7,), -torch.inf, dtype=torch.float64)])
    padded = torch.cat([head.detach(), torch.ones(7, 19, dtype=torch.float64)]).requires_grad_()
    for weighting in (DFT(), SentenceProbability()):
        _, expected, truth = run(weighted_nll, hidden, head, bias, targets, weighting, {}, "bias", wanted=names)
        _, tokens, grads = run(weighted_nll, hidden, padded, forbidden, targets, weighting, {}, "bias", wanted=names)
        for name, value in expected.tensors().items():
            torch.testing.assert_close(tokens.tensors()[name], value, rtol=1e-10, atol=1e-12)
        assert relative(grads[0], truth[0]) < 1e-10
        assert relative(grads[1][:kept], truth[1]) < 1e-10
        assert not grads[1][kept:].any()


def test_tied_weights_collect_both_gradients():
    """The head is the embedding: both uses add up."""
    _, head, _, targets, _ = problem(dtype=torch.float64)
    hidden = head[targets.flip(0)].tanh()
    loss, _ = weighted_nll(hidden, head, targets, DFT(), chunk_rows=8)
    ours = torch.autograd.grad(loss, head)[0]
    hidden = head[targets.flip(0)].tanh()
    truth = torch.autograd.grad(dense_weighted_nll(hidden, head, targets, DFT())[0], head)[0]
    assert relative(ours, truth) < 1e-10


def test_a_frozen_head_makes_no_head_gradient(monkeypatch):
    hidden, head, _, targets, _ = problem()
    made = []
    original = torch.Tensor.new_zeros
    monkeypatch.setattr(
        torch.Tensor, "new_zeros", lambda self, size, **o: made.append(size) or original(self, size, **o)
    )
    loss, _ = weighted_nll(hidden, head.detach(), targets, DFT())
    loss.backward()
    assert hidden.grad is not None
    assert head.shape not in made


def test_without_gradient_nothing_is_made(monkeypatch):
    hidden, head, _, targets, _ = problem()
    monkeypatch.setattr("dft_lightning.logprob.passes._add_products", lambda *_: pytest.fail("made gradients"))
    with torch.no_grad():
        loss, tokens = weighted_nll(hidden, head, targets, SentenceProbability())
    assert not loss.requires_grad
    torch.testing.assert_close(loss, -(tokens.need("weight") * tokens.logp).sum())


class TestSequencesInOnePass:
    """Where chunk borders can fall between sequences, the second pass is saved."""

    def passes(self, monkeypatch, weighting, **options):
        """How many passes there were, and what came out, with gradients."""
        from dft_lightning.logprob import chunked

        count, whole = [], chunked.run_pass
        monkeypatch.setattr(chunked, "run_pass", lambda *args, **more: count.append(1) or whole(*args, **more))
        hidden, head, _bias, targets, brought = problem()
        loss, tokens = weighted_nll(hidden, head, targets, weighting, **(brought | options))
        loss.backward()
        return len(count), loss.detach(), tokens.weight, hidden.grad, head.grad

    @pytest.mark.parametrize("weighting", [SentenceProbability(), ImportanceWeighted()], ids=repr)
    @pytest.mark.parametrize("rows", [8, 15, 37, 500])
    def test_it_is_the_same_as_in_two(self, monkeypatch, weighting, rows):
        one = self.passes(monkeypatch, weighting, chunk_rows=rows)
        two = self.passes(monkeypatch, weighting, chunk_rows=7)  # a sequence has 7 or 8 tokens
        assert (one[0], two[0]) == (1, 2)
        for ours, theirs in zip(one[1:], two[1:], strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_sequences_that_do_not_lie_together_need_two_where_not_all_rows_can_be_kept(self, monkeypatch):
        mixed = torch.arange(37) % 5
        two = self.passes(monkeypatch, SentenceProbability(), sequence=mixed, chunk_rows=36)
        one = self.passes(monkeypatch, SentenceProbability(), sequence=mixed)
        assert (one[0], two[0]) == (1, 2)
        for ours, theirs in zip(one[1:], two[1:], strict=True):
            torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize(("kept", "passes"), [(20, 1), (19, 2)])
    def test_the_rows_of_a_sequence_longer_than_a_chunk_are_kept(self, monkeypatch, kept, passes):
        monkeypatch.setattr(
            "dft_lightning.logprob.chunked.default_rows", lambda *_, **options: kept if "kept" in options else 9
        )
        long = torch.tensor([0] * 20 + [1] * 9 + [2] * 8)
        assert self.passes(monkeypatch, SentenceProbability(), sequence=long)[0] == passes

    def test_lengths_have_to_add_up(self):
        hidden, head, _, targets, _ = problem()
        with pytest.raises(ValueError, match="lengths add up to 36; expected 37"):
            weighted_nll(hidden, head, targets, SentenceProbability(), lengths=[30, 6])

    def test_lengths_that_are_known_are_not_looked_for(self, monkeypatch):
        monkeypatch.setattr(torch, "unique_consecutive", lambda *_, **__: pytest.fail("looked"))
        lengths = torch.bincount(problem()[4]["sequence"]).tolist()
        assert self.passes(monkeypatch, SentenceProbability(), lengths=lengths)[0] == 1


def test_weights_that_are_known_are_taken(monkeypatch):
    """As those of step scope are; the weighting is not asked, and its scope does not matter."""

    @dataclass(frozen=True)
    class Step(TokenWeighting):
        scope = "step"

        def weights(self, tokens: TokenStats) -> Tensor:
            raise AssertionError("asked")

    hidden, head, _, targets, _ = problem()
    weight = torch.rand(len(targets))
    results = []
    for options in ({"weighting": Step(), "weight": weight}, {"weighting": Uniform(), "factor": weight}):
        hidden.grad = head.grad = None
        loss, _tokens = weighted_nll(hidden, head, targets, **options)
        loss.backward()
        results.append((loss.detach(), hidden.grad.clone(), head.grad.clone()))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(weighted_nll(hidden, head, targets, Step(), weight=weight)[1].weight, weight)
    with pytest.raises(ValueError, match=r"weight is \(36,\); expected \(37,\)"):
        weighted_nll(hidden, head, targets, Step(), weight=weight[1:])


@pytest.mark.parametrize("chunk_rows", [1, 16, 33])
def test_a_likely_token_keeps_its_small_gradient(chunk_rows):
    """p − 1 at the target comes from log p by expm1: softmax minus one would cancel all but a few bits."""
    hidden, head, _, targets, _ = problem(rows=33, vocabulary=4096, spread=3.0)
    targets = (hidden.detach() @ head.detach().T).argmax(1)
    grads = []
    for function, dtype in ((weighted_nll, torch.float32), (dense_weighted_nll, torch.float64)):
        states = hidden.detach().to(dtype).requires_grad_()
        more = {"chunk_rows": chunk_rows} if function is weighted_nll else {}
        function(states, head.detach().to(dtype), targets, DFT(), **more)[0].backward()
        grads.append(states.grad.double())
    assert (grads[0] - grads[1]).norm() < 5e-6 * grads[1].norm()


def test_inputs_are_left_as_they_were():
    """Trap 24."""
    hidden, head, bias, targets, brought = problem()
    before = [tensor.detach().clone() for tensor in (hidden, head, targets, *brought.values())]
    run(weighted_nll, hidden, head, bias, targets, ImportanceWeighted(), brought, "all")
    for then, now in zip(before, (hidden, head, targets, *brought.values()), strict=True):
        assert torch.equal(then, now)


def test_differentiating_twice_is_refused():
    hidden, head, _, targets, _ = problem()
    loss, _ = weighted_nll(hidden, head, targets, DFT())
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    loss, _ = weighted_nll(hidden, head, targets, DFT())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


def test_autocast_multiplies_in_its_dtype_and_scores_in_float32():
    hidden, head, _, targets, _ = problem(64, 32, 200)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, tokens = weighted_nll(hidden, head, targets, Uniform())
    loss.backward()
    rounded = dense_weighted_nll(hidden.bfloat16(), head.bfloat16(), targets, Uniform())[1]
    assert (tokens.logp - rounded.logp).abs().max() < 1e-4
    assert hidden.grad.dtype == head.grad.dtype == torch.float32


@dataclass(frozen=True)
class Normalised(TokenWeighting):
    scope = "step"

    def weights(self, tokens: TokenStats) -> Tensor:
        return tokens.p / tokens.p.mean()


@dataclass(frozen=True)
class WrongShape(TokenWeighting):
    def weights(self, tokens: TokenStats) -> Tensor:
        return tokens.p.mean()


@pytest.mark.parametrize(
    ("weighting", "change", "message"),
    [
        (Normalised(), {}, "whole optimizer step"),
        (WrongShape(), {}, r"returned \(\).*expected one weight a token"),
        (ImportanceWeighted(), {}, r"needs \['ref_logp'\], which were not given"),
        (Uniform(), {"targets": -100}, "leave masked positions out"),
        (Uniform(), {"targets": 101}, r"ids in \[0, 101\)"),
        (Uniform(), {"ref_logp": torch.zeros(3)}, "one value a target"),
        (Uniform(), {"mystery": torch.zeros(37)}, "unknown keyword"),
        (Uniform(), {"hidden": torch.zeros(3, 4)}, r"expected \(N, H\), \(V, H\) and \(N,\)"),
        (Uniform(), {"hidden": torch.zeros(37, 18)}, r"expected \(N, H\), \(V, H\) and \(N,\)"),
        (Uniform(), {"hidden": torch.zeros(36, 19)}, r"expected \(N, H\), \(V, H\) and \(N,\)"),
        (Uniform(), {"hidden": torch.zeros(37, 19, 1)}, r"expected \(N, H\), \(V, H\) and \(N,\)"),
        (Uniform(), {"hidden": torch.zeros(37)}, r"expected \(N, H\), \(V, H\) and \(N,\)"),
        (Uniform(), {"head": torch.zeros(19)}, r"expected \(N, H\), \(V, H\) and \(N,\)"),
        (Uniform(), {"head": torch.zeros(101, 19, 1)}, r"expected \(N, H\), \(V, H\) and \(N,\)"),
        (Uniform(), {"targets": -1}, r"targets are -1 to"),
        (Uniform(), {"weight": torch.ones(37, 1)}, r"weight is \(37, 1\); expected \(37,\)"),
        (Uniform(), {"data_weight": torch.zeros(37, 1)}, "one value a target"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, TokenWeighting) else str(value)[:20],
)
def test_what_would_be_wrong_is_refused(weighting, change, message):
    hidden, head, _, targets, _ = problem()
    if "targets" in change:
        targets[3] = change.pop("targets")
    hidden, head = change.pop("hidden", hidden), change.pop("head", head)
    with pytest.raises(ValueError, match=message):
        weighted_nll(hidden, head, targets, weighting, **change)


@dataclass(frozen=True)
class Threshold(TokenWeighting):
    """Most tokens are worth exactly nothing."""

    above: float = 0.5
    scope: str = "token"

    def weights(self, tokens: TokenStats) -> Tensor:
        values = tokens.p if self.scope == "token" else tokens.sequence_mean(tokens.logp).exp()
        return torch.where(values > self.above, values, 0.0)


@pytest.mark.parametrize("above", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("scope", ["token", "sequence"])
@pytest.mark.parametrize("chunk_rows", [8, None])
def test_tokens_of_weight_zero_cost_no_product_and_change_nothing(monkeypatch, above, scope, chunk_rows):
    """Down to none that counts; a chunk in which nearly all count is multiplied as it is."""
    sizes, whole = [], passes.product_
    monkeypatch.setattr(passes, "product_", lambda out, a, b, **more: sizes.append(len(a)) or whole(out, a, b, **more))
    hidden, head, bias, targets, brought = problem(dtype=torch.float64, spread=0.3)
    weighting = Threshold(above, scope)
    ours = run(weighted_nll, hidden, head, bias, targets, weighting, brought, "all", chunk_rows=chunk_rows)
    theirs = run(dense_weighted_nll, hidden, head, bias, targets, weighting, brought, "all")
    for mine, truth in zip(values(ours), values(theirs), strict=True):
        torch.testing.assert_close(mine, truth)
    if above == 1.0:
        assert sizes.count(0) == len(sizes) // 3, "dX of rows that do not count"


class TestAtARealShape:
    """The head of a small model: what the README says of accuracy, against float64."""

    @pytest.fixture(scope="class")
    def truth(self):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(192, 576, generator=generator).bfloat16()
        head = (0.05 * torch.randn(49152, 576, generator=generator)).bfloat16()
        targets = torch.randint(49152, (192,), generator=generator)
        return hidden, head, targets, self.gradients(dense_weighted_nll, hidden.double(), head.double(), targets)

    @staticmethod
    def gradients(function, hidden, head, targets, **options):
        given = [x.clone().requires_grad_() for x in (hidden, head)]
        loss, tokens = function(*given, targets, DFT(), **options)
        loss.backward()
        return [given[0].grad, given[1].grad, tokens.logp]

    @staticmethod
    def errors(found, exact):
        return [relative(ours.double(), theirs) for ours, theirs in zip(found, exact, strict=True)]

    def test_float32(self, truth):
        hidden, head, targets, exact = truth
        errors = self.errors(self.gradients(weighted_nll, hidden.float(), head.float(), targets), exact)
        assert max(errors[:2]) < 5e-6
        assert errors[2] < 1e-6

    def test_bfloat16_inputs_with_float32_logits(self, truth):
        hidden, head, targets, exact = truth
        errors = self.errors(self.gradients(weighted_nll, hidden, head, targets), exact)
        assert max(errors[:2]) < 2.5e-3
        assert errors[2] < 1e-6

    def test_bfloat16_logits_are_no_worse_than_a_plain_bfloat16_computation(self, truth):
        def plain(hidden, head, targets, _):
            logp = (hidden @ head.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
            tokens = TokenStats(logp=logp.detach(), target=targets, sequence=targets)
            return -(logp.detach().exp() * logp).sum(), tokens

        hidden, head, targets, exact = truth
        ours = self.errors(self.gradients(weighted_nll, hidden, head, targets, logits=torch.bfloat16), exact)
        theirs = self.errors(self.gradients(plain, hidden, head, targets), exact)
        assert all(mine <= 1.01 * other for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
@pytest.mark.parametrize("chunk_rows", [1, 7, None])
def test_bfloat16_logits(weighting, chunk_rows):
    """All transforms and scopes: the oracle on the rounded inputs, off by the rounding of logits and gradients.

    A logit of size z is off by z·2⁻⁹, p by as much relatively, so a gradient by some z·2⁻⁹; z is at most 16 here.
    """
    hidden, head, bias, targets, brought = problem(dtype=torch.bfloat16, spread=0.5)
    options = {"chunk_rows": chunk_rows, "logits": torch.bfloat16}
    ours = run(weighted_nll, hidden, head, bias, targets, weighting, brought, "all", **options)
    exact = [x.detach().double().requires_grad_() for x in (hidden, head, bias)]
    theirs = run(dense_weighted_nll, *exact, targets, weighting, brought, "all")
    for mine, truth in zip(values(ours), values(theirs), strict=True):
        assert relative(mine, truth) < 16 * 2**-9


def test_logits_in_another_precision_are_refused():
    hidden, head, _, targets, _ = problem()
    with pytest.raises(ValueError, match=r"logits are to be in torch.bfloat16; expected torch.float32"):
        weighted_nll(hidden, head, targets, DFT(), logits=torch.bfloat16)


@pytest.mark.parametrize("weighting", [*WEIGHTINGS, Threshold()], ids=repr)
def test_no_device_is_waited_for(weighting, monkeypatch):
    """Tensors without content cannot be looked at: whatever a GPU would be waited for fails on them."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for them
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    hidden, head, bias, targets, brought = problem()
    lengths = torch.bincount(brought["sequence"]).tolist()
    hidden, head, bias = (x.detach().to("meta").requires_grad_() for x in (hidden, head, bias))
    brought = {name: value.to("meta") for name, value in brought.items()}
    for known in (lengths, None):
        loss, _ = weighted_nll(
            hidden, head, targets.to("meta"), weighting, transform=LogitTransform(bias, 1.7, 5.0), lengths=known,
            wanted=("entropy", "topk_entropy", "collision", "rank", "top_p"), **brought,
        )  # fmt: skip
        loss.backward()


@pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="of the run in Triton's interpreter")
def test_these_tests_go_through_the_kernel():
    assert rows.kernel_serves(torch.empty(1, 1))


def test_whole_sequences_with_narrow_logits_hold_no_more(monkeypatch):
    """Their rows wait in float32 beside the logits, so that a chunk has fewer of them."""
    sizes = []
    monkeypatch.setattr("dft_lightning.logprob.chunked.default_rows", lambda *_, size, **__: sizes.append(size) or 1000)
    hidden, head, _, targets, _ = problem(dtype=torch.bfloat16)
    for weighting in (DFT(), SentenceProbability()):
        weighted_nll(hidden, head, targets, weighting, logits=torch.bfloat16)
        weighted_nll(hidden, head, targets, weighting)
    assert sizes == [2, 2, 4, 4, 2 + 4, 2 + 4, 4, 4]


def test_small_weights_survive_float16():
    """A token of a response of 3,000 weighs 1/3,000; a gradient scaler's factor comes after the gradient by the logits.

    That is rounded to 11 bits, as the logits are, which are below 4 here.
    """
    hidden, head, _, targets, _ = problem(64, 32, 2000, dtype=torch.float64, spread=0.1)
    factor = torch.full((64,), 1 / 3000, dtype=torch.float64)
    half = [x.detach().half().requires_grad_() for x in (hidden, head)]
    exact = [x.detach().double().requires_grad_() for x in half]
    for given, function, options in ((half, weighted_nll, {"logits": torch.float16}), (exact, dense_weighted_nll, {})):
        loss, _ = function(*given, targets, Uniform(), factor=factor, **options)
        (2.0**14 * loss).backward()
    for ours, theirs in zip(half, exact, strict=True):
        assert relative(ours.grad, theirs.grad) < 4 * 2**-11


@pytest.mark.parametrize("target", [0, 100])
def test_the_first_and_the_last_token_of_the_vocabulary_are_targets(target):
    hidden, head, _, targets, _ = problem()
    targets.fill_(target)
    _, tokens = weighted_nll(hidden, head, targets, Uniform())
    torch.testing.assert_close(tokens.logp, (hidden @ head.T).log_softmax(1)[:, target].detach())


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
def test_the_loss_without_gradients_is_that_with_them(weighting, together):
    """In validation, too, sequences longer than a chunk, and those that do not lie together."""
    hidden, head, _bias, targets, brought = problem(dtype=torch.float64)
    if not together:
        brought["sequence"] = torch.arange(37) % 5
    with torch.no_grad():
        ours, tokens = weighted_nll(hidden, head, targets, weighting, chunk_rows=4, **brought)
        theirs, truth = dense_weighted_nll(hidden, head, targets, weighting, **brought)
    torch.testing.assert_close(ours, theirs)
    for name in ("logp", "weight"):
        torch.testing.assert_close(getattr(tokens, name), getattr(truth, name))


@dataclass(frozen=True)
class Scheduled(TokenWeighting):
    """Grows over the training, and from token to token of a response."""

    scope = "sequence"

    def weights(self, tokens: TokenStats) -> Tensor:
        return tokens.sequence_sum(torch.ones_like(tokens.p)) * (1.0 + tokens.progress)


@pytest.mark.parametrize("function", [weighted_nll, dense_weighted_nll])
def test_what_is_not_given(function):
    """The training begins, all tokens are of one sequence, count once, and logits are the products."""
    hidden, head, _, targets, _ = problem(dtype=torch.float64)
    loss, tokens = function(hidden, head, targets, Scheduled())
    assert tokens.weight.tolist() == [37.0] * 37
    assert tokens.sequence.tolist() == [0] * 37
    assert tokens.progress == 0.0
    logp = (hidden @ head.T).log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(loss, -37.0 * logp.sum())
    for name, value in tokens.tensors().items():
        assert not value.requires_grad, name
    assert function(hidden, head, targets, Scheduled(), progress=0.5)[1].weight[0] == 55.5


def test_statistics_are_found_only_where_they_are_asked_for():
    hidden, head, _, targets, _ = problem()
    weight = torch.ones(37)
    assert weighted_nll(hidden, head, targets, EntropyOverRank(), weight=weight)[1].entropy is None
    found = weighted_nll(hidden, head, targets, EntropyOverRank(), weight=weight, wanted=("rank",))[1]
    assert (found.entropy, found.rank is None) == (None, False)
    assert weighted_nll(hidden, head, targets, EntropyOverRank())[1].entropy is not None


def test_a_chunk_of_targets_has_room_for_what_lies_beside(monkeypatch):
    """A gradient of its own, and the reference's logits: twice and three times the bytes of a row."""
    from dft_lightning.logprob import ReferenceHead
    from dft_lightning.weighting import ASFT, LabelSmoothing

    sizes = []
    monkeypatch.setattr(
        "dft_lightning.logprob.chunked.default_rows",
        lambda *_, size, kept=False: sizes.append((size, kept)) or 1000,
    )
    hidden, head, _, targets, _ = problem()
    weighted_nll(hidden, head, targets, DFT())
    weighted_nll(hidden, head, targets, LabelSmoothing(0.1))
    weighted_nll(hidden, head, targets, ASFT(), reference=ReferenceHead(hidden.detach(), head.detach()))
    assert sizes == [(4, False), (4, True), (8, False), (8, True), (12, False), (12, True)]
