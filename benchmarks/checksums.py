"""What the checksums of a checkpoint cost: hashes of the standard library, and what saving and loading take.

    python benchmarks/checksums.py [--gigabytes 1]

The state is random float32 tensors of 16 MiB; files are in the page cache when they are read, so that what is
measured is the arithmetic, and not the disk. Each number is the best of three.
"""

import argparse
import hashlib
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dft_lightning.checkpointing import checksums, place

TENSOR = 4 << 20
CHUNK = 1 << 20


def best(run: Callable[[], object], times: int = 3) -> float:
    """Seconds."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def running(update: Callable[[memoryview, int], int], path: Path) -> None:
    """A checksum that is carried from piece to piece."""
    value, buffer = 0, memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            value = update(buffer[:count], value)


def hashed(name: str, path: Path) -> None:
    with path.open("rb") as file:
        hashlib.file_digest(file, name)


def hashes(path: Path) -> Mapping[str, Callable[[], None]]:
    return {
        "zlib.crc32": lambda: running(zlib.crc32, path),
        "zlib.adler32": lambda: running(zlib.adler32, path),
        **{f"hashlib.{name}": (lambda name=name: hashed(name, path)) for name in ("blake2b", "sha256", "sha1", "md5")},
    }


def verified(path: Path) -> None:
    """As by a process that has not done so yet."""
    checksums._VERIFIED.clear()
    checksums.is_sealed(path)


def sealed(path: Path, length: int) -> None:
    """What a save adds, to a file as `torch.save` has left it."""
    os.truncate(path, length)
    checksums.seal(path)


def loaded(path: Path) -> None:
    """Every tensor is touched."""
    for tensor in torch.load(path, mmap=True, weights_only=True)["state_dict"].values():
        tensor.sum()


def saved(state: Mapping[str, Any], path: Path) -> None:
    torch.save(state, path)
    place.on_disk(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    size = parser.parse_args().gigabytes * 1e9
    count = max(round(size / (4 * TENSOR)), 1)
    state = {"state_dict": {f"w{number}": torch.randn(TENSOR) for number in range(count)}}
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / "last.ckpt"
        rows: dict[str, Callable[[], None]] = {"torch.save, and to the disk": lambda: saved(state, path)}
        saved(state, path)
        length = path.stat().st_size
        rows |= {"loading, every tensor touched": lambda: loaded(path), **hashes(path)}
        rows |= {"what a save adds": lambda: sealed(path, length), "what the first load adds": lambda: verified(path)}
        print(f"{length / 1e9:.2f} GB, {torch.get_num_threads()} threads\n\n| | s | GB/s |\n|---|---:|---:|")
        for name, run in rows.items():
            took = best(run)
            print(f"| {name} | {took:.2f} | {length / 1e9 / took:.1f} |")


if __name__ == "__main__":
    main()
