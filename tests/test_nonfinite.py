"""A step that is not finite is passed over, counted, and its rows are named; too many in a row end the run."""

import json
import os
import shutil
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from conftest import sums, tiny_model, write_jsonl
from harness import events, fit, logger

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
def poisoned(tmp_path, model_dir):
    """A model, and 24 rows of which number 5 makes it fail: in steps of 6 without shuffle that is the first step."""
    from transformers import AutoTokenizer

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


@pytest.mark.slow
def test_two_ranks_skip_together_and_name_all_rows(poisoned, tmp_path):
    model, rows = poisoned
    command = [
        sys.executable,
        "-m",
        "dft_lightning",
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
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
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
