"""The clipping of a step's gradient, and what is summed over its micro-batches."""

import math
from types import SimpleNamespace

import pytest
import torch

from dft_lightning.step import StepInTheMaking, _clip
from dft_lightning.weighting import TokenStats


def gradients():
    """Of norm 13."""
    return [torch.tensor([3.0, -4.0]), torch.tensor([[12.0]])]


@pytest.mark.parametrize("limit", [0.1, 1.0, 12.9, 13.0, 13.1, 1e6])
def test_a_norm_is_scaled_down_to_the_limit_and_never_up(limit):
    clipped = gradients()
    _clip(clipped, limit, torch.tensor(13.0))
    factor = min(limit / (13.0 + 1e-6), 1.0)
    for ours, given in zip(clipped, gradients(), strict=True):
        torch.testing.assert_close(ours, factor * given, rtol=2**-22, atol=0)  # two roundings of float32


@pytest.mark.parametrize("limit", [0.5, 3.5, 100.0])
def test_without_a_norm_each_entry_is_limited(limit):
    clipped = gradients()
    _clip(clipped, limit, None)
    for ours, given in zip(clipped, gradients(), strict=True):
        assert torch.equal(ours, given.clamp(-limit, limit))


def test_there_may_be_no_gradient():
    _clip([], 1.0, torch.tensor(0.0))
    _clip([], 1.0, None)


def tokens(count):
    return TokenStats(
        logp=torch.full((count,), -0.5),
        target=torch.zeros(count, dtype=torch.long),
        sequence=torch.zeros(count, dtype=torch.long),
        weight=torch.ones(count),
        rank=torch.zeros(count, dtype=torch.long),
    )


def batch(count):
    return SimpleNamespace(counts=[count], sequence=torch.zeros(count, dtype=torch.long), row=torch.tensor([0]))


class Trainer:
    """Two ranks that have the same."""

    world_size, accumulate_grad_batches, global_step = 2, 3, 0
    strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: 2 * tensor)


def made(terms=None):
    """A step of micro-batches of two tokens and one, on two ranks."""
    step = StepInTheMaking("tokens", "tokens", 10)
    step.wishes = {"rest": lambda: True, "work": lambda: False}
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    unused = torch.nn.Parameter(torch.zeros(2))
    for count in (2, 1):
        step.add(torch.tensor(0.5 * count), batch(count), tokens(count), terms and {"router": torch.tensor(0.25)})
    step.normalise(Trainer, [parameter, unused])
    return step, parameter, unused


def test_the_gradient_is_divided_by_all_tokens_of_the_step():
    """Lightning has divided it by two ranks and three micro-batches."""
    step, parameter, unused = made()
    torch.testing.assert_close(parameter.grad, torch.tensor([3.0, 4.0]) * 2 * 3 / 6)
    step.clip(Trainer, [parameter, unused], 1.0, None)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))
    assert unused.grad is None
    assert step.wished == {"rest"}


@pytest.mark.parametrize(("algorithm", "expected"), [(None, [0.6, 0.8]), ("norm", [0.6, 0.8]), ("value", [1.0, 1.0])])
def test_the_algorithm_of_clipping(algorithm, expected):
    step, parameter, unused = made()
    step.clip(Trainer, [parameter, unused], 1.0, algorithm)
    torch.testing.assert_close(parameter.grad, torch.tensor(expected))


def test_what_is_logged_and_begins_again():
    step, parameter, unused = made(terms=True)
    step.clip(Trainer, [parameter, unused], None, None)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])
    logged = step.close(optimizer)
    assert float(logged["router"]) == 4 * 0.25  # two micro-batches of two ranks
    assert float(logged["grad_norm"]) == pytest.approx(5.0)
    assert float(logged["lr"]) == 0.1
    assert float(logged["objective"]) == pytest.approx(0.5)
    assert float(logged["skipped_steps"]) == 0.0
    assert "top1" not in logged
    step.add(torch.tensor(7.0), batch(1), tokens(1))
    step.normalise(Trainer, [parameter])
    step.clip(Trainer, [parameter], None, None)
    again = step.close(optimizer)
    assert float(again["objective"]) == pytest.approx(7.0)
    assert "router" not in again


@pytest.mark.parametrize("bad", ["loss", "norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_whose_loss_or_gradient_is_not_finite_takes_the_gradient_away(bad, value, monkeypatch):
    step, parameter, unused = made()
    if bad == "loss":
        step._sums[:] = value
    else:
        parameter.grad[0] = value
    judged = []
    monkeypatch.setattr(step.skipped, "judge", lambda finite, trainer, facts: judged.append((finite, sorted(facts))))
    step.clip(Trainer, [parameter, unused], None, None)
    assert judged == [(False, ["loss", "norm"])]
    assert parameter.grad is None
