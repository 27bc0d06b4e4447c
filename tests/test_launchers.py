"""Asked to leave, or with a rank killed, a run ends as the undisturbed one, by the launchers that users have."""

import os
import re
import signal
import time

import pytest
from launching import DDP, FSDP2, LONG, SOON, TORCHRUN, Runs, children_of

from dft_lightning.signals import AGAIN, INTERRUPTED

pytestmark = pytest.mark.slow
#: Options of the three kinds of run: one process with data workers, two that have all of the model, two that share it.
KINDS = {"one": "--data.num_workers 2", "ddp": DDP, "fsdp2": FSDP2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    found = Runs(tmp_path_factory.mktemp("runs"))
    whole = {}

    def truth(kind):
        """The name of an undisturbed run."""
        if kind not in whole:
            found.whole(f"whole-{kind}", KINDS[kind])
            whole[kind] = f"whole-{kind}"
        return whole[kind]

    found.truth = truth
    return found


def at_work(runs, name, kind, launcher=None):
    """A run that has written a checkpoint, and goes on."""
    process = runs.start(name, KINDS[kind], *([launcher] if launcher else []))
    runs.until_saved(name, process)
    time.sleep(1.0)
    return process


@pytest.mark.parametrize(("kind", "to_all"), [("one", True), ("ddp", False), ("fsdp2", True)])
def test_asked_to_leave_it_saves_and_goes_on_to_the_same_end(runs, kind, to_all):
    """As SLURM signals a job: all processes of it, data workers included; or as `docker stop` does: the first one."""
    name = f"asked-{kind}-{to_all}"
    process = at_work(runs, name, kind)
    if to_all:
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.send_signal(signal.SIGUSR1)
    assert process.wait(SOON) == AGAIN, runs.log(name)
    assert runs.log(name).count("which is saved. Start the same command again; the exit code is 85") == 1
    assert "Traceback" not in runs.log(name)
    runs.whole(name, KINDS[kind])
    runs.assert_same(name, runs.truth(kind))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, AGAIN), (signal.SIGINT, INTERRUPTED)])
def test_a_run_that_is_asked_while_it_starts_leaves_with_its_code_too(runs, number, code):
    name = f"early-{code}"
    process = runs.start(name)
    time.sleep(1.5)
    process.send_signal(number)
    assert process.wait(SOON) == code
    assert "before any training: start the same command again" in runs.log(name)
    assert "Traceback" not in runs.log(name)
    assert not (runs.folder / name / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("kind", ["one", "ddp"])
def test_ctrl_c_saves_and_the_same_command_goes_on_to_the_same_end(runs, kind):
    """A terminal sends it to all processes."""
    name = f"interrupted-{kind}"
    process = at_work(runs, name, kind)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(SOON) == INTERRUPTED, runs.log(name)
    assert runs.log(name).count("which is saved. Start the same command again; the exit code is 130") == 1
    assert "Traceback" not in runs.log(name)
    runs.whole(name, KINDS[kind])
    runs.assert_same(name, runs.truth(kind))


def until_others(process, ranks):
    """Wait until torchrun has started two ranks in place of these."""
    deadline = time.monotonic() + SOON
    while len(others := children_of(process.pid)) < 2 or set(others) & set(ranks):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)


@pytest.mark.parametrize(("kind", "victim"), [("ddp", 0), ("fsdp2", 1)])
def test_torchrun_restarts_after_a_killed_rank_and_ends_the_same(runs, kind, victim):
    """Twice in one run of torchrun, which keeps over all its restarts what ranks have told each other."""
    name = f"restarted-{kind}"
    process = at_work(runs, name, kind, [*TORCHRUN, "--max-restarts", "2", "-m", "dft_lightning"])
    for _ in range(2):
        ranks = children_of(process.pid)
        os.kill(ranks[victim], signal.SIGKILL)
        until_others(process, ranks)
        runs.until_saved(name, process)
    assert process.wait(LONG) == 0, runs.log(name)
    assert len(re.findall(r"Going on from .*last.ckpt: step \d", runs.log(name))) == 2
    runs.assert_same(name, runs.truth(kind))


def test_torchrun_that_is_terminated_has_its_ranks_save(runs):
    """torchrun itself leaves with 1, whatever its ranks say: see configs/cluster/torchrun.sh."""
    launcher = [*TORCHRUN, "-m", "dft_lightning"]
    process = at_work(runs, "terminated", "ddp", launcher)
    process.terminate()
    assert process.wait(SOON) != 0
    assert "which is saved" in runs.log("terminated")
    runs.whole("terminated", DDP, launcher)
    runs.assert_same("terminated", runs.truth("ddp"))
