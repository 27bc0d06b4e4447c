"""Averages of the weights: the rule by hand, what validates and exports, and resuming to the bit."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from harness import fit
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM

from dft_lightning.averaging import CURRENT, STATE, Averages
from dft_lightning.callbacks import Checkpoints, Export
from dft_lightning.callbacks.averaging import Averaging
from dft_lightning.callbacks.checkpoints import checkpoint_folder
from dft_lightning.errors import UserError
from dft_lightning.exporting.stored import read_stored
from dft_lightning.models import LoRA
from dft_lightning.weighting import ASFT, TALR

ADAM = {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.01), "warmup_ratio": 0.0}


class Weights(pl.Callback):
    """Keeps the trained weights after each optimizer step, and ends the run after so many micro-batches."""

    def __init__(self, kill_after=None):
        self.steps, self.left = [], -2 if kill_after is None else kill_after

    def on_train_batch_start(self, *_):
        self.left -= 1
        if self.left == -1:
            raise KeyboardInterrupt

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.steps.append({name: w.detach().clone() for name, w in module.named_parameters() if w.requires_grad})


def run(model, rows, folder, rule, *more, kill_after=None, val=0, weighting=None, every=1, **options):
    seen = Weights(kill_after)
    data = {"micro_batch_size": 4, "val_size": val} | options.pop("data", {})
    callbacks = [copy.deepcopy(each) for each in ([rule] if rule else [])]
    module = ADAM | options.pop("module", {})
    settings = {"enable_checkpointing": True, "default_root_dir": folder, "recorder": False} | options
    try:
        tuner, _, trainer = fit(
            model,
            rows,
            weighting,
            module=module,
            data=data,
            callbacks=[*callbacks, seen, *more, Checkpoints(every)],
            **settings,
        )
    except SystemExit:  # how Lightning ends after a KeyboardInterrupt
        assert kill_after is not None
        return None, seen, None
    return tuner, seen, trainer


def last(folder):
    return checkpoint_folder(folder) / "last.ckpt"


def trained(module):
    return {name: w.detach() for name, w in module.named_parameters() if w.requires_grad}


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def ema(decay, steps):
    mean = None
    for weights in steps:
        mean = (
            {name: w.clone() for name, w in weights.items()}
            if mean is None
            else {name: decay * mean[name] + (1 - decay) * w for name, w in weights.items()}
        )
    return mean


def equal(steps):
    mean = {name: w.clone() for name, w in steps[0].items()}
    for count, weights in enumerate(steps[1:], 1):
        mean = {name: mean[name] + (w - mean[name]) / (count + 1) for name, w in weights.items()}
    return mean


RULES = {
    "ema": (EMAWeightAveraging(decay=0.5), lambda steps: ema(0.5, steps)),
    "every second": (EMAWeightAveraging(decay=0.5, update_every_n_steps=2), lambda steps: ema(0.5, steps[::2])),
    "late": (EMAWeightAveraging(decay=0.9, update_starting_at_step=2), lambda steps: ema(0.9, steps[2:])),
    "equal": (WeightAveraging(), equal),
    "on the host": (EMAWeightAveraging(decay=0.5, device="cpu"), lambda steps: ema(0.5, steps)),
}


@pytest.mark.parametrize("rule", RULES)
def test_one_update_per_optimizer_step_by_the_rule(model_dir, rows_file, tmp_path, rule):
    """Two micro-batches make a step; the model that the run ends with is the average."""
    callback, by_hand = RULES[rule]
    tuner, seen, _ = run(model_dir, rows_file, tmp_path, callback)
    assert len(seen.steps) == 4
    same(trained(tuner), by_hand(seen.steps))
    stored = torch.load(last(tmp_path), weights_only=True)
    same({name: stored["state_dict"][name] for name in seen.steps[-1]}, by_hand(seen.steps))
    same({name: stored[CURRENT][name] for name in seen.steps[-1]}, seen.steps[-1])


@pytest.mark.parametrize("val", [0, 4])
def test_training_is_that_without_averages(model_dir, rows_file, tmp_path, val):
    """Validations in between put the averages into place, and take them out again."""
    more = {"val": val, "val_check_interval": 1}
    plain = run(model_dir, rows_file, tmp_path / "plain", None, **more)[1]
    averaged = run(model_dir, rows_file, tmp_path / "averaged", EMAWeightAveraging(decay=0.5), **more)[1]
    for one, other in zip(plain.steps, averaged.steps, strict=True):
        same(one, other)


SWA = StochasticWeightAveraging(swa_lrs=0.003, swa_epoch_start=2, annealing_epochs=1)


@pytest.mark.parametrize(
    "rule",
    [
        EMAWeightAveraging(decay=0.5),
        EMAWeightAveraging(decay=0.5, update_starting_at_epoch=0, update_every_n_steps=3),
        SWA,
    ],
    ids=["ema", "epochs too", "swa"],
)
@pytest.mark.parametrize(
    "kill_after", [3, 16, pytest.param(8, marks=pytest.mark.exhaustive), pytest.param(13, marks=pytest.mark.exhaustive)]
)
def test_killed_and_resumed_is_uninterrupted(model_dir, rows_file, tmp_path, rule, kill_after):
    """Within a step, between two epochs, in the second of three: weights, averages, schedule and counters."""
    whole, seen, _ = run(model_dir, rows_file, tmp_path / "whole", rule, max_epochs=3)
    run(model_dir, rows_file, tmp_path / "parts", rule, max_epochs=3, kill_after=kill_after)
    start = {"ckpt_path": last(tmp_path / "parts")}
    parts, late, _ = run(model_dir, rows_file, tmp_path / "parts", rule, max_epochs=3, **start)
    assert len(seen.steps) == 12
    for ours, truth in zip(reversed(late.steps), reversed(seen.steps), strict=False):
        same(ours, truth)
    same(trained(parts), trained(whole))
    one, other = (torch.load(last(tmp_path / name), weights_only=True) for name in ("whole", "parts"))
    same(one["state_dict"], other["state_dict"])
    assert one[STATE]["n_averaged"] == other[STATE]["n_averaged"]
    assert one["lr_schedulers"] == other["lr_schedulers"]
    name = type(rule).__qualname__
    assert one["callbacks"][name] == other["callbacks"][name]


def test_swa_averages_the_ends_of_epochs_and_anneals_the_learning_rate(model_dir, rows_file, tmp_path):
    """By hand: steps of 4 an epoch; from the second epoch on the average, in the third the rate is swa_lrs."""
    rates = []

    class Rates(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    module = {"lr_schedule": "constant"}
    tuner, seen, _ = run(model_dir, rows_file, tmp_path, SWA, Rates(), max_epochs=3, module=module)
    assert rates == [0.01] * 8 + [0.003] * 4
    same(trained(tuner), equal(seen.steps[7::4]))


CASES = {
    "lora": {"module": {"lora": LoRA(rank=4)}},
    "bf16": {"precision": "bf16-true"},
    "bf16 lora": {"precision": "bf16-true", "module": {"lora": LoRA(rank=4)}},
    "packed": {"data": {"packing": True, "micro_batch_size": 1}},
    "checkpointing": {"module": {"activation_checkpointing": "full"}},
    "copy": {"module": {"reference": "copy"}, "weighting": ASFT()},
    "step scope": {"weighting": TALR()},
}


@pytest.mark.parametrize("case", CASES)
def test_only_what_is_trained_is_averaged_and_in_float32(model_dir, rows_file, tmp_path, case):
    options = CASES[case]
    callback = EMAWeightAveraging(decay=0.999)
    tuner, seen, _ = run(model_dir, rows_file, tmp_path, callback, val=4, val_check_interval=1, **options)
    exact = ema(0.999, [{name: w.float() for name, w in step.items()} for step in seen.steps])
    same(trained(tuner), {name: w.to(tuner.get_parameter(name).dtype) for name, w in exact.items()})
    stored = torch.load(last(tmp_path), weights_only=True)
    same(stored[STATE]["weights"], exact)
    start = AutoModelForCausalLM.from_pretrained(model_dir, dtype=tuner.model.dtype).state_dict()
    if options.get("module", {}).get("lora"):
        for name, value in tuner.network.base.state_dict().items():
            if "lora" not in name:
                assert torch.equal(value, start[name.replace(".base_layer", "")]), name


def test_tied_embeddings_are_one_average(rows_file, tmp_path):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    tuner, seen, _ = run(tmp_path / "model", rows_file, tmp_path / "run", EMAWeightAveraging(decay=0.5), Export())
    assert tuner.model.lm_head.weight is tuner.model.model.embed_tokens.weight
    same(trained(tuner), ema(0.5, seen.steps))
    stored = torch.load(last(tmp_path / "run"), weights_only=True)["state_dict"]
    assert torch.equal(stored["network.model.lm_head.weight"], stored["network.model.model.embed_tokens.weight"])
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    assert back.lm_head.weight is back.model.embed_tokens.weight
    assert torch.equal(back.lm_head.weight, tuner.model.lm_head.weight)


def test_all_tensors_at_once_and_one_by_one_are_the_same():
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    one = Averages(layer, average=lambda mean, new, _: torch.lerp(mean, new, 0.1))
    many = Averages(layer, average_all=get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        nn.init.normal_(layer.weight)
        one.update(), many.update()
    torch.testing.assert_close(one.weights, many.weights, rtol=1e-6, atol=0.0)  # lerp and 1 − 0.9 round apart
    assert one.count == many.count == 3


def test_the_validated_model_is_the_averaged_one_and_best_holds_it(model_dir, rows_file, tmp_path):
    """`dft validate` of best.ckpt finds the metric by which it was chosen; the trained weights give another."""
    metrics = []

    class Seen(pl.Callback):
        def on_validation_end(self, trainer, module):
            metrics.append(float(trainer.callback_metrics["val/p_mean"]))

    rule = EMAWeightAveraging(decay=0.5, update_starting_at_step=1)
    tuner, seen, trainer = run(model_dir, rows_file, tmp_path, rule, Seen(), val=4, val_check_interval=1)
    best = checkpoint_folder(tmp_path) / "best.ckpt"
    step = torch.load(best, weights_only=True)["global_step"] // 1
    found = trainer.validate(tuner, trainer.datamodule, ckpt_path=best, verbose=False)[0]["val/p_mean"]
    assert found == pytest.approx(max(metrics), rel=1e-6)
    assert step > 1
    for name, weight in seen.steps[step - 1].items():
        tuner.get_parameter(name).data.copy_(weight)
    live = trainer.validate(tuner, trainer.datamodule, verbose=False)[0]["val/p_mean"]
    assert abs(live - found) > 1e-4


def test_a_skipped_step_is_no_update(model_dir, rows_file, tmp_path):
    class Spoil(pl.Callback):
        def on_after_backward(self, trainer, module):
            if trainer.global_step == 1:
                next(module.parameters()).grad.fill_(float("nan"))

    tuner, seen, _ = run(model_dir, rows_file, tmp_path, WeightAveraging(), Spoil())
    same(seen.steps[1], seen.steps[0])
    same(trained(tuner), equal([seen.steps[0], *seen.steps[2:]]))


class TestExport:
    def test_of_a_run_and_of_its_checkpoint(self, model_dir, rows_file, tmp_path):
        export = Export(which="averaged")
        _, seen, _ = run(model_dir, rows_file, tmp_path, EMAWeightAveraging(decay=0.5), export)
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
        means = {name.removeprefix("network.model."): w for name, w in ema(0.5, seen.steps).items()}
        same({name: back[name] for name in means}, means)
        for which in (None, "averaged"):
            same({name: read_stored(last(tmp_path), which).weights[name] for name in means}, means)
        current = read_stored(last(tmp_path), "current").weights
        for name, weight in seen.steps[-1].items():
            assert torch.equal(current[name.removeprefix("network.model.")], weight)
        assert "EMAWeightAveraging(" in (tmp_path / "export" / "README.md").read_text()

    def test_averages_that_are_not_there_are_refused(self, model_dir, rows_file, tmp_path):
        with pytest.raises(UserError, match=r"export.which is 'averaged', but no callback averages"):
            run(model_dir, rows_file, tmp_path, None, Export(which="averaged"))
        run(model_dir, rows_file, tmp_path / "plain", None, max_steps=1)
        with pytest.raises(UserError, match="of a run without weight averaging"):
            read_stored(last(tmp_path / "plain"), "averaged")
        run(model_dir, rows_file, tmp_path / "late", EMAWeightAveraging(update_starting_at_step=1), kill_after=3)
        with pytest.raises(UserError, match="before the first update"):
            read_stored(last(tmp_path / "late"), "averaged")


class TestChangedOnResume:
    def test_without_the_callback_it_is_refused_or_continues_with_the_trained_weights(
        self, model_dir, rows_file, tmp_path
    ):
        whole = run(model_dir, rows_file, tmp_path / "whole", None)[0]
        run(model_dir, rows_file, tmp_path / "parts", EMAWeightAveraging(decay=0.5), kill_after=5)
        start = {"ckpt_path": last(tmp_path / "parts")}
        with pytest.raises(UserError, match=r"averaging: EMAWeightAveraging → None.*--allow_changes '\[averaging\]'"):
            run(model_dir, rows_file, tmp_path / "parts", None, **start)
        allowed = {"allow_changes": frozenset({"averaging"})}
        same(trained(run(model_dir, rows_file, tmp_path / "parts", None, **start, **allowed)[0]), trained(whole))

    def test_another_decay_is_in_force_and_said(self, model_dir, rows_file, tmp_path, caplog):
        _, early, _ = run(model_dir, rows_file, tmp_path, EMAWeightAveraging(decay=0.5), kill_after=5)
        start = {"ckpt_path": last(tmp_path)}
        with caplog.at_level("INFO"):
            tuner, late, _ = run(model_dir, rows_file, tmp_path, EMAWeightAveraging(decay=0.9), **start)
        assert "newest weights 0.5) → EMAWeightAveraging(update_every_n_steps=1, share of" in caplog.text
        mean = ema(0.5, early.steps)
        for weights in late.steps[-2:]:
            mean = {name: 0.9 * mean[name] + (1 - 0.9) * w for name, w in weights.items()}
        same(trained(tuner), mean)

    def test_added_it_begins_where_the_run_resumes(self, model_dir, rows_file, tmp_path):
        run(model_dir, rows_file, tmp_path, None, kill_after=5)
        start = {"ckpt_path": last(tmp_path), "allow_changes": frozenset({"averaging"})}
        tuner, late, _ = run(model_dir, rows_file, tmp_path, WeightAveraging(), **start)
        same(trained(tuner), equal(late.steps[-2:]))


class Own(WeightAveraging):
    """A user's rule with a hook of its own."""

    def __init__(self):
        super().__init__()
        self.begun = 0

    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx in (0, 3)

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.begun += 1


