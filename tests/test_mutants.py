"""What the mutation testing counts, and what it changes."""

import os
import signal
import time
from dataclasses import asdict

import pytest
from mutant_runs import Chosen, in_fork
from mutant_sources import mutants_of
from mutants import draw, report


@pytest.mark.parametrize(
    ("work", "result"),
    [
        (lambda: 0, "survived"),
        (lambda: 1, "killed"),
        (lambda: 5, "error"),  # no test was run
        (lambda: 1 // 0, "killed"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "killed"),
        (lambda: time.sleep(60), "timeout"),
    ],
    ids=["passes", "fails", "runs nothing", "raises", "crashes", "hangs"],
)
def test_what_becomes_of_a_mutant(work, result, tmp_path):
    begun = time.monotonic()
    assert in_fork(tmp_path / "log", 2.0, work).result == result
    assert time.monotonic() - begun < 30


SOURCE = '''"""A module."""

LIMIT = 3


def scaled(x: int = 1) -> float:
    """Not changed: "a" < "b"."""
    if x < LIMIT and not x == 0:
        print(x)
    return min(x, 2) * 0.5
'''


def test_each_mutant_is_one_change_that_compiles(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(SOURCE)
    found = mutants_of(file, "module.py")
    for mutant in found:
        changed = SOURCE[: mutant.start] + mutant.new + SOURCE[mutant.end :]
        assert changed != SOURCE
        compile(changed, "module.py", "exec")
        assert mutant.first <= mutant.line <= mutant.last
    changes = {(mutant.old, mutant.new) for mutant in found}
    assert {
        ("3", "(4)"),
        ("1", "(2)"),
        ("x < LIMIT", "(x <= LIMIT)"),
        ("x == 0", "(x != 0)"),
        ("not x == 0", "(x == 0)"),
        ("x < LIMIT and not x == 0", "(x < LIMIT or not x == 0)"),
        ("x < LIMIT and not x == 0", "True"),
        ("x < LIMIT and not x == 0", "False"),
        ("print(x)", "pass"),
        ("min(x, 2)", "(max(x, 2))"),
        ("min(x, 2) * 0.5", "(min(x, 2) / 0.5)"),
        ("0.5", "(1.0)"),
    } <= changes
    assert not any("a" in mutant.old.split('"') for mutant in found), "docstrings stay"


def test_the_drawn_mutants_are_those_of_the_seed():
    first = draw(50, 0, [])
    assert first == draw(50, 0, [])
    assert first != draw(50, 1, [])
    assert len(set(first)) == 50
    assert {mutant.file for mutant in draw(600, 0, ["step"])} <= {"step.py", "data/steps.py"}


def test_a_survivor_counts_unless_it_has_a_reason(capsys, tmp_path, monkeypatch):
    [one, other, *_] = draw(9, 0, [])
    rows = [{"result": result, "tests": 3, **asdict(one)} for result in ("killed", "timeout")]
    rows += [{"result": "survived", "tests": 3, **asdict(each)} for each in (one, other)]
    reasons = tmp_path / "reasons.json"
    reasons.write_text("{}")
    monkeypatch.setattr("mutants.EQUIVALENT", reasons)
    assert report(rows) == 2
    assert "4 mutants: 2 killed (1 by the time limit), 0 equivalent, 2 survivors: 50.0%" in capsys.readouterr().out


def test_the_chosen_tests_run_in_their_order():
    items = [type("Item", (), {"nodeid": name})() for name in "abcd"]
    Chosen(["c", "a"]).pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == ["c", "a"]
    Chosen([]).pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == ["c", "a"]
