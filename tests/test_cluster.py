"""The scripts of configs/cluster/: what they hand on, and two nodes by torchrun on this machine."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import FSDP2, LONG, OPTIONS, ROOT, SOON, Runs
from ports import free_port

from dft_lightning.signals import AGAIN

CLUSTER = ROOT / "configs" / "cluster"


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Stands for programs: each writes down what it is called with, and leaves with a code of choice."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def make(**codes: int) -> Path:
        for name, code in codes.items():
            (tmp_path / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {tmp_path}/calls\nexit {code}\n')
            (tmp_path / name).chmod(0o755)
        return tmp_path / "calls"

    return make


def run(script: str, *arguments: str, **environment: object) -> int:
    given = {name: str(value) for name, value in environment.items()}
    return subprocess.run([CLUSTER / script, *arguments], env=os.environ | given, timeout=60).returncode


SLURM = {"SLURM_JOB_NAME": "dft", "SLURM_JOB_ID": 70123, "SLURM_NNODES": 2, "SLURM_NTASKS_PER_NODE": 8}


class TestSlurm:
    def test_hands_nodes_and_tasks_on(self, commands):
        calls = commands(srun=0, scontrol=0)
        assert run("slurm.sh", "--config", "a.yaml", **SLURM) == 0
        (said,) = calls.read_text().splitlines()
        assert said.endswith(
            "dft fit --trainer.strategy ddp --config a.yaml --run_dir runs/dft-70123 --trainer.num_nodes 2 "
            "--trainer.devices 8"
        )

    def test_shards_where_that_is_asked_for_and_what_comes_later_wins(self, commands):
        calls = commands(srun=0, scontrol=0)
        assert run("slurm.sh", "--trainer.strategy.replicate", "2", **SLURM, STRATEGY="FSDP2Strategy") == 0
        said = calls.read_text()
        assert said.index("--trainer.strategy FSDP2Strategy") < said.index("--trainer.strategy.replicate 2")

    def test_tasks_of_an_array_have_folders_seeds_and_requeueing_of_their_own(self, commands):
        calls = commands(srun=AGAIN, scontrol=0)
        assert run("slurm.sh", **SLURM, SLURM_ARRAY_JOB_ID=70120, SLURM_ARRAY_TASK_ID=3) == AGAIN
        first, second = calls.read_text().splitlines()
        assert "--run_dir runs/dft-70120-3 --seed_everything 3 " in first
        assert second == "scontrol requeue 70123"

    @pytest.mark.parametrize("code", [1, 2, 137])
    def test_an_error_is_not_tried_again(self, commands, code):
        calls = commands(srun=code, scontrol=0)
        assert run("slurm.sh", **SLURM) == code
        assert "scontrol" not in calls.read_text()

    def test_outlives_a_signal_to_the_whole_job(self, commands, tmp_path):
        calls = commands(scontrol=0)
        srun = f'#!/bin/bash\ntrap "exit {AGAIN}" TERM\ntouch {tmp_path}/begun\nwhile :; do sleep 0.1; done\n'
        (tmp_path / "srun").write_text(srun)
        (tmp_path / "srun").chmod(0o755)
        environment = os.environ | {name: str(value) for name, value in SLURM.items()}
        process = subprocess.Popen([CLUSTER / "slurm.sh"], env=environment, start_new_session=True)
        while not (tmp_path / "begun").exists():
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(30) == AGAIN
        assert calls.read_text() == "scontrol requeue 70123\n"


def test_a_single_node_and_a_container_hand_everything_on(commands):
    calls = commands(dft=AGAIN, docker=AGAIN)
    assert run("single_node.sh", "--run_dir", "a b", GPUS=4) == AGAIN
    assert run("container.sh", "--run_dir", "runs/x") == AGAIN
    assert run("single_node.sh", STRATEGY="fsdp2") == AGAIN
    first, second, sharded = calls.read_text().splitlines()
    assert first == "dft fit --trainer.strategy ddp --trainer.devices 4 --run_dir a b"
    assert sharded == "dft fit --trainer.strategy fsdp2 --trainer.devices auto"
    assert second.endswith(" dft-lightning fit --trainer.strategy ddp --run_dir runs/x")
    assert "--stop-timeout 300" in second


@pytest.mark.slow
def test_two_nodes_by_torchrun_that_are_asked_to_leave_go_on_to_the_same_end(tmp_path):
    """One process each, and the model shared; what they come to is compared with two processes of one node."""
    runs = Runs(tmp_path)
    runs.whole("whole", FSDP2)
    head = f"127.0.0.1:{free_port()}"
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    given = {"NODES": "2", "GPUS": "1", "HEAD": head, "STRATEGY": "fsdp2", "DFT_CACHE": str(tmp_path / "c")}
    environment = os.environ | path | given
    options = [*OPTIONS.split()[1:], "--run_dir", "nodes"]

    def both() -> list[subprocess.Popen]:
        with open(tmp_path / "nodes.log", "a") as log:
            command = [CLUSTER / "torchrun.sh", *options]
            return [subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log) for _ in range(2)]

    nodes = both()
    runs.until_saved("nodes", nodes[0])
    time.sleep(1.0)
    for node in nodes:
        node.terminate()
    assert [node.wait(SOON) for node in nodes] == [AGAIN, AGAIN], runs.log("nodes")
    assert "which is saved" in runs.log("nodes")
    assert [node.wait(LONG) for node in both()] == [0, 0], runs.log("nodes")
    runs.assert_same("nodes", "whole")
