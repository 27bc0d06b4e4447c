"""What a file system refuses is one line that names the file and what to do."""

import errno
import os
import threading

import pytest

from dft_lightning.disk import ADVICE, disk_error, quiet_threads, reported, writing
from dft_lightning.errors import UserError


@pytest.mark.parametrize("number", ADVICE)
def test_each_says_what_to_do(number, tmp_path):
    with pytest.raises(UserError) as caught, writing(tmp_path / "file", "--run_dir"):
        raise OSError(number, os.strerror(number))
    said = str(caught.value)
    assert f"{tmp_path}/file could not be written ({os.strerror(number)}): {ADVICE[number]} (--run_dir)" in said


#: As the libraries say it that write for us, with the number that is meant.
SAID = {
    "Error while serializing: I/O error: No space left on device (os error 28)": errno.ENOSPC,  # safetensors
    "I/O error: Disk quota exceeded (os error 122)": errno.EDQUOT,
    "[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device": errno.ENOSPC,  # Arrow
    "[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0": errno.ENOSPC,  # torch
    "PytorchStreamWriter failed writing file data/0: file write failed": errno.ENOSPC,
    "1000 requested and 24 written": errno.ENOSPC,  # NumPy
}


@pytest.mark.parametrize("text", SAID)
@pytest.mark.parametrize("inner", [False, True])
def test_libraries_that_write_for_us(text, inner, tmp_path):
    error = RuntimeError(text)
    if inner:  # as Lightning's logger wraps it
        error = ValueError("you tried to log 1.0 which is currently not supported")
        error.__cause__ = RuntimeError(text)
    found = disk_error(error)
    assert found is not None
    assert found.errno == SAID[text]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no space between words"),
        KeyError("28"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        ZeroDivisionError(),
    ],
)
def test_other_errors_keep_their_traceback(error):
    assert disk_error(error) is None
    assert reported(error) is None
    if not isinstance(error, OSError):
        with pytest.raises(type(error)), writing("file"):
            raise error


def test_a_name_that_is_too_long(tmp_path):
    path = tmp_path / ("n" * 300)
    with pytest.raises(UserError, match=r"File name too long.*choose a shorter name"), writing(path):
        path.write_text("")


def test_a_limit_on_the_size_of_files(tmp_path):
    """A real one, in a process of its own."""
    import subprocess
    import sys

    program = (
        "import resource, numpy as np\nfrom dft_lightning.disk import writing\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "with writing('a.npy', '--run_dir'):\n    np.save('a.npy', np.zeros(4096))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "UserError: a.npy could not be written" in done.stderr.strip().splitlines()[-1]


def test_what_is_said_first_counts(tmp_path):
    """A logger that cannot close its file fails after the checkpoint that filled the disk."""
    first = UserError("the checkpoint could not be written")
    later = OSError(errno.ENOSPC, "No space left on device")
    later.__context__ = first
    assert reported(later) is first


def test_threads_that_write_files_end_quietly_and_others_do_not(capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    quiet_threads()

    def fail(error):
        raise error

    for error in (OSError(errno.ENOSPC, "No space left on device"), ZeroDivisionError("a fault")):
        thread = threading.Thread(target=fail, args=(error,))
        thread.start()
        thread.join()
    said = capsys.readouterr().err
    assert "No space" not in said
    assert "ZeroDivisionError: a fault" in said
