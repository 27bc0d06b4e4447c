"""A launcher that starts a run again does so with the command it began with; the run goes on all the same."""

import json
from pathlib import Path

import pytest
from test_cli import dft, here  # noqa: F401 - fixtures

from dft_lightning.environment import starts
from dft_lightning.restarts import is_started_again, job

TORCHRUN = {"TORCHELASTIC_RUN_ID": "dft"}


@pytest.fixture
def launched(monkeypatch, tmp_path):
    def by(**environment):
        for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return tmp_path

    return by


def began(run_dir, by):
    (run_dir / "environment.json").write_text(json.dumps({"starts": [{"job": by}]}))


def test_only_the_job_that_began_it_goes_on(launched):
    run_dir = launched(SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    assert not is_started_again(run_dir)
    began(run_dir, job())
    assert is_started_again(run_dir)
    began(run_dir, "SLURM job 6")
    assert not is_started_again(run_dir)


@pytest.mark.parametrize("environment", [{}, {"SLURM_JOB_ID": "7"}, {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "0"}])
def test_a_first_start_is_none(launched, environment):
    run_dir = launched(**environment)
    began(run_dir, job())
    assert not is_started_again(run_dir)


def test_overwrite_counts_for_the_first_start_alone(dft, launched, monkeypatch):  # noqa: F811
    """Lightning must not take this process for one that torchrun has started, so the job is SLURM's."""
    launched(SLURM_JOB_ID="7", SLURM_JOB_NAME="interactive")
    command = ["fit", "--model.weighting", "DFT", "--overwrite", "true", "--trainer.max_steps"]
    assert dft(*command, 2) == 0
    launched(SLURM_JOB_ID="7", SLURM_JOB_NAME="interactive", SLURM_RESTART_COUNT="1")
    assert dft(*command, 3) == 0
    assert [start["from_step"] for start in starts(Path("run"))] == [0, 2]
    launched(SLURM_JOB_ID="8", SLURM_JOB_NAME="interactive")
    assert dft(*command, 1) == 0
    assert [start["from_step"] for start in starts(Path("run"))] == [0]
