"""Asked to leave, or with a rank killed, a run ends as the undisturbed one, by the launchers that users have."""

import os
import re
import signal
import time

import pytest
from launching import DDP, TORCHRUN, Runs, children_of

from dft_lightning.signals import AGAIN

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Among them an undisturbed one on two ranks, and one on one with data workers."""
    found = Runs(tmp_path_factory.mktemp("runs"))
    found.whole("whole-1", "--data.num_workers 2")
    found.whole("whole-2", DDP)
    return found


@pytest.mark.parametrize("to_all", [True, False], ids=["to all processes", "to the first"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_asked_to_leave_it_saves_and_goes_on_to_the_same_end(runs, ranks, to_all):
    """As SLURM signals a job: all processes of it, data workers included; or as `docker stop` does: the first one."""
    more = DDP if ranks == 2 else "--data.num_workers 2"
    name, rounds = f"asked-{ranks}-{to_all}", 2 if to_all else 1
    for _ in range(rounds):
        process = runs.start(name, more)
        runs.until_saved(name, process)
        time.sleep(1.0)
        if to_all:
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.send_signal(signal.SIGUSR1)
        assert process.wait(120) == AGAIN, runs.log(name)
    assert runs.log(name).count("which is saved. Start the same command again; the exit code is 85") == rounds
    assert "Traceback" not in runs.log(name)
    runs.whole(name, more)
    runs.assert_same(name, f"whole-{ranks}")


def test_a_run_that_is_asked_while_it_starts_leaves_with_85_too(runs):
    process = runs.start("early")
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == AGAIN
    assert "before any training: start the same command again" in runs.log("early")
    assert not (runs.folder / "early" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_restarts_after_a_killed_rank_and_ends_the_same(runs, victim):
    name = f"restarted-{victim}"
    launcher = [*TORCHRUN, "--max-restarts", "2", "-m", "dft_lightning"]
    process = runs.start(name, DDP, launcher)
    runs.until_saved(name, process)
    time.sleep(1.0)
    os.kill(children_of(process.pid)[victim], signal.SIGKILL)
    assert process.wait(300) == 0, runs.log(name)
    assert re.search(r"Going on from .*last.ckpt: step \d", runs.log(name))
    runs.assert_same(name, "whole-2")


def test_torchrun_that_is_terminated_has_its_ranks_save(runs):
    """torchrun itself leaves with 1, whatever its ranks say: see configs/cluster/torchrun.sh."""
    launcher = [*TORCHRUN, "-m", "dft_lightning"]
    process = runs.start("terminated", DDP, launcher)
    runs.until_saved("terminated", process)
    time.sleep(1.0)
    process.terminate()
    assert process.wait(120) != 0
    assert "which is saved" in runs.log("terminated")
    runs.whole("terminated", DDP, launcher)
    runs.assert_same("terminated", "whole-2")
