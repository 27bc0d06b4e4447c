"""A checksum at the end of each file of a checkpoint, so that damage is found when the file is read.

The last line of a file is the CRC-32 and the length of all that is before it. What reads the file without knowing of it
(`torch.load`, the index's unpickler) stops before that line, so that other versions read it, too. CRC-32 finds any
change of up to 32 bits in a row for certain, other damage but for one case in 2^32, and of what the standard library
has it is among the fastest (`benchmarks/checksums.py`). It is no protection against forgery.
"""

import os
import re
import zipfile
import zlib
from pathlib import Path

from dft_lightning.checkpointing import place

_LINE = re.compile(rb"\ndft-lightning crc32 ([0-9a-f]{8}) of ([0-9a-f]{16}) bytes\n")
_LENGTH = len(b"\ndft-lightning crc32 01234567 of 0123456789abcdef bytes\n")
_CHUNK = 1 << 20
#: Device, number, size and time of files that were verified by this process: each is read once.
_VERIFIED: set[tuple[int, int, int, int]] = set()


def seal(path: Path) -> None:
    """Append the checksum of a file that has just been written, and wait until it is on disk.

    A zip file, as `torch.save` writes, has checksums of what was in memory: it is compared with them first.

    Raises:
        ValueError: the file is not what was in memory.
        OSError: the file system says so.
    """
    _check_zip(path)
    length = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"\ndft-lightning crc32 %08x of %016x bytes\n" % (_crc32(path, length), length))
    place.on_disk(path)
    _VERIFIED.add(_state(path))


def is_sealed(path: Path, verify: bool = True) -> bool:
    """Whether a file has a checksum. One of an earlier version has none, but may be a zip file, which has its own.

    Args:
        verify: also read the file, unless this process has done so, and compare.

    Raises:
        ValueError: the file is damaged.
        OSError: the file system says so.
    """
    length = max(path.stat().st_size - _LENGTH, 0)
    with path.open("rb") as file:
        file.seek(length)
        found = _LINE.fullmatch(file.read())
    if found is None:
        if verify:
            _check_zip(path)
        return False
    if int(found[2], 16) != length:
        raise ValueError(f"{path.name} has {length:,} bytes of {int(found[2], 16):,}")
    if verify and _state(path) not in _VERIFIED:
        if _crc32(path, length) != int(found[1], 16):
            raise ValueError(f"{path.name} has not the checksum it was written with: some of its bytes have changed")
        _VERIFIED.add(_state(path))
    return True


def _crc32(path: Path, length: int) -> int:
    """Of the first bytes of a file."""
    value, buffer = 0, memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while length and (count := file.readinto(buffer[: min(length, _CHUNK)])):
            value, length = zlib.crc32(buffer[:count], value), length - count
    return value


def _check_zip(path: Path) -> None:
    """Compare the parts of a zip file with their own checksums; nothing where it is another file."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
        file.seek(max(path.stat().st_size - 22, 0))
        if file.read(4) != b"PK\x05\x06":
            raise ValueError(f"{path.name} has not the end that it was written with")
    with zipfile.ZipFile(path) as parts:
        if (damaged := parts.testzip()) is not None:
            raise ValueError(f"{damaged} in {path.name} has not the checksum it was written with")


def _state(path: Path) -> tuple[int, int, int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
