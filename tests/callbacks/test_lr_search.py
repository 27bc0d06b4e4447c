"""`LearningRateFinder`: what it finds is in force and kept, and the search leaves nothing else behind."""

import copy
import math
import shutil

import lightning.pytorch as pl
import pytest
import torch
from harness import fit, logger
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner

from dft_lightning import FineTuner, NuminaMathDataModule
from dft_lightning.callbacks import Checkpoints
from dft_lightning.callbacks.checkpoints import checkpoint_folder
from dft_lightning.callbacks.lr_search import Curve
from dft_lightning.errors import UserError
from dft_lightning.models import LoRA
from dft_lightning.weighting import PSFT, TALR, Uniform

MODULE = {"lr_schedule": "constant", "warmup_ratio": 0.0}
FINDER = {"min_lr": 1e-5, "max_lr": 1.0, "num_training_steps": 16}


class Watch(pl.Callback):
    """Learning rates of the steps, weights after each, the random state at the start; ends the run if asked."""

    def __init__(self, end_after=None):
        self.rates, self.weights, self.end_after = [], [], end_after

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.end_after:
            raise KeyboardInterrupt

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.weights.append([w.detach().clone() for w in module.parameters()])


def run(model, rows, folder, *callbacks, lr=0.01, end_after=None, optimizer=torch.optim.AdamW, **options):
    watch = Watch(end_after)
    module = MODULE | {"optimizer": lambda p: optimizer(p, lr=lr)} | options.pop("module", {})
    settings = {"enable_checkpointing": True, "default_root_dir": folder, "logger": logger(folder)} | options
    data = {"micro_batch_size": 4} | options.pop("data", {})
    weighting = settings.pop("weighting", None)
    settings.pop("data", None)
    try:
        return watch, *fit(
            model,
            rows,
            weighting,
            module=module,
            data=data,
            callbacks=[*callbacks, watch, Checkpoints(1)],
            recorder=False,
            **settings,
        )
    except SystemExit:
        assert end_after is not None
        return watch, None, None, None


CASES = {
    "adam": {},
    "momentum": {"optimizer": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)},
    "state from the start": {"optimizer": torch.optim.Adagrad},
    "dropout": {"module": {"lora": LoRA(rank=4, dropout=0.5)}},
    "step scope": {"weighting": TALR()},
    "packed": {"data": {"packing": True, "micro_batch_size": 1}},
    "bf16": {"precision": "bf16-true"},
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_that_with_the_found_rate_from_the_start(model_dir, rows_file, tmp_path, case):
    """To the bit: the search changes no weight, state of the optimizer, counter, random number or file."""
    options = CASES[case]
    finder = LearningRateFinder(**FINDER)
    found, _, _, trainer = run(model_dir, rows_file, tmp_path / "found", finder, **options)
    lr = finder.optimal_lr.suggestion()
    assert 1e-5 < lr < 1.0
    assert found.rates == [lr] * 4
    given, _, _, other = run(model_dir, rows_file, tmp_path / "given", lr=lr, **options)
    for ours, truth in zip(found.weights, given.weights, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(ours, truth, strict=True))
    files = [
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "tfevents" not in path.name)
        for folder in (tmp_path / "found", tmp_path / "given")
    ]
    assert files[0] == files[1]
    assert trainer.callback_metrics.keys() == other.callback_metrics.keys()
    assert trainer.callback_metrics["train/lr"] == pytest.approx(lr)


def test_a_resumed_run_keeps_the_rate_without_another_search(model_dir, rows_file, tmp_path, monkeypatch, caplog):
    whole, *_ = run(model_dir, rows_file, tmp_path / "whole", LearningRateFinder(**FINDER))
    run(model_dir, rows_file, tmp_path / "parts", LearningRateFinder(**FINDER), end_after=2)
    monkeypatch.setattr("dft_lightning.callbacks.lr_search._Search.run", None)
    last = checkpoint_folder(tmp_path / "parts") / "last.ckpt"
    shutil.copy(last, tmp_path / "second.ckpt")
    with caplog.at_level("INFO"):
        parts, *_ = run(model_dir, rows_file, tmp_path / "parts", LearningRateFinder(**FINDER), ckpt_path=last)
    assert parts.rates == whole.rates[2:]
    assert "lr " not in caplog.text.partition("other settings")[2]
    for ours, truth in zip(parts.weights, whole.weights[2:], strict=True):
        assert all(torch.equal(one, two) for one, two in zip(ours, truth, strict=True))
    own, *_ = run(
        model_dir, rows_file, tmp_path / "parts", ckpt_path=tmp_path / "second.ckpt", lr=0.123
    )  # without the callback
    assert own.rates == [0.123] * 2


