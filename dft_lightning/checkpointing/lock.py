"""One run at a time in a run's folder: a second one would write over the first one's checkpoints."""

import fcntl
import os
import socket
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dft_lightning.errors import UserError

#: Seconds; a run that is leaving may still be writing.
PATIENCE = 20.0


class RunLock:
    """A lock that ends with its process, however that ends; its workers do not have it."""

    def __init__(self) -> None:
        self._file: int | None = None
        self._path = Path()
        self._made = False

    def take(self, run_dir: Path) -> None:
        """Wait a little for a run that is leaving.

        Raises:
            UserError: another process keeps it; names that.
        """
        self._made, self._path = not run_dir.exists(), run_dir / ".lock"
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644))
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise UserError(f"--run_dir {run_dir} cannot be written ({reason}): choose another") from error
        end = time.monotonic() + PATIENCE
        for number in range(10**6):
            if self._tried():
                return
            if number == 0:
                rank_zero_info(f"{run_dir} is in use ({self._holder()}); waiting {PATIENCE:.0f} seconds for its end")
            if time.monotonic() > end:
                raise UserError(
                    f"run_dir {run_dir} is in use ({self._holder()}): wait for the end of that run, or choose another "
                    "--run_dir"
                )
            time.sleep(0.2)

    def _tried(self) -> bool:
        opened = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(opened)
            return False
        except OSError as error:
            os.close(opened)
            rank_zero_warn(f"{self._path} cannot be locked ({error}): do not start a second run there")
            return True
        if not self._path.exists() or os.fstat(opened).st_ino != self._path.stat().st_ino:
            os.close(opened)  # its holder has just removed it
            return False
        with suppress(OSError):  # a full disk: it is locked, but does not say by whom
            self._say(opened)
        self._file = opened
        return True

    @staticmethod
    def _say(opened: int) -> None:
        os.truncate(opened, 0)
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        os.write(opened, f"process {os.getpid()} on {socket.gethostname()}, since {now}".encode())

    def _holder(self) -> str:
        with suppress(OSError):
            return self._path.read_text() or "by another process"
        return "by another process"

    def release(self) -> None:
        """Leave nothing behind, not even a folder that was made for the lock alone."""
        if self._file is None:
            return
        self._path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None
        if self._made:
            with suppress(OSError):  # a run is in it by now
                self._path.parent.rmdir()
