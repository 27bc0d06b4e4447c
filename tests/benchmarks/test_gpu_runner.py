"""`make gpu`: time limits, failures, resuming and the page, with parts that hang, crash, fail and pass."""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from gpu import machine, process, runner
from gpu.part import Measurement

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
FACTS = {"python": "3", "system": "Linux", "packages": {"torch": "2"}, "cuda": "13.0", "gpu": "A", "driver": "5",
         "gpu_memory_gib": 1.0, "compute_capability": "9.0"}  # fmt: skip
HEAD = '''"""What {name} does."""

import os, subprocess, sys, time
from pathlib import Path
from gpu.part import Measurement, SkippedError, attempt

HERE = Path(__file__).parent


def run(setting):
    with (HERE / "{name}.runs").open("a") as runs:
        runs.write("x")
    yield Measurement("first | one", 1.0, 2.0, unit="s", note="a | b")
'''
BODIES = {
    "passes": 'yield Measurement("reported", 12345.6)',
    "misses": 'yield Measurement("too much", 3.0, 2.0)\n    yield Measurement("a NaN", float("nan"), 2.0)',
    "raises": "yield from attempt('inner', lambda: 1 / 0)\n    yield Measurement('after it', 0.0, 0.0)",
    "crashes": "os.abort()",
    "exits": "os._exit(3)",
    "hangs": """child = subprocess.Popen(["sleep", "300"], start_new_session=True)
    (HERE / "child").write_text(str(child.pid))
    time.sleep(300)""",
}
SKIPS = '''"""Says why."""

from gpu.part import SkippedError


def run(setting):
    raise SkippedError("no such thing")
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With a module for each kind of part, where parts find it."""
    for name, body in BODIES.items():
        (tmp_path / f"part_{name}.py").write_text(HEAD.format(name=name) + f"    {body}\n")
    (tmp_path / "part_skips.py").write_text(SKIPS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def parts(*names, seconds=60.0):
    return [runner.Part(name, f"It {name}", seconds, other_module=f"part_{name}") for name in names]


def run(folder, *names, facts=None, seconds=60.0, only=None, **options):
    given = {"out": folder / "out", "minutes": 5.0, "from_scratch": False, "dry_run": False, "only": only or names}
    made = runner.Runner(argparse.Namespace(**(given | options)), parts(*names, seconds=seconds), facts or FACTS)
    passed = made.run()
    return passed, json.loads((folder / "out" / f"{made.name}.json").read_text(), parse_constant=pytest.fail)


def runs(folder, name):
    path = folder / f"{name}.runs"
    return len(path.read_text()) if path.exists() else 0


def is_there(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def verdicts(results):
    return {name: part["verdict"] for name, part in results["parts"].items()}


def test_a_failure_does_not_stop_the_rest(folder):
    names = ("crashes", "exits", "misses", "raises", "skips", "passes")
    passed, results = run(folder, *names)
    assert not passed
    assert verdicts(results) == dict.fromkeys(names[:4], "failed") | {"skips": "skipped", "passes": "passed"}
    found = results["parts"]
    assert found["crashes"]["reason"] == f"its process ended with {-signal.SIGABRT}"
    assert found["exits"]["reason"] == "its process ended with 3"
    assert [one["what"] for one in found["crashes"]["measurements"]] == ["first | one"], "kept, though it crashed"
    assert found["skips"]["reason"] == "no such thing"
    inner = found["raises"]["measurements"][1]
    assert (inner["verdict"], inner["note"]) == ("failed", "ZeroDivisionError: division by zero")
    assert found["raises"]["measurements"][2]["verdict"] == "passed"
    assert found["misses"]["measurements"][2]["value"] == "nan"
    assert "Traceback" in (folder / "out" / "gpu.log").read_text()


def test_all_is_well_where_nothing_has_failed(folder):
    assert run(folder, "passes", "skips")[0]


def test_a_part_is_killed_at_its_limit_with_all_that_it_has_started(folder):
    began = time.monotonic()
    _, results = run(folder, "hangs", "passes", seconds=4.0)
    assert time.monotonic() - began < 60
    assert verdicts(results) == {"hangs": "timed out", "passes": "passed"}
    assert results["parts"]["hangs"]["reason"] == "killed after 4 s"
    assert len(results["parts"]["hangs"]["measurements"]) == 1
    assert not is_there(int((folder / "child").read_text())), "a child in a session of its own"


def test_no_part_begins_without_time(folder):
    _, results = run(folder, "passes", minutes=0.1)
    assert verdicts(results) == {"passes": "not run"}
    assert runs(folder, "passes") == 0
    _, results = run(folder, "passes")
    assert verdicts(results) == {"passes": "passed"}


def test_a_limit_is_no_longer_than_the_time_left(folder, monkeypatch):
    monkeypatch.setattr(runner, "_LEAST_SECONDS", 1.0)
    began = time.monotonic()
    _, results = run(folder, "hangs", seconds=300.0, minutes=4 / 60)
    assert verdicts(results) == {"hangs": "timed out"}
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("name", ["passes", "misses"])
def test_what_is_finished_is_not_run_again(folder, name):
    first = run(folder, name)[1]
    assert run(folder, name)[1]["parts"] == first["parts"]
    assert runs(folder, name) == 1
    run(folder, name, from_scratch=True)
    assert runs(folder, name) == 2


def test_what_was_broken_off_is_run_again(folder):
    for _ in range(2):
        run(folder, "exits", "hangs", seconds=4.0)
    assert (runs(folder, "exits"), runs(folder, "hangs")) == (2, 2)


def test_other_parts_stay_in_the_results(folder):
    run(folder, "passes")
    _, results = run(folder, "passes", "misses", only=["misses"])
    assert verdicts(results) == {"passes": "passed", "misses": "failed"}
    assert runs(folder, "passes") == 1


def test_other_hardware_or_code_begins_from_scratch(folder, monkeypatch):
    run(folder, "passes")
    run(folder, "passes", facts=FACTS | {"gpu": "B"})
    assert runs(folder, "passes") == 2
    monkeypatch.setattr(machine, "code", lambda: "other")
    run(folder, "passes", facts=FACTS | {"gpu": "B"})
    assert runs(folder, "passes") == 3
    (folder / "out" / "gpu.json").write_text("{")
    run(folder, "passes", facts=FACTS | {"gpu": "B"})
    assert runs(folder, "passes") == 4


def test_a_dry_run_has_files_of_its_own(folder):
    run(folder, "passes")
    run(folder, "passes", dry_run=True)
    assert runs(folder, "passes") == 2
    text = (folder / "out" / "gpu_dry_run.md").read_text()
    assert "no figure here is one of a GPU" in text
    assert "dry run" not in (folder / "out" / "gpu.md").read_text()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_is_there(folder, sent):
    program = f"""import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell without a terminal has it ignored
sys.path[:0] = [{str(ROOT / "benchmarks")!r}, {str(Path(__file__).parent)!r}, {str(ROOT / "tests")!r}]
import test_gpu_runner as tests
from pathlib import Path
with tests.runner._terminated_as_interrupted():
    try:
        tests.run(Path({str(folder)!r}), "passes", "hangs")
    except KeyboardInterrupt:
        sys.exit(130)
"""
    started = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "child").exists() or not (folder / "child").read_text():
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started.send_signal(sent)
    assert started.wait(60) == 130
    results = json.loads((folder / "out" / "gpu.json").read_text())
    assert verdicts(results) == {"passes": "passed", "hangs": "interrupted"}
    assert len(results["parts"]["hangs"]["measurements"]) == 1
    assert not is_there(int((folder / "child").read_text()))


def test_the_page_and_the_json_have_everything(folder):
    _, results = run(folder, "passes", "misses", "exits")
    assert results.keys() == {"dry_run", "machine", "repository", "code", "parts"}
    assert results["repository"].keys() == {"commit", "dirty"}
    for part in results["parts"].values():
        assert part.keys() == {"verdict", "reason", "finished", "began", "seconds", "measurements", "last_lines"}
        for one in part["measurements"]:
            assert one.keys() == {"what", "value", "bound", "relation", "unit", "note", "status", "verdict"}
    text = (folder / "out" / "gpu.md").read_text()
    assert "- GPU: A, 1.0 GiB, compute capability 9.0, driver 5, CUDA 13.0" in text
    assert "| It passes | passed | 1 passed, 1 reported |" in text
    assert "| first \\| one | 1 s | ≤ 2 s | passed | a \\| b |" in text
    assert "| reported | 12,346 |  | reported |  |" in text or "| reported | 1.23e+04 |  | reported |  |" in text
    assert "| a NaN | nan | ≤ 2 | failed |  |" in text
    assert "failed: its process ended with 3" in text
    assert "What passes does." in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") in (5, 6) for line in rows)
    assert len([*(folder / "out").iterdir()]) <= 8


@pytest.mark.parametrize(
    ("measurement", "expected"),
    [
        (Measurement("", 1.0, 1.0), "passed"),
        (Measurement("", 1.1, 1.0), "failed"),
        (Measurement("", 1.1, 1.0, ">="), "passed"),
        (Measurement("", 0.9, 1.0, ">="), "failed"),
        (Measurement("", float("nan"), 1.0), "failed"),
        (Measurement("", float("nan"), 1.0, ">="), "failed"),
        (Measurement("", float("inf"), 1.0), "failed"),
        (Measurement("", 5.0), "reported"),
        (Measurement("", float("nan")), "failed"),
        (Measurement(""), "failed"),
        (Measurement("", status="skipped"), "skipped"),
        (Measurement("", status="error"), "failed"),
    ],
)
def test_verdicts(measurement, expected):
    assert measurement.verdict == expected
    json.dumps(measurement.as_json(), allow_nan=False)


def test_no_measurement_is_no_pass():
    assert runner._verdict_of([]) == "failed"


def test_only_what_a_run_has_started_is_killed(monkeypatch):
    """Process ids are given out again."""
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        assert process._still_there({stranger.pid}) == set()
    finally:
        stranger.kill()
        stranger.wait()
