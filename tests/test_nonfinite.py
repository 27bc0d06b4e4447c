"""A step that is not finite is passed over, counted, and its rows are named; too many in a row end the run."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from conftest import sums, tiny_model, tiny_tokenizer, write_jsonl
from harness import events, fit, logger
from lightning.pytorch.plugins.precision import MixedPrecision

from dft_lightning.callbacks import Checkpoints
from dft_lightning.errors import UserError
from dft_lightning.models import LoRA
from dft_lightning.weighting import DFT, Uniform

POISON = "Ω"  # two bytes that no other row has; one of them has an embedding that is not a number


class States(pl.Callback):
    """Weights, optimizer state and learning rate after every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > len(self.seen):
            state = trainer.optimizers[0].state_dict()["state"]
            flat = [value.clone() for one in state.values() for value in one.values() if torch.is_tensor(value)]
            weights = [parameter.detach().clone() for parameter in pl_module.parameters()]
            schedule = trainer.lr_scheduler_configs[0].scheduler.last_epoch
            self.seen.append((weights, flat, schedule))


@pytest.fixture
def poisoned(tmp_path, model_dir, monkeypatch):
    """A model that would be refused when it is read, and 24 rows of which number 5 makes it fail.

    In steps of 6 without shuffle that is the first step.
    """
    from transformers import AutoTokenizer

    monkeypatch.setattr("dft_lightning.checkpoint_keys.check_finite", lambda *_: None)
    folder = shutil.copytree(model_dir, tmp_path / "model")
    token = AutoTokenizer.from_pretrained(folder)(POISON, add_special_tokens=False)["input_ids"][0]
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    model.save_pretrained(folder)
    rows = sums(24)
    rows[8]["problem"] += POISON  # the second step
    return folder, write_jsonl(tmp_path / "rows.jsonl", rows)


DATA = {"global_batch_size": 6, "micro_batch_size": 2, "shuffle": False, "subset": "first"}
ADAM = {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.01), "warmup_ratio": 0.0}


