"""A second run in a run's folder waits a little, and is refused; a run that is gone is in nobody's way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dft_lightning.checkpointing import lock
from dft_lightning.checkpointing.lock import RunLock
from dft_lightning.errors import UserError

HOLD = """import sys, time
from pathlib import Path
from dft_lightning.checkpointing.lock import RunLock
RunLock().take(Path(sys.argv[1]))
print("taken", flush=True)
time.sleep(100)"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout.readline() == b"taken\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_by_name(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.5)
    with pytest.raises(UserError, match=rf"run is in use \(process {holder.pid} on .*choose another --run_dir"):
        RunLock().take(tmp_path / "run")


def test_a_run_that_was_killed_is_in_nobodys_way(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 5.0)
    holder.kill()
    own = RunLock()
    own.take(tmp_path / "run")
    assert str(os.getpid()) in (tmp_path / "run" / ".lock").read_text()
    own.release()
    assert not (tmp_path / "run" / ".lock").exists()


def test_nothing_is_left_behind(tmp_path):
    own = RunLock()
    own.take(tmp_path / "run")
    own.release()
    own.release()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    own.take(tmp_path / "run")
    Path(tmp_path / "run" / "kept").touch()
    own.release()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["kept"]
