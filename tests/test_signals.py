"""What a signal does to a process that watches for it, to its workers, and where the main thread cannot be reached."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dft_lightning.signals import AGAIN, APART, INTERRUPTED, PRESSED_AGAIN

WATCH = "import os, signal, time, hashlib\nfrom dft_lightning.signals import NOTICE\n"
# seconds of work that lets other threads run, and that no signal interrupts
BUSY = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"


def started(body: str, **more) -> subprocess.Popen:
    """A process that says when it is ready."""
    lines = "\n    ".join(body.splitlines())
    more.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    process = subprocess.Popen(
        [sys.executable, "-c", f"{WATCH}with NOTICE.watching():\n    {lines}"], stdout=-1, text=True, **more
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGUSR1, 85), (signal.SIGINT, 130)])
def test_a_signal_that_nobody_looks_at_ends_the_process_with_its_code(number, code):
    process = started("print('ready', flush=True)\ntime.sleep(60)")
    process.send_signal(number)
    assert process.wait(30) == code


def test_while_libraries_are_imported_it_needs_no_exception_to_come_through():
    """Some go on whatever becomes of an import of theirs."""
    swallow = "while True:\n    try:\n        time.sleep(60)\n    except BaseException:\n        pass"
    process = started(f"NOTICE.is_importing = True\nprint('ready', flush=True)\n{swallow}", stderr=subprocess.PIPE)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[1] == "dft: SIGTERM before any training: start the same command again\n"
    assert process.returncode == AGAIN


def test_one_that_is_kept_is_named_and_ends_nothing():
    process = started(
        "NOTICE.is_kept = True\nprint('ready', flush=True)\n"
        "while not NOTICE.received: time.sleep(0.01)\nprint(NOTICE.received)"
    )
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=30)[0] == "SIGUSR1\n"
    assert process.returncode == 0


def test_a_second_one_ends_the_process_at_once_even_where_python_runs_no_handler():
    """But not one that comes right after the first: a scheduler and torchrun may both have sent the same wish."""
    process = started(f"NOTICE.is_kept = True\nprint('ready', flush=True)\n{BUSY}")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(APART + 0.5)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == AGAIN
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_ends_the_process_at_once(first):
    """But not what a launcher hands on of the first."""
    process = started(f"NOTICE.is_kept = True\nprint('ready', flush=True)\n{BUSY}", stderr=subprocess.PIPE)
    process.send_signal(first)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    time.sleep(PRESSED_AGAIN + 0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == INTERRUPTED
    assert process.stderr.read() == "dft: interrupted a second time: left at once, the last checkpoint stays\n"


def test_where_ctrl_c_is_ignored_it_stays_so():
    """Of a process that a script has put into the background."""
    process = started("NOTICE.is_kept = True\nprint('ready', flush=True)\ntime.sleep(1)\nprint(NOTICE.received)",
                      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))  # fmt: skip
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[0] == "None\n"
    assert process.returncode == 0


def test_afterwards_signals_do_what_they_did_before():
    body = "NOTICE.is_kept = True\nos.kill(os.getpid(), signal.SIGTERM)\nprint('ready', flush=True)"
    lines = "\n    ".join(body.splitlines())
    code = f"{WATCH}with NOTICE.watching():\n    {lines}\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)"
    process = subprocess.run([sys.executable, "-c", code], timeout=30)
    assert process.returncode == -signal.SIGTERM


FORK = """
from dft_lightning.signals import only_from_the_parent
NOTICE.is_kept = True
child = os.fork()
if not child:
    {prepare}
    time.sleep(60)
    os._exit(3)
time.sleep(0.5)
print('ready', flush=True)
print(child, flush=True)
{then}
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(code, NOTICE.received, flush=True)
"""


def test_a_forked_process_dies_of_a_signal_and_does_not_tell_its_parent():
    process = started(FORK.format(prepare="pass", then="").strip())
    child = int(process.stdout.readline())
    os.kill(child, signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == f"{-signal.SIGTERM} None\n"


def test_a_data_worker_survives_a_signal_to_the_whole_job_but_not_its_parents():
    then = "while not NOTICE.received: time.sleep(0.01)\nos.kill(child, 0)\nos.kill(child, signal.SIGTERM)"
    process = started(FORK.format(prepare="only_from_the_parent(0)", then=then).strip())
    child = int(process.stdout.readline())
    os.kill(child, signal.SIGTERM)
    os.kill(child, signal.SIGUSR1)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "0 SIGTERM\n"