def same(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def test_the_step_leaves_weights_optimizer_and_schedule_as_they_were(poisoned, tmp_path):
    model, rows = poisoned
    states = States()
    _, _, trainer = fit(
        model,
        rows,
        DFT(),
        module=ADAM,
        data=DATA,
        callbacks=[states],
        default_root_dir=tmp_path,
        logger=logger(tmp_path),
        recorder=False,
    )
    first, second, third, fourth = states.seen
    assert torch.isfinite(torch.cat([weight.flatten() for weight in fourth[0]])).sum() > 0
    clean = [torch.nan_to_num(weight) for weight in first[0]]
    assert same(clean, [torch.nan_to_num(weight) for weight in second[0]])
    assert same(first[1], second[1])
    assert (first[2], second[2], third[2]) == (1, 1, 2)
    assert not same(clean, [torch.nan_to_num(weight) for weight in third[0]])
    assert trainer.callback_metrics["train/skipped_steps"] == 1
    logged = events(tmp_path)
    assert [event.step for event in logged.Scalars("train/nll")] == [1, 3, 4]
    assert [event.value for event in logged.Scalars("train/skipped_steps")] == [0, 1, 1, 1]


def test_its_rows_are_named(poisoned, tmp_path):
    model, rows = poisoned
    fit(model, rows, DFT(), module=ADAM, data=DATA, default_root_dir=tmp_path, recorder=False)
    (line,) = (tmp_path / "skipped_steps.jsonl").read_text().splitlines()
    report = json.loads(line)
    assert report["step"] == 1
    assert report["rows"] == [6, 7, 8, 9, 10, 11]
    assert report["rows_with_a_non_finite_token"] == [8]
    assert report["norm"] == report["loss"] == "nan"


def test_a_line_that_a_kill_cut_off_is_dropped(model_dir, rows_file, tmp_path):
    (tmp_path / "skipped_steps.jsonl").write_text('{"step": 3, "rows": [1')
    fit(model_dir, rows_file, DFT(), default_root_dir=tmp_path, max_steps=1)
    assert (tmp_path / "skipped_steps.jsonl").read_text() == ""


@pytest.mark.slow
def test_two_ranks_skip_together_and_name_all_rows(poisoned, tmp_path):
    model, rows = poisoned
    script = tmp_path / "fit.py"
    script.write_text(
        "import sys\nfrom dft_lightning import checkpoint_keys\nfrom dft_lightning.__main__ import main\n"
        "checkpoint_keys.check_finite = lambda *_: None\nsys.exit(main())\n"
    )
    command = [
        sys.executable,
        str(script),
        "fit",
        "--model.model_name",
        str(model),
        "--model.weighting",
        "DFT",
    ]
    command += ["--data", "NuminaMathDataModule", "--data.path", str(rows), "--run_dir", str(tmp_path / "run")]
    command += ["--data.global_batch_size", "6", "--data.micro_batch_size", "1", "--data.shuffle", "false"]
    command += ["--data.subset", "first", "--data.max_length", "200", "--token_probabilities.every_n_steps", "0"]
    command += ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    subprocess.run(
        command,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=300,
    )
    report = json.loads((tmp_path / "run" / "skipped_steps.jsonl").read_text())
    assert (report["rows"], report["rows_with_a_non_finite_token"]) == ([6, 7, 8, 9, 10, 11], [8])
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_too_many_in_a_row_end_the_run_with_a_checkpoint(model_dir, rows_file, tmp_path, lora):
    """A learning rate that ruins the weights in the second step; what is left is the state before."""
    module = {"optimizer": lambda p: torch.optim.SGD(p, lr=1e30), "warmup_ratio": 0.0, "lora": lora}
    with pytest.raises(UserError, match=r"stopped at step \d: 3 steps in a row without a finite"):
        fit(
            model_dir,
            rows_file,
            Uniform(),
            module=module | {"max_skipped_steps": 3},
            data={"global_batch_size": 4, "micro_batch_size": 4},
            callbacks=[Checkpoints(1, save_best=False)],
            enable_checkpointing=True,
            default_root_dir=tmp_path,
            recorder=False,
        )
    last, stopped = (
        torch.load(tmp_path / "checkpoints" / f"{name}.ckpt", weights_only=True) for name in ("last", "stopped")
    )
    assert stopped["global_step"] == last["global_step"] + 3
    assert stopped["dft_lightning"]["skipped"] == {"total": 3, "in_a_row": 3}
    for name, value in last["state_dict"].items():
        assert torch.equal(value.nan_to_num(), stopped["state_dict"][name].nan_to_num()), name


def test_its_checkpoint_can_be_gone_on_with(poisoned, tmp_path):
    """Once what was wrong is mended; with several micro-batches a step, the first of which knows nothing yet."""
    model, rows = poisoned
    options = {
        "module": ADAM | {"max_skipped_steps": 1},
        "enable_checkpointing": True,
        "default_root_dir": tmp_path,
        "recorder": False,
    }
    with pytest.raises(UserError, match="stopped at step 2"):
        fit(model, rows, DFT(), data=DATA, callbacks=[Checkpoints(1)], **options)
    healthy = tiny_model()
    state = torch.load(tmp_path / "checkpoints" / "stopped.ckpt", weights_only=True)
    embedding = "network.model.model.embed_tokens.weight"
    state["state_dict"][embedding] = state["state_dict"][embedding].nan_to_num()
    torch.save(state, tmp_path / "mended.ckpt")
    healthy.save_pretrained(model)
    _, _, trainer = fit(
        model, rows, DFT(), data=DATA, callbacks=[Checkpoints(1)], ckpt_path=tmp_path / "mended.ckpt", **options
    )
    assert trainer.global_step == 4
    assert trainer.callback_metrics["train/skipped_steps"] == 1


def test_a_checkpoint_that_is_due_waits_for_a_good_step(poisoned, tmp_path):
    model, rows = poisoned
    saved = []

    class Spy(Checkpoints):
        def _save(self, trainer, name):
            saved.append(trainer.global_step)
            super()._save(trainer, name)

    fit(
        model,
        rows,
        DFT(),
        module=ADAM,
        data=DATA,
        callbacks=[Spy(2, save_best=False)],
        enable_checkpointing=True,
        default_root_dir=tmp_path,
        recorder=False,
    )
    assert saved == [3, 4]


def test_a_loss_that_is_not_finite_is_enough(rows_file, tmp_path):
    """A token with p = 0: DFT's gradient is 0 there, its loss 0 times infinity."""
    tiny_model("phi").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")

    class Forbid(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            with torch.no_grad():
                pl_module.model.lm_head.bias[1] = float("-inf")  # the stop token, which ends every row

    options = {"callbacks": [Forbid()], "default_root_dir": tmp_path, "recorder": False}
    module, _, trainer = fit(tmp_path / "model", rows_file, DFT(), **options)
    assert module.step.skipped.total == trainer.global_step == 4
    report = json.loads((tmp_path / "skipped_steps.jsonl").read_text().splitlines()[0])
    assert (report["loss"], report["norm"] != "nan") == ("nan", True)


class TestScaler:
    """16-mixed as on a GPU, by hand: Lightning has no scaler for CPUs."""

    def fit(self, model_dir, rows_file, tmp_path, optimizer=torch.optim.SGD, scale=1024.0, **more):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
        return fit(
            model_dir,
            rows_file,
            DFT(),
            module={"optimizer": lambda p: optimizer(p, lr=0.01), "warmup_ratio": 0.0},
            plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
            data={"micro_batch_size": 4},
            gradient_clip_val=0.05,
            default_root_dir=tmp_path,
            **more,
        )

    def test_the_gradient_is_that_without_a_scaler(self, model_dir, rows_file, tmp_path):
        """float16 keeps 11 bits: some 2⁻¹¹·√10 for two layers; a scale that stays in would be 1024 times."""
        exact = fit(model_dir, rows_file, DFT(), gradient_clip_val=0.05, module={"warmup_ratio": 0.0}, max_steps=1)[1]
        scaled = self.fit(model_dir, rows_file, tmp_path, max_steps=1)[1]
        assert scaled.logged[0]["train/grad_norm"] == pytest.approx(exact.logged[0]["train/grad_norm"], rel=2**-9)
        assert (scaled.gradients[0] - exact.gradients[0]).norm() < 2**-8 * exact.gradients[0].norm()

    def test_an_overflow_is_a_skipped_step_and_lowers_the_scale(self, model_dir, rows_file, tmp_path):
        module, _, trainer = self.fit(model_dir, rows_file, tmp_path, scale=2.0**30, max_steps=4, recorder=False)
        assert 0 < module.step.skipped.total <= 4
        assert trainer.precision_plugin.scaler.get_scale() == 2.0 ** (30 - module.step.skipped.total)
        schedule = trainer.lr_scheduler_configs[0].scheduler
        assert schedule.last_epoch == 4 - module.step.skipped.total

    def test_a_fused_optimizer_is_refused(self, model_dir, rows_file, tmp_path):
        with pytest.raises(UserError, match="set fused to false, or take bf16"):
            self.fit(model_dir, rows_file, tmp_path, optimizer=partial(torch.optim.AdamW, fused=True))


def test_a_finite_step_in_between_starts_the_count_anew(poisoned, tmp_path):
    model, rows = poisoned
    content = rows.read_text().splitlines()
    changed = [json.loads(line) for line in content]
    changed[20]["problem"] += POISON  # the fourth step
    write_jsonl(rows, changed)
    module, _, _ = fit(
        model, rows, DFT(), module=ADAM | {"max_skipped_steps": 2}, data=DATA, default_root_dir=tmp_path, recorder=False
    )
    assert (module.step.skipped.total, module.step.skipped.in_a_row) == (2, 1)
    assert len((tmp_path / "skipped_steps.jsonl").read_text().splitlines()) == 2