def test_a_rule_of_the_users_own_is_fitted_too(model_dir, rows_file, tmp_path):
    tuner, seen, trainer = run(model_dir, rows_file, tmp_path, Own())
    same(trained(tuner), equal([seen.steps[0], seen.steps[3]]))
    rule = next(each for each in trainer.callbacks if isinstance(each, Averaging))
    assert isinstance(rule, Own)
    assert rule.begun == 1
    assert rule.state_key == "Own"


@pytest.mark.parametrize(
    ("rules", "options", "message"),
    [
        ([EMAWeightAveraging(update_starting_at_step=4)], {}, "never updates its averages in this run of 4"),
        ([StochasticWeightAveraging(swa_lrs=0.1)], {}, r"this run of 1 epoch has 1 of them.*EMAWeightAveraging"),
        ([StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=3)], {"max_epochs": 3}, "has 1 of them"),
        ([StochasticWeightAveraging(swa_lrs=[0.1, 0.1])], {"max_epochs": 3}, "swa_lrs has 2 values; .* has 1 groups"),
        ([WeightAveraging(), EMAWeightAveraging()], {}, "WeightAveraging and EMAWeightAveraging both average"),
        ([WeightAveraging(nonsense=3)], {}, r"unknown options \['nonsense'\]"),
    ],
)
def test_what_would_average_nothing_is_refused(model_dir, rows_file, tmp_path, rules, options, message):
    with pytest.raises(UserError, match=message):
        run(model_dir, rows_file, tmp_path, None, *copy.deepcopy(rules), **options)
    assert not (tmp_path / "checkpoints").exists()


def test_running_statistics_are_refused():
    with pytest.raises(UserError, match=r"0 \(BatchNorm1d\) keeps running statistics"):
        Averages(nn.Sequential(nn.BatchNorm1d(2)))
