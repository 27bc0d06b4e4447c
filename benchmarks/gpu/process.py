"""A command with a time limit: when that is over, it is killed with every process that it has started."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

#: Seconds between two looks at a process.
_PAUSE = 0.05


class TimedOutError(Exception):
    """The command was killed at its time limit."""


def run(command: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str]) -> int:
    """The exit code of a command, negative for a signal; its output is appended to `log`.

    Raises:
        TimedOutError: it took longer than `seconds`.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    children: set[int] = set()
    try:
        deadline = time.monotonic() + seconds
        while process.poll() is None:
            children |= descendants(process.pid)
            if time.monotonic() > deadline:
                raise TimedOutError
            time.sleep(_PAUSE)
        return process.returncode
    finally:  # however this ends: at the limit, by Ctrl-C, or with children that outlive the command
        _kill(process, children)


def descendants(pid: int) -> set[int]:
    """The processes below one, those in sessions of their own too (compilers start such)."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
    found, layer = set(), {pid}
    while layer:
        layer = {child for child, parent in parents.items() if parent in layer} - found
        found |= layer
    return found


def _kill(process: subprocess.Popen[bytes], children: set[int]) -> None:
    """End a process, its group, and the descendants that it was once seen with."""
    group = {process.pid: os.killpg, **dict.fromkeys(_still_there(children | descendants(process.pid)), os.kill)}
    for pid, kill in group.items():
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
    process.wait()


def _still_there(pids: set[int]) -> set[int]:
    """Without ids that have ended meanwhile: one that was given to another program does not have our mark."""
    return {pid for pid in pids if _has_mark(pid)}


#: In the environment of all that a runner starts, so that no other program is ever killed.
MARK = "DFT_GPU_RUN"


def _has_mark(pid: int) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return f"{MARK}={os.getpid()}".encode() in environment.split(b"\0")
