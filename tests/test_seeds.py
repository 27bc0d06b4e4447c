"""Two seeds differ and one repeats, for everything that is drawn; a run that resumes keeps the seeds it began with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_model, tiny_tokenizer
from harness import fit

from dft_lightning import FineTuner, NuminaMathDataModule
from dft_lightning.callbacks.run_summary import run_facts
from dft_lightning.cli import main
from dft_lightning.errors import UserError
from dft_lightning.models import LoRA
from dft_lightning.seeds import data_seed, drawn, run_seed
from dft_lightning.weighting import DFT


@pytest.fixture(autouse=True)
def seed_of_others(monkeypatch):
    """What a test sets is gone after it."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)


def data(rows, **options):
    module = NuminaMathDataModule(str(rows), **({"num_samples": 12, "val_size": 4, "global_batch_size": 4} | options))
    module.tokenizer = tiny_tokenizer()
    module.setup("fit")
    return module


def subset(seed, folder, model):
    return data(folder / "sums.jsonl").origin["train"]


def validation(seed, folder, model):
    return data(folder / "sums.jsonl").origin["val"]


def shuffle(seed, folder, model):
    return data(folder / "sums.jsonl", num_samples=None, subset="first", val_size=0).sampler().order(0)


def workers(seed, folder, model):
    loader = data(folder / "sums.jsonl", subset="first").train_dataloader()
    return np.array([loader.generator.initial_seed()])


def adapters(seed, folder, model):
    made = FineTuner(str(model), DFT(), lora=LoRA(rank=2)).initial_model().state_dict()
    return torch.cat([value.flatten() for name, value in made.items() if "lora_A" in name]).numpy()


def missing_rows(seed, folder, model):
    """Weights that the checkpoint lacks."""
    tiny_model(tie_word_embeddings=True).save_pretrained(folder / "part")
    config = tiny_config(tie_word_embeddings=False)
    config.save_pretrained(folder / "part")
    return (
        FineTuner(str(folder / "part"), DFT(), allow_missing=["lm_head.weight"])
        .initial_model()
        .lm_head.weight.detach()
        .numpy()
    )


def dropout(seed, folder, model):
    module = FineTuner(str(model), DFT())
    module._trainer = type("Trainer", (), {"global_step": 3, "global_rank": 0})()
    module._seed(1)
    return torch.rand(3).numpy()


CONSUMERS = [subset, validation, shuffle, workers, adapters, missing_rows, dropout]


@pytest.mark.parametrize("consumer", CONSUMERS, ids=lambda each: each.__name__)
def test_two_seeds_differ_and_one_repeats(consumer, rows_file, model_dir, tmp_path):
    found = []
    for seed in (1, 2, 1):
        pl.seed_everything(seed, verbose=False)
        torch.rand(1 + len(found))  # what else was drawn before does not matter
        found.append(consumer(seed, tmp_path, model_dir))
    first, other, again = found
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("consumer", [subset, validation, shuffle], ids=lambda each: each.__name__)
def test_the_datas_own_seed_wins(consumer, rows_file, model_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(data.__globals__, "data", lambda rows, _made=data, **more: _made(rows, seed=7, **more))
    found = []
    for seed in (1, 2):
        pl.seed_everything(seed, verbose=False)
        found.append(consumer(seed, tmp_path, model_dir))
    assert np.array_equal(*found)


def test_the_seeds_in_force_are_printed_and_kept(model_dir, rows_file):
    tuner, _, trainer = fit(model_dir, rows_file, max_steps=1)
    assert run_facts(trainer, tuner)["seeds"].startswith("0 (initialisation, dropout); 0 (subset")
    tuner, _, trainer = fit(model_dir, rows_file, data={"seed": 5}, max_steps=1)
    assert run_facts(trainer, tuner)["seeds"].startswith("0 (initialisation, dropout); 5 (subset")
    assert trainer.datamodule.identity()["seed"] == 5


ARGUMENTS = """fit --trainer.accelerator cpu --data NuminaMathDataModule --data.path sums.jsonl --data.num_samples 16
    --data.global_batch_size 4 --data.micro_batch_size 4 --data.max_length 200 --model.weighting DFT
    --token_probabilities.every_n_steps 0 --export.enabled false --trainer.enable_progress_bar false
    --checkpoints.save_best false --model.optimizer.lr 0.01 --run_dir"""


def weights(model, run, seed, *more):
    """The checkpoint that a command leaves."""
    assert main([*ARGUMENTS.split(), run, "--model.model_name", str(model), "--seed_everything", str(seed), *more]) == 0
    return torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)


