"""What a file system refuses, as one line: a full disk, a quota, a read-only folder, a name that is too long."""

import errno
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dft_lightning.errors import UserError

_ROOM = "free space there, or choose a place on another disk"
_ALLOWED = "choose a folder that you may write to"
#: What to do about each error that is the file system's, and not a fault of ours.
ADVICE = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: "free space within your quota, or choose a place on another disk",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`), or choose a place on another file system",
    errno.EROFS: _ALLOWED,
    errno.EACCES: _ALLOWED,
    errno.EPERM: _ALLOWED,
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of the path is a file: choose another name",
    errno.EISDIR: "a folder has the name of the file: choose another name, or move the folder",
    errno.EIO: "look at the disk, or choose a place on another one",
    errno.ESTALE: "mount the file system again, or choose a place on another one",
}
#: How libraries that are not Python's say that a write failed; the number, where they give one.
_SAID = re.compile(
    r"os error (?P<rust>\d+)|\[?[Ee]rrno (?P<arrow>\d+)|(?P<full>No space left on device)"
    r"|(?P<quota>Disk quota exceeded)|\d+ requested and \d+ written|PytorchStreamWriter failed"
    r"|unexpected pos \d+ vs \d+"
)


def disk_error(error: BaseException) -> OSError | None:
    """What the file system said, somewhere in a chain of exceptions; None where it said nothing.

    torch and NumPy do not say why a write failed; that is taken as a full disk unless an error around it says more.
    """
    vague = None
    for one in _chain(error):
        if isinstance(one, OSError) and one.errno in ADVICE:
            return one
        if (found := _SAID.search(str(one))) is not None:
            number = int(found["rust"] or found["arrow"] or (errno.EDQUOT if found["quota"] else errno.ENOSPC))
            if found["rust"] or found["arrow"] or found["full"] or found["quota"]:
                return OSError(number, os.strerror(number)) if number in ADVICE else None
            vague = OSError(number, f"{os.strerror(number)}?")
    return vague


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def reported(error: BaseException, path: object = None, option: str = "") -> UserError | None:
    """The one line for an error of the file system; None for any other.

    Args:
        path: what was written, unless the error itself names a file.
        option: by which the user chooses another place.
    """
    found = disk_error(error)
    if found is None:
        return None
    if (known := next((one for one in _chain(error) if isinstance(one, UserError)), None)) is not None:
        return known  # what came after it is its consequence, such as a logger that cannot close its file
    name = found.filename if isinstance(found.filename, str | bytes | Path) else None
    where = path if path is not None else os.fsdecode(name) if name is not None else "a file"
    verb = "written" if path is not None else "read or written"
    return _line(where, verb, str(found.strerror), ADVICE[found.errno or errno.ENOSPC], option)


def _line(where: object, verb: str, reason: str, advice: str, option: str) -> UserError:
    how = f"{advice} ({option})" if option else advice
    return UserError(
        f"{where} could not be {verb} ({reason}): {how}. What was complete before is still there; start the same "
        "command again"
    )


@contextmanager
def writing(path: object, option: str = "") -> Iterator[None]:
    """Turn an error of the file system into a `UserError` that names what was written; see `reported`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # what the libraries that write files raise has no class in common
        line = reported(error, path, option)
        if line is None and isinstance(error, OSError):
            line = _line(path, "written", str(error), "look at the disk, or choose another place", option)
        if line is None:
            raise
        raise line from error


def quiet_threads() -> None:
    """Let threads that write files end without a traceback where the disk is full: the main thread hears of it."""
    usual = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is None or disk_error(args.exc_value) is None:
            usual(args)

    threading.excepthook = hook