def test_it_only_suggests_where_asked(model_dir, rows_file, tmp_path):
    watch, *_ = run(model_dir, rows_file, tmp_path, LearningRateFinder(**FINDER, update_attr=False), lr=0.0123)
    assert watch.rates == [0.0123] * 4


class Breaks(torch.optim.SGD):
    """A model that is lost at a high learning rate."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data.fill_(torch.nan) if group["lr"] > 1 else None


def test_a_search_that_diverges_skips_no_step_of_the_run(model_dir, rows_file, tmp_path):
    rates = {"min_lr": 1e-5, "max_lr": 100.0, "num_training_steps": 40}
    finder = LearningRateFinder(**rates, early_stop_threshold=None, update_attr=False)
    watch, tuner, _, trainer = run(model_dir, rows_file, tmp_path, finder, optimizer=Breaks)
    assert len(finder.optimal_lr.results["lr"]) < 40
    assert trainer.callback_metrics["train/skipped_steps"] == tuner.step.skipped.total == 0
    assert not (tmp_path / "skipped_steps.jsonl").exists()
    assert len(watch.rates) == 4


def test_the_steepest_descent_by_hand():
    """Against the logarithm: a loss of −tanh(log10(lr) + 3) falls most steeply at 1e-3."""
    curve = Curve("exponential", 1e-6, 1.0, 61)
    rates = [10 ** (-6 + place / 10) for place in range(61)]
    curve.results = {"lr": rates, "loss": [-math.tanh(math.log10(lr) + 3) for lr in rates]}
    assert curve.suggestion() == pytest.approx(1e-3)
    curve = Curve("linear", 0.0, 6.0, 61)
    curve.results = {"lr": [place / 10 for place in range(61)], "loss": [-math.tanh(p / 10 - 3) for p in range(61)]}
    assert curve.suggestion() == pytest.approx(3.0)


def test_lightnings_tuner_finds_it_for_the_next_fit(model_dir, rows_file, tmp_path):
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1}
    options |= {"enable_checkpointing": False, "accelerator": "cpu", "use_distributed_sampler": False}
    watch = Watch()
    trainer = pl.Trainer(**options, default_root_dir=tmp_path, callbacks=[watch])
    tuner = FineTuner(str(model_dir), Uniform(), **MODULE)
    data = NuminaMathDataModule(str(rows_file), global_batch_size=8, micro_batch_size=4, max_length=200)
    found = Tuner(trainer).lr_find(tuner, data, min_lr=1e-5, num_training=16).suggestion()
    assert watch.rates == []
    trainer.fit(tuner, data)
    assert tuner.lr == found
    assert watch.rates == [found] * 4


@pytest.mark.parametrize(
    ("options", "weighting", "message"),
    [
        ({"attr_name": "rate"}, None, "attr_name is 'rate'"),
        ({"num_training_steps": 13}, None, "num_training_steps is 13; expected 14 or more"),
        ({"min_lr": 0.1, "max_lr": 0.1}, None, "expected 0 < min_lr < max_lr"),
        ({"max_lr": 1e30, "early_stop_threshold": 1.0001}, None, "ended after .* of 100 steps.*lower max_lr"),
        ({}, PSFT(), "LearningRateFinder with PSFT, which compares with the policy of some steps ago"),
    ],
)
def test_what_would_find_nothing_is_refused(model_dir, rows_file, tmp_path, options, weighting, message):
    with pytest.raises(UserError, match=message):
        run(model_dir, rows_file, tmp_path, LearningRateFinder(**options), weighting=weighting, logger=False)
    assert not checkpoint_folder(tmp_path).exists()


def test_a_resumed_run_without_a_search_is_told_so(model_dir, rows_file, tmp_path):
    run(model_dir, rows_file, tmp_path, end_after=2)
    last = checkpoint_folder(tmp_path) / "last.ckpt"
    with pytest.raises(UserError, match="searches before the first step, and this run resumes at step 2"):
        run(model_dir, rows_file, tmp_path, LearningRateFinder(**copy.copy(FINDER)), ckpt_path=last)