def same(one, other):
    return all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())


@pytest.mark.slow
class TestCommand:
    @pytest.fixture(autouse=True)
    def here(self, rows_file, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def test_two_seeds_differ_and_one_repeats(self, model_dir):
        first, other, again = (weights(model_dir, f"run{n}", seed) for n, seed in enumerate((1, 2, 1)))
        assert same(first, again)
        assert not same(first, other)
        start = json.loads(Path("run1/environment.json").read_text())["starts"][-1]
        assert (start["identity"]["data"]["seed"], start["settings"]["seed"]) == (2, 2)
        assert "seed_everything: 2" in Path("run1/config.yaml").read_text()

    def test_another_seed_is_refused_when_it_resumes(self, model_dir, capsys):
        weights(model_dir, "run", 1, "--trainer.max_steps", "2")
        words = [*ARGUMENTS.split(), "run", "--model.model_name", str(model_dir), "--seed_everything", "2"]
        assert main(words) == 2
        assert "data (seed): 1 → 2" in " ".join(capsys.readouterr().err.split())

    def test_a_drawn_seed_is_that_of_the_whole_run(self, model_dir):
        half = weights(model_dir, "run", "true", "--trainer.max_steps", "2")
        whole = weights(model_dir, "run", "true")
        seed = half["dft_lightning"]["settings"]["seed"]
        assert whole["dft_lightning"]["settings"]["seed"] == seed
        other = weights(model_dir, "other", "true", "--trainer.max_steps", "1")
        assert other["dft_lightning"]["settings"]["seed"] != seed

    def test_a_checkpoint_of_an_earlier_version_keeps_the_datas_seed(self, model_dir):
        """The default of data.seed was 0, whatever the run's seed."""
        weights(model_dir, "old", 3, "--data.seed", "0", "--trainer.max_steps", "2")
        stored = torch.load("old/checkpoints/last.ckpt", weights_only=True)
        del stored["dft_lightning"]["data_seed"]
        torch.save(stored, "old/checkpoints/last.ckpt")
        resumed = weights(model_dir, "old", 3)
        assert resumed["global_step"] == 4
        assert resumed["dft_lightning"]["identity"]["data"]["seed"] == 0

    @pytest.mark.exhaustive
    def test_two_ranks_have_the_same_subset_and_adapters(self, model_dir, tmp_path):
        words = [*ARGUMENTS.split(), "two", "--model.model_name", str(model_dir), "--seed_everything", "3"]
        still = ["--model.lora.rank", "2", "--trainer.max_steps", "1", "--model.optimizer.lr", "1e-30"]
        words += [*still, "--trainer.devices", "2", "--trainer.strategy", "ddp"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "dft_lightning", *words], check=True, env=environment, timeout=300)
        two = torch.load("two/checkpoints/last.ckpt", weights_only=True)
        one = weights(model_dir, "one", 3, *still)
        assert two["dft_lightning"]["identity"]["data"] == one["dft_lightning"]["identity"]["data"]
        for name, value in one["state_dict"].items():
            if "lora_A" in name:
                assert torch.allclose(value, two["state_dict"][name], atol=1e-20, rtol=0)


class TestDrawn:
    def test_true_draws_another_each_time(self):
        assert drawn(True) != drawn(True)
        assert (drawn(7), drawn(False)) == (7, False)

    @pytest.mark.parametrize("seed", [-1, 2**32])
    def test_no_seed(self, seed):
        with pytest.raises(UserError, match=f"--seed_everything is {seed}; expected"):
            drawn(seed)

    def test_processes_of_a_launcher_share_one(self, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setenv("PL_GLOBAL_SEED", "12")
        assert drawn(True) == 12
        monkeypatch.delenv("PL_GLOBAL_SEED")
        with pytest.raises(UserError, match="each process that the launcher starts would draw another one"):
            drawn(True)


def test_what_a_resumed_run_takes_for_the_datas_seed():
    old = {"identity": {"data": {"seed": 0}}}
    assert data_seed(None, old) == 0
    assert data_seed(4, old) == 4
    assert data_seed(None, old | {"data_seed": 0}) is None
    assert data_seed(None, {}) is None
    assert run_seed() == 0
