"""The quick form of `make exactness` and of `make kill-and-resume`."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import exactness
import pytest

import dft_lightning.weighting as package
from dft_lightning.weighting import TokenWeighting
from dft_lightning.weighting.composition import nested

HERE = Path(__file__).parent


def test_every_weighting_of_the_package_is_in_the_table():
    kinds = {cls for cls in vars(package).values() if isinstance(cls, type) and issubclass(cls, TokenWeighting)}
    compared = {type(part) for weighting in exactness.of_both(quick=False) for part in nested(weighting)}
    assert {cls for cls in kinds if not inspect.isabstract(cls)} <= compared


@pytest.mark.slow
def test_one_gradient_however_a_step_is_cut_up():
    """Traps 1, 2, 3, 8, 9, 14, 16, 17 and 18, on one rank and on two."""
    rows = exactness.table(exactness.Scope(quick=True))
    assert len(rows) > 50
    assert not [row for row in rows if row[-1] != "ok"]


@pytest.mark.slow
@pytest.mark.parametrize(("trials", "options"), [(6, ""), (2, "--ranks 2 --strategy fsdp2 --only full")])
def test_killed_runs_end_as_if_they_had_not_been(trials, options):
    """Trap 21: a handful of random moments, one in each kind of run at least."""
    command = [sys.executable, str(HERE / "kill_and_resume.py"), "--trials", str(trials), "--seed", "3"]
    done = subprocess.run(
        [*command, *options.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"{trials} of {trials} runs ended as the undisturbed one" in done.stdout
