"""The Triton row step against float64 and against plain torch in its own precision.

These run on a GPU; without one in Triton's interpreter, for which `test_kernel.py` starts a process of its own, since
it has to be switched on before triton is imported.

Shapes: R rows, V vocabulary.
"""

import random
from dataclasses import replace

import pytest
import torch
from kernel_truth import (
    BUILT_IN,
    INTERPRETED,
    NAMES,
    TRANSFORMS,
    UNIT,
    Bounds,
    Mine,
    check_fused,
    check_scores,
    plain,
    problem,
    within,
)

from dft_lightning.logprob import LogitTransform, kernel
from dft_lightning.weighting import DFT, ImportanceWeighted, TokenStats, Uniform
from dft_lightning.weighting.base import checked_weights

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
REASON = kernel.unsuitable(DEVICE)
if REASON and not INTERPRETED:
    pytest.skip(f"{REASON}; the interpreter has a process of its own", allow_module_level=True)
SHAPES = [(3, 1, 1), (5, 7, 4), (3, 1000, 256), (2, 4099, 512), (3, 300, 4096)]  # R, V, block


@pytest.fixture
def device() -> torch.device:
    assert REASON is None
    return DEVICE


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics(device, shape, name):
    given = problem(device, *shape, name)
    before = given.logits.clone()
    found = given.score()
    assert torch.equal(given.logits, before)
    assert {key: value.dtype for key, value in found.items()} == {
        key: torch.int64 if key == "rank" else torch.float32 for key in ("logp", "lse", *NAMES)
    }
    check_scores(given, found, plain(given.wide()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_narrow_products_are_float32(device, dtype):
    given = problem(device, 4, 1000, 256, "all", dtype)
    check_scores(given, given.score(), plain(given.wide()))


@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_asked_for(device, name):
    given = problem(device, 3, 100, 32)
    found = given.score((name,))
    assert found.keys() == {"logp", "lse", name}
    assert torch.equal(found[name], given.score()[name])


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("weighting", BUILT_IN, ids=repr)
def test_fused(device, weighting, name):
    check_fused(problem(device, 4, 333, 64, name), weighting, torch.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_narrower_gradient_lies_over_its_products(device, shape, dtype):
    """What is written must not reach what is still to be read."""
    check_fused(problem(device, *shape, "all"), DFT(), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_products(device, dtype):
    check_fused(problem(device, 4, 1000, 256, "bias", dtype), DFT(), dtype)


@pytest.mark.parametrize("weighting", BUILT_IN, ids=repr)
def test_no_worse_than_plain_float32(device, weighting):
    """The kernel adds up more carefully, so it may not be further off than plain torch, but for a few roundings."""
    given = problem(device, 8, 2000, 256)
    truth, ordinary = plain(given.wide(), weighting), plain(given, weighting)
    _, grad = given.fused_(weighting)
    ours, theirs = ((x.double() - truth.grad).norm() / truth.grad.norm() for x in (grad, ordinary.grad))
    assert ours <= theirs + 4 * UNIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_lie_apart(device, dtype):
    given = problem(device, 4, 101, 32, padding=11)
    whole = given.logits.as_strided((4, 112), (112, 1))
    padding = whole[:, 101:].clone()
    check_fused(given, DFT(), dtype)
    assert torch.equal(whole[:, 101:], padding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighting", [Mine(), *BUILT_IN], ids=repr)
def test_two_calls(device, weighting, dtype):
    """With Python in between, for any weighting; and for a built-in one the same as in one call."""
    given = problem(device, 4, 333, 64, "all")
    before = replace(given, logits=given.logits.clone())
    truth = plain(given.wide(), weighting)
    found = given.score()
    stats = TokenStats(logp=found["logp"], target=given.target, sequence=given.target, ref_logp=given.ref_logp)
    coefficient = checked_weights(weighting, stats) * given.factor
    grad = given.gradient_(found, coefficient, dtype)
    assert grad.dtype == dtype
    assert grad.data_ptr() == given.logits.data_ptr()
    bound = Bounds(before, truth).grad(truth, dtype)
    within(grad, truth.grad, bound)
    if kernel.fuses(weighting):
        fused, gradient = before.fused_(weighting, NAMES, dtype)
        assert all(torch.equal(fused[name], found[name]) for name in found)
        within(grad, gradient.double(), 2 * bound)


def test_without_a_factor(device):
    given = problem(device, 4, 50, 16)
    given.factor = torch.ones_like(given.factor)
    again = replace(given, logits=given.logits.clone())
    assert torch.equal(given.fused_(DFT(), factor=False)[1], again.fused_(DFT())[1])


@pytest.mark.parametrize("weighting", BUILT_IN, ids=repr)
def test_extreme_probabilities(device, weighting):
    """p from 1e-30 to 1, and logits so large that their sum of exponentials overflows."""
    given = problem(device, 6, 40, 16)
    given.logits.zero_()
    given.logits[:, 3] = torch.tensor([69.0, -69.0, 12.0, 500.0, -500.0, 1e4])
    given.target.fill_(3)
    given.target[5] = 7
    check_fused(given, weighting, torch.float32)


@pytest.mark.parametrize("calls", [1, 2])
def test_a_likely_token_keeps_its_small_gradient(device, calls):
    """p − 1 is expm1(log p) to the last digit: softmax minus one would keep a few bits."""
    given = problem(device, 3, 4, 4)
    given.logits[:] = torch.tensor([0.0, -10.0, -11.0, -12.0])
    given.logits[:, 1:] -= torch.tensor([[0.0], [2.0], [4.0]], device=device)
    given.target.zero_()
    if calls == 1:
        found, grad = given.fused_(Uniform())
    else:
        found = given.score()
        grad = given.gradient_(found, given.factor)
    expected = given.factor.double() * torch.expm1(found["logp"].double())
    within(grad[:, 0], expected, 4 * UNIT * expected.abs())


def test_the_functions_of_the_kernel_are_exact_to_a_few_units(device):
    """Each is a series near 0 and exponentials elsewhere, which cancel least where the two meet: a grid over both.

    Of a series few roundings are left, 4 units. exp is off by 2 and as many units as its argument is large, and what is
    taken from it, or divided, by as much of that as it contributes.
    """
    from kernel_functions import apply

    steps = torch.linspace(-1.0, 1.0, 4096, dtype=torch.float64)
    for scale in (0.01, 0.3, 0.6, 4.0):
        x = (scale * steps).float().to(device)
        wide = x.double()
        tanh, slope, expm1 = (torch.empty_like(x) for _ in range(3))
        apply[(1,)](x, -x.abs(), tanh, slope, expm1, count=len(x))
        decay, off = (-2.0 * wide.abs()).exp(), 2.0 + 2.0 * wide.abs()
        far = off * decay * (1.0 / (1.0 - decay) + 1.0 / (1.0 + decay))
        bound = 4.0 + torch.where(wide.abs() < 0.25, 0.0, far)
        within(tanh, wide.tanh(), bound * UNIT * wide.tanh().abs())
        within(slope, wide.cosh() ** -2.0, (8.0 + off) * UNIT * wide.cosh() ** -2.0)
        truth = torch.expm1(-wide.abs())
        exp = torch.where(wide.abs() < 0.5, 0.0, (2.0 + wide.abs()) * (1.0 + truth))
        within(expm1, truth, (exp + 4.0 * truth.abs()) * UNIT)


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("common", [3000.0, -3000.0])
def test_a_common_shift_of_all_logits_costs_nothing(device, calls, common):
    """A log-sum-exp of 3,000 is rounded by 1e-4; log p and the gradient may not be."""
    given = problem(device, 4, 100, 32)
    given.logits.mul_(64).round_().div_(64)  # so that adding 3,000 is exact
    given.logits.add_(common)
    if calls == 1:
        check_fused(given, DFT(), torch.float32)
        return
    truth = plain(given.wide())
    bound = Bounds(given, truth).grad(truth, torch.float32)
    within(given.gradient_(given.score(), given.factor), truth.grad, bound)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("first", [0, 40])
def test_forbidden_tokens_count_nothing(device, softcap, first):
    """Logits of −∞, in whole blocks too: probability 0 and 0·log 0 = 0."""
    transform = LogitTransform(softcap=softcap)
    given = replace(problem(device, 3, 100, 16), transform=transform)
    given.target[:] = torch.tensor([45, 60, 79])
    if softcap is None:
        given.logits[:, first : first + 20 + 20 * (first == 0)] = -torch.inf
        given.target[:] = torch.tensor([90, 85, 99]) if first else given.target
    else:
        given.logits[:, first] = -torch.inf
    truth = plain(given.wide(), DFT())
    assert truth.found["entropy"].isfinite().all()
    check_fused(given, DFT(), torch.bfloat16)


def test_a_certain_token_has_no_entropy(device):
    given = problem(device, 2, 50, 16)
    given.logits.fill_(-torch.inf)
    given.logits[:, 33] = 2.0
    given.target.fill_(33)
    found, grad = given.fused_(DFT())
    expected = {"logp": 0.0, "lse": 2.0, "entropy": 0.0, "topk_entropy": 0.0, "collision": 1.0, "rank": 0}
    expected |= {"top_p": 1.0, "weight": 1}
    assert {name: value.tolist() for name, value in found.items()} == {k: [v, v] for k, v in expected.items()}
    assert not grad.any()


def test_ties_have_the_same_rank(device):
    given = problem(device, 3, 100, 16, "all")
    given.transform = replace(given.transform, bias=torch.zeros_like(given.transform.bias))
    given.logits[:] = torch.tensor([0.3, 1.7, -2.9, 0.9]).repeat(25).to(device)
    given.target[:] = torch.tensor([0, 1, 98])
    assert given.score()["rank"].tolist() == [50, 0, 75]


@pytest.mark.parametrize("weighting", BUILT_IN, ids=repr)
def test_what_is_no_number_shows(device, weighting):
    """A floor or a clip must not hide it, and other rows must not see it."""
    given = problem(device, 3, 40, 16)
    given.logits[1, 20] = torch.nan
    found, grad = given.fused_(weighting)
    assert found["logp"].isnan().tolist() == [False, True, False]
    assert found["weight"].isnan().tolist() == [False, type(weighting) is not Uniform, False]
    assert grad.isnan().all(1).tolist() == [False, True, False]
    assert not grad[::2].isnan().any()


def test_a_target_outside_the_vocabulary_shows(device):
    given = problem(device, 3, 40, 16)
    given.target[1:] = torch.tensor([-100, 40])
    assert given.score()["logp"].isneginf().tolist() == [False, True, True]


def test_no_rows(device, monkeypatch):
    monkeypatch.setattr(kernel, "_functions", lambda: pytest.fail("started a kernel"))
    given = problem(device, 0, 40, 16)
    found, grad = given.fused_(DFT(), NAMES, torch.bfloat16)
    assert {len(value) for value in found.values()} == {0}
    assert grad.shape == (0, 40)
    assert given.gradient_(found, given.factor).shape == (0, 40)


def test_logits_beyond_the_reach_of_32_bits(device):
    """The third row's offset does not fit, though the stride does."""
    apart = 2**30 + 8
    try:
        memory = torch.empty(2 * apart + 40, dtype=torch.bfloat16, device=device)
    except RuntimeError:
        pytest.skip("not enough memory")
    given = problem(device, 3, 40, 16, dtype=torch.bfloat16)
    products = given.logits
    given.logits = memory.as_strided((3, 40), (apart, 1)).copy_(products)
    check_scores(given, given.score(), plain(given.wide()))
    given.gradient_(given.score(), torch.zeros_like(given.factor))
    assert not given.logits.any()
    given.logits.copy_(products)
    check_fused(given, DFT(), torch.bfloat16, ("entropy",))


@pytest.mark.parametrize("seed", range(16))
def test_any_shape(device, seed):
    draw = random.Random(seed)
    rows, vocabulary, block = draw.randint(1, 5), draw.randint(1, 700), 2 ** draw.randint(3, 10)
    source = draw.choice([torch.float32, torch.bfloat16])
    dtype = draw.choice([source, torch.bfloat16])
    spread = draw.choice([0.1, 3.0, 30.0])
    name = draw.choice(list(TRANSFORMS))
    given = problem(device, rows, vocabulary, block, name, source, spread, draw.randint(0, 9), seed)
    check_fused(given, draw.choice(BUILT_IN), dtype, draw.sample(NAMES, draw.randint(0, 4)))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighting", [DFT(), ImportanceWeighted(level="token")], ids=repr)
def test_a_real_vocabulary_on_a_gpu(device, weighting, dtype):
    """Many programs at once, blocks of the size in use; and the host waits for none of it."""
    given = replace(problem(device, 512, 151936, kernel.BLOCK), transform=LogitTransform(softcap=30.0))
    check_fused(given, weighting, dtype)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        given.gradient_(given.score(), given.factor)
        given.fused_(weighting, NAMES, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
