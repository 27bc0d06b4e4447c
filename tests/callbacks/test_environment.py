"""What a run's folder keeps of each start, and that a run can be run again from it to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import sums, write_jsonl
from harness import events, fit

from dft_lightning import environment
from dft_lightning.__main__ import main
from dft_lightning.callbacks import Checkpoints, Environment
from dft_lightning.callbacks.checkpoints import checkpoint_folder
from dft_lightning.weighting import Uniform

GIT = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}


def starts(folder):
    return json.loads((Path(folder) / environment.FILE).read_text())["starts"]


def run(model_dir, rows_file, folder, weighting=None, **more):
    options = {"default_root_dir": folder, "enable_checkpointing": True, "callbacks": [Environment(), Checkpoints(1)]}
    return fit(model_dir, rows_file, weighting, **(options | more))


class TestWhatIsKept:
    def test_all_of_a_start(self, model_dir, rows_file, tmp_path):
        _, _, trainer = run(model_dir, rows_file, tmp_path / "run")
        (found,) = starts(tmp_path / "run")
        assert found["versions"]["torch"] == torch.__version__
        assert {"python", "system", "lightning", "transformers", "numpy"} <= set(found["versions"])
        assert found["identity"]["data"]["rows"] == trainer.datamodule.train_rows.fingerprint
        assert len(found["identity"]["weighting"]["content"]) == 64
        assert found["training_rows"]["count"] == 26
        assert found["from_step"] == 0
        assert found["settings"]["seed"] == 0
        (rank,) = found["ranks"]
        assert rank["cores"] >= 1
        assert rank["memory"] > 2**28
        assert rank["device"].startswith("cpu")
        assert not list((tmp_path / "run").glob(".*"))

    def test_other_data_have_another_fingerprint(self, model_dir, rows_file, tmp_path):
        run(model_dir, rows_file, tmp_path / "run", max_steps=1)
        run(model_dir, write_jsonl(tmp_path / "others.jsonl", sums(26, seed=1)), tmp_path / "run", max_steps=1)
        one, other = (found["identity"]["data"]["rows"] for found in starts(tmp_path / "run"))
        assert one != other

    def test_each_start_is_added(self, model_dir, rows_file, tmp_path):
        run(model_dir, rows_file, tmp_path / "run", max_steps=2)
        last = checkpoint_folder(tmp_path / "run") / "last.ckpt"
        run(model_dir, rows_file, tmp_path / "run", ckpt_path=str(last))
        assert [found["from_step"] for found in starts(tmp_path / "run")] == [0, 2]

    def test_no_secret_of_the_environment(self, model_dir, rows_file, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "secret-1")
        monkeypatch.setenv("WANDB_API_KEY", "secret-2")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        run(model_dir, rows_file, tmp_path / "run", max_steps=1)
        assert starts(tmp_path / "run")[0]["arithmetic"]["variables"]["OMP_NUM_THREADS"] == "1"
        assert "secret-" not in (tmp_path / "run" / environment.FILE).read_text()

    def test_a_rehearsal_leaves_nothing(self, model_dir, rows_file, tmp_path):
        run(model_dir, rows_file, tmp_path / "run", fast_dev_run=True)
        assert not (tmp_path / "run" / environment.FILE).exists()


class TestTheFile:
    def test_what_is_not_ours_is_set_aside_and_said(self, tmp_path):
        (tmp_path / environment.FILE).write_text("{}")
        with pytest.warns(UserWarning, match=r"no list of starts: it is environment.json.unreadable now"):
            environment.record(tmp_path, {"one": 1})
        assert starts(tmp_path) == [{"one": 1}]
        assert (tmp_path / "environment.json.unreadable").read_text() == "{}"

    def test_it_is_whole_at_every_moment(self, tmp_path, monkeypatch):
        """What is cut off before its name is given leaves the list as it was."""
        environment.record(tmp_path, {"one": 1})

        def cut_off(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", cut_off)
        with pytest.raises(KeyboardInterrupt):
            environment.record(tmp_path, {"two": 2})
        assert starts(tmp_path) == [{"one": 1}]


class TestGit:
    @pytest.fixture
    def repository(self, tmp_path):
        def git(*arguments):
            subprocess.run(["git", "-C", tmp_path, *arguments], check=True, capture_output=True, env=os.environ | GIT)

        git("init", "-q")
        (tmp_path / "kept.py").write_text("one")
        git("add", "kept.py")
        git("commit", "-q", "-m", "one")
        return tmp_path

    def test_clean_and_dirty(self, repository):
        clean = environment.git_state(repository)
        assert (len(clean["commit"]), clean["dirty"], clean["changed"]) == (40, False, [])
        (repository / "kept.py").write_text("two")
        (repository / "new.py").write_text("three")
        dirty = environment.git_state(repository)
        assert dirty == {"commit": clean["commit"], "dirty": True, "changed": [" M kept.py", "?? new.py"]}

    def test_no_repository_and_no_git(self, tmp_path, repository, monkeypatch, tmp_path_factory):
        assert environment.git_state(tmp_path_factory.mktemp("plain")) is None
        monkeypatch.setenv("PATH", str(tmp_path))
        assert environment.git_state(repository) is None


def test_another_environment_is_said(model_dir, rows_file, tmp_path, monkeypatch, caplog):
    """On the way on, and only then."""
    said = []
    monkeypatch.setattr("dft_lightning.callbacks.environment.rank_zero_info", said.append)
    run(model_dir, rows_file, tmp_path / "run", max_steps=1)
    last = str(checkpoint_folder(tmp_path / "run") / "last.ckpt")
    run(model_dir, rows_file, tmp_path / "run", max_steps=2, ckpt_path=last)
    assert said == []
    real = environment.versions()
    monkeypatch.setattr(environment, "versions", lambda: real | {"torch": "9.9"})
    run(model_dir, rows_file, tmp_path / "run", max_steps=3, ckpt_path=last)
    assert said == [f"Going on with another environment than at the last start: torch {torch.__version__} → 9.9"]
    run(model_dir, rows_file, tmp_path / "run", Uniform(), max_steps=1)  # anew: nothing is gone on with
    assert len(said) == 1


def test_devices_are_compared_by_kind_and_number():
    def found(*devices):
        return {"versions": {}, "arithmetic": {}, "git": None, "ranks": [{"device": name} for name in devices]}

    assert environment.differences(found("a", "b"), found("b", "a")) == []
    assert environment.differences(found("a", "a"), found("a")) == ["devices [('a', 2)] → [('a', 1)]"]


class TestAgain:
    """`dft fit --config RUN/config.yaml`."""

    @pytest.fixture
    def first(self, tmp_path, monkeypatch, model_dir):
        write_jsonl(tmp_path / "rows.jsonl", sums(32))
        monkeypatch.chdir(tmp_path)
        base = ["fit", "--model.model_name", str(model_dir), "--trainer.accelerator", "cpu", "--run_dir", "run"]
        base += ["--data", "NuminaMathDataModule", "--data.path", "rows.jsonl", "--data.val_size", "8"]
        base += ["--data.global_batch_size", "8", "--data.micro_batch_size", "4", "--data.max_length", "200"]
        base += ["--model.weighting", "DFT", "--model.lora.rank", "2", "--model.lora.dropout", "0.3"]
        return [*base, "--seed_everything", "7"]

    def state(self, run):
        return torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)

    def same(self, one, other):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_the_same_bits_elsewhere_and_in_place(self, first, tmp_path):
        assert main(first) == 0
        truth = self.state("run")
        assert main(["fit", "--config", "run/config.yaml", "--run_dir", "again"]) == 0
        self.same(self.state("again")["state_dict"], truth["state_dict"])
        moments = [self.state(name)["optimizer_states"][0]["state"][0]["exp_avg"] for name in ("run", "again")]
        assert torch.equal(*moments)
        assert main(["fit", "--config", "run/config.yaml", "--overwrite", "true"]) == 0
        self.same(self.state("run")["state_dict"], truth["state_dict"])
        assert len(starts("run")) == 1  # the earlier run's list went with it
        first_start, second_start = starts("run")[0], starts("again")[0]
        assert first_start["identity"] == second_start["identity"]
        assert environment.differences(first_start, second_start) == []

    def test_in_place_it_goes_on(self, first):
        assert main([*first, "--trainer.max_epochs", "1"]) == 0
        assert main(["fit", "--config", "run/config.yaml", "--trainer.max_epochs", "2"]) == 0
        one, two = starts("run")
        assert (one["from_step"], two["from_step"]) == (0, 3)
        assert one["config_sha256"] != two["config_sha256"]

    @pytest.mark.slow
    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    def test_two_ranks_are_both_known_one_writes_and_their_bits_are_the_same_again(self, first, strategy):
        def dft(*options):
            command = [sys.executable, "-m", "dft_lightning", *options]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=900)

        dft(*first, "--trainer.devices", "2", "--trainer.strategy", strategy)
        dft("fit", "--config", "run/config.yaml", "--run_dir", "again")
        self.same(self.state("again")["state_dict"], self.state("run")["state_dict"])
        assert environment.differences(*starts("run"), *starts("again")) == []
        (found,) = starts("run")
        assert len(found["ranks"]) == 2
        assert len(list(Path("run/tensorboard").glob("events.*"))) == 1
        logged = events(Path("run"))
        for name in ("loader_wait_share", "peak_memory_gib"):
            least, mean, most = (logged.Scalars(f"throughput/{name}_{how}")[-1].value for how in ("min", "mean", "max"))
            assert 0 < least <= mean <= most
        assert logged.Scalars("throughput/peak_memory_gib")[-1].value == most
