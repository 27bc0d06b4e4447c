"""A rank that hangs is named, wherever it hangs."""

import os
import signal
import threading
import time

import pytest
import torch.distributed as dist
from launching import DDP, FSDP2, SOON, TORCHRUN, Runs, children_of

from dft_lightning.callbacks.roll_call import Place, RollCall, main_thread, verdict
from dft_lightning.errors import UserError

WHERE = {0: "alpha, process 10", 1: "beta, process 11", 2: "beta, process 12"}


def place(rank: int, marks: int) -> Place:
    return Place(rank, marks, 7, "the forward pass", f"reduce{rank} (step.py:1)")


class TestVerdict:
    def test_names_who_is_behind_and_where_it_is(self):
        said = verdict([place(0, 30), place(1, 29), place(2, 30)], WHERE, 10.0)
        assert "Nothing has moved for 10 minutes.\nRank 1 (beta, process 11) is behind the others: in the step" in said
        assert "past the forward pass, in reduce1 (step.py:1)\n" in said
        assert "Rank 0, 2 waits: in the step after 7, past the forward pass, in reduce0" in said

    def test_names_who_does_not_answer(self):
        said = verdict([place(1, 30), place(2, 30)], WHERE, 0.5)
        assert "for 0.5 minutes.\nRank 0 (alpha, process 10) does not answer" in said
        assert "behind" not in said

    def test_blames_nobody_where_all_are_equally_far(self):
        said = verdict([place(rank, 30) for rank in WHERE], WHERE, 10.0)
        assert said.count("All ranks are equally far; rank") == 3
        assert "behind" not in said


def test_where_the_main_thread_is():
    assert "test_where_the_main_thread_is (test_roll_call.py:" in main_thread()


def test_an_earlier_answer_is_none(capfd):
    """After an alarm that came to nothing, a rank that is stopped does not answer by what it said then."""
    store = dist.HashStore()
    calls = [RollCall(0.001) for _ in WHERE]
    for rank, call in enumerate(calls):
        call._store, call._rank, call._ranks = store, rank, len(calls)
        store.set(f"where/{rank}", WHERE[rank])
        threading.Thread(target=call._watch, daemon=True).start()
    said = until(capfd, "All ranks are equally far")
    assert "does not answer" not in said
    for call in calls:
        call._moved, call._marks = time.monotonic() + 0.5, call._marks + 1
    end = time.monotonic() + 20
    while store.check(["place/0"]) or store.check(["place/1"]):
        assert time.monotonic() < end, "what was answered once still stands"
        time.sleep(0.01)
    calls[0]._end.set()
    said = until(capfd, "Nothing has moved")
    assert "Rank 0 (alpha, process 10) does not answer" in said
    for call in calls:
        call._end.set()


def until(capfd, what):
    """What was said until then."""
    said, end = "", time.monotonic() + 60
    while what not in said:
        assert time.monotonic() < end, said
        time.sleep(0.05)
        said += capfd.readouterr().err
    time.sleep(0.2)
    return said + capfd.readouterr().err


def test_minutes_below_zero_are_refused():
    with pytest.raises(UserError, match=r"roll_call.minutes is -1"):
        RollCall(-1)


HANG = '''"""One rank stays where it is."""

import os
import time
from dataclasses import dataclass

from dft_lightning.weighting import DFT


@dataclass(frozen=True)
class Hang(DFT):
    def weights(self, tokens):
        if os.environ["RANK"] == "1" and os.path.exists("now"):
            time.sleep(1000)
        return super().weights(tokens)
'''


@pytest.mark.slow
@pytest.mark.parametrize(("stopped", "strategy"), [(False, DDP), (True, FSDP2)])
def test_a_rank_that_hangs_is_named(tmp_path, stopped, strategy):
    """By a weighting of its user's that does not come back, or since its process is stopped."""
    runs = Runs(tmp_path)
    (tmp_path / "hang.py").write_text(HANG)
    launcher = [*TORCHRUN, "-m", "dft_lightning"]
    more = f"{strategy} --roll_call.minutes 0.2 --model.weighting hang.Hang --trainer.max_epochs 1000"
    process, children = runs.start("run", more, launcher), []
    try:
        runs.until_saved("run", process)
        assert "Nothing has moved" not in runs.log("run")
        children = children_of(process.pid)
        pid = children[1]
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        else:
            (tmp_path / "now").touch()
        deadline = time.monotonic() + SOON
        while "Nothing has moved" not in runs.log("run"):
            assert time.monotonic() < deadline, runs.log("run")
            time.sleep(0.2)
        time.sleep(0.5)
        said = runs.log("run").partition("Nothing has moved")[2]
        assert ("weights (hang.py:" in said) is not stopped
        if stopped:
            assert f"process {pid}) does not answer" in said
        elif "All ranks are equally far" in said:  # it came to the weights where no mark lies between the ranks
            assert f"process {pid}): in the step after" in said
        else:
            assert f"process {pid}) is behind the others" in said
            assert "Rank 0 waits" in said
    finally:
        for one in (process.pid, *children):
            os.kill(one, signal.SIGKILL)
