"""Signals that ask a run to leave: a scheduler needs its place, or its time is up.

Nothing heavy is imported here, for a signal may come while everything else still is.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN = 85
"""Exit code of a run that was asked to leave: start the same command again, and it goes on."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: the run is saved just the same, but no launcher starts it again."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

APART = 5.0
"""Seconds; what comes sooner is the same wish: a scheduler signals all processes of a job, and torchrun hands it on."""

PRESSED_AGAIN = 1.0
"""The same for Ctrl-C, which a terminal sends to all processes, and torchrun hands on: a second one comes by hand."""


class Preempted(SystemExit):
    """The run leaves because it was asked to."""

    def __init__(self, why: str) -> None:
        super().__init__(exit_code(NOTICE.received))
        self.why = why


def exit_code(received: str | None) -> int:
    """Of a run that a signal of this name has ended."""
    return INTERRUPTED if received == "SIGINT" else AGAIN


class Notice:
    """What was asked of this process so far.

    The first signal is kept where somebody looks at it, once an optimizer step, and ends the process elsewhere. A
    second one, some seconds later, ends it at once: a thread sees to that, since the main one may wait for a device or
    for another rank, and Python runs no handler before it is back.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal."""
        self.is_kept = False
        """Whether somebody looks at `received`, so that a signal does not end the process."""
        self.is_importing = False
        """Whether there are but imports so far: a signal ends the process then and there.

        An exception would be lost in a library that goes on whatever becomes of an import, or leave it half there.
        """
        self._pipe: tuple[int, int] | None = None
        os.register_at_fork(after_in_child=self._forget)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take the signals meanwhile; in the main thread, which alone may, and once."""
        if self._pipe is not None or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        if before[signal.SIGINT] is signal.SIG_IGN:  # of a process in the background of a script
            del before[signal.SIGINT]
        self.received, self.is_kept, self.is_importing = None, False, False
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        for number in before:
            signal.signal(number, self._take)
        earlier = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=_leave_at_the_second, args=(self._pipe[0],), daemon=True, name="second-signal").start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(earlier)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(self._pipe[1])  # the thread reads the end, and closes the other one
            self._pipe = self.received = None

    def _take(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
        if self.is_kept:
            return
        why = f"{self.received} before any training"
        if self.is_importing:
            os.write(2, f"dft: {why}: start the same command again\n".encode())
            os._exit(exit_code(self.received))
        raise Preempted(why)

    def _forget(self) -> None:
        """A forked worker is none of the scheduler's business; and it would write into the parent's pipe."""
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # Ctrl-C stays ignored in the background
                    signal.signal(number, signal.SIG_DFL)
            for end in self._pipe:
                os.close(end)
            self._pipe = None


NOTICE = Notice()
"""That of this process."""


def _leave_at_the_second(pipe: int) -> None:
    first = None
    while numbers := os.read(pipe, 64):  # one byte a signal
        if any(number in SIGNALS for number in numbers):
            pressed = signal.SIGINT in numbers
            first = first or time.monotonic()
            if time.monotonic() - first > (PRESSED_AGAIN if pressed else APART):
                if pressed:
                    os.write(2, b"dft: interrupted a second time: left at once, the last checkpoint stays\n")
                os._exit(INTERRUPTED if pressed else AGAIN)
    os.close(pipe)


def only_from_the_parent(_worker: int) -> None:
    """Have a data worker survive the signals, which a scheduler sends to every process of a job.

    Without its workers the run could not finish its step. Its parent, and nobody else, may still end it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_obey_the_parent, daemon=True, name="parents-signals").start()


def _obey_the_parent() -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)
