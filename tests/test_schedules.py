"""Every schedule of transformers, with its arguments: as transformers computes it, and resumed to the bit."""

from functools import partial

import pytest
import torch
from resuming import resumes_to_the_bit
from transformers import SchedulerType, get_scheduler

from dft_lightning import FineTuner
from dft_lightning.errors import UserError
from dft_lightning.schedules import accepted, check, described, names, schedule
from dft_lightning.weighting import DFT

ARGUMENTS = {
    "cosine_with_min_lr": {"min_lr": 0.001},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 3, "min_lr_ratio": 0.1},
    "polynomial": {"lr_end": 0.002, "power": 2.0},
    "cosine_with_restarts": {"num_cycles": 2},
    "inverse_sqrt": {"timescale": 3},
}
FOLLOWS_THE_LOSS = {"reduce_lr_on_plateau", "greedy"}
KINDS = sorted(kind.value for kind in SchedulerType)


def optimizer(*rates):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates], lr=0.5)


@pytest.mark.parametrize("name", KINDS)
def test_the_rates_are_those_of_transformers(name):
    if name in FOLLOWS_THE_LOSS:
        with pytest.raises(UserError, match=f"'{name}'.*expected one that is a function of the step"):
            check(name, None, 0.01)
        assert name not in names()
        return
    options = ARGUMENTS.get(name, {})
    ours, theirs = optimizer(0.01), torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.01)
    mine = schedule(ours, name, 2, 10, options)
    truth = get_scheduler(name, theirs, 2, 10, scheduler_specific_kwargs=options)
    for _ in range(11):
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
        for each in (ours, theirs, mine, truth):
            each.step()


def test_each_group_has_the_schedule_of_its_own_rate():
    """An absolute rate at the end is that of all groups, whatever each begins with."""
    groups = optimizer(0.1, 0.01)
    made = schedule(groups, "cosine_with_min_lr", 0, 4, {"min_lr": 0.001})
    for _ in range(4):
        groups.step()
        made.step()
    assert [group["lr"] for group in groups.param_groups] == pytest.approx([0.001, 0.001])


SAMPLE = ["polynomial", "warmup_stable_decay"]
OTHERS = [pytest.param(name, marks=pytest.mark.exhaustive) for name in names() if name not in SAMPLE]


@pytest.mark.parametrize("name", [*SAMPLE, *OTHERS])
def test_it_resumes_to_the_bit(model_dir, rows_file, tmp_path, name):
    module = {"optimizer": partial(torch.optim.AdamW, lr=0.01), "lr_schedule": name, "warmup_ratio": 0.25}
    resumes_to_the_bit(model_dir, rows_file, tmp_path, module | {"lr_schedule_kwargs": ARGUMENTS.get(name)})


WRONG = [
    ("cosine", {"min_lr": 0.1}, "lr_schedule_kwargs has min_lr, which cosine does not have: it takes num_cycles"),
    ("constant", {"power": 1}, "has power, which constant does not have: it takes none"),
    ("polynomial", {"power": "two"}, "model.lr_schedule is 'polynomial'"),
    ("polynomial", {"lr_end": 1.0}, "must be smaller than initial lr"),
    ("linear", {"num_warmup_steps": 3}, "has num_warmup_steps, which linear does not have"),
    ("warmup_stable_decay", {}, r"needs --model.lr_schedule_kwargs '\{num_decay_steps: …\}'"),
    ("warmup_stable_decay", {"num_decay_steps": 3, "decay_type": "steep"}, "Unknown decay type: steep"),
    ("cosine_with_min_lr", {}, "One of min_lr or min_lr_rate"),
    ("cosine_with_min_lr", {"min_lr": -1.0}, "lr_schedule_kwargs.min_lr is -1.0; expected a number"),
    ("zigzag", {}, "model.lr_schedule is 'zigzag'; expected one of constant, "),
]


@pytest.mark.parametrize(("name", "options", "message"), WRONG)
def test_wrong_arguments_are_named_before_anything_is_loaded(name, options, message):
    with pytest.raises(UserError, match=message):
        FineTuner("no/such/model", DFT(), lr_schedule=name, lr_schedule_kwargs=options)


def test_a_decay_that_is_longer_than_the_run():
    with pytest.raises(UserError, match=r"num_decay_steps is 9, with 2 steps of warm-up more than the run's 10 steps"):
        schedule(optimizer(0.1), "warmup_stable_decay", 2, 10, {"num_decay_steps": 9})


def test_in_words():
    assert accepted("warmup_stable_decay")["num_decay_steps"]
    assert described("cosine", {"num_cycles": 2}, 3, 30) == "cosine, num_cycles 2, warm-up over 3 of 30 steps"
    assert described("constant", None, 3, 30) == "constant, no warm-up (it has none)"
