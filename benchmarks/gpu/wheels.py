"""Packages for a machine without network: downloaded here as wheels (`make gpu-wheels`), installed there by the runner.

    PYTHONPATH=benchmarks python -m gpu.wheels [--python 3.12 --cuda 130 --out .wheels]

Such a machine is taken to have torch, transformers, lightning, peft and what these need, so only the other packages are
downloaded, in the versions of constraints.txt. They are small; of bitsandbytes' libraries, one for each version of
CUDA, the one for `--cuda` is kept.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from gpu import machine

CARRIED = ("datasets", "dill", "multiprocess", "jsonargparse", "docstring-parser", "typeshed-client", "bitsandbytes")
#: pip takes none of them for another.
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28, 31, 34, 35)] + ["manylinux2014_x86_64"]
_LIBRARY = re.compile(r"bitsandbytes/libbitsandbytes_(cpu|cuda\d+|rocm\d+|xpu)\.\w+$")


def download(python: str, cuda: str, out: Path) -> int:
    """Fetch the wheels; their size in bytes."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(out)]
    command += [word for name in _PLATFORMS for word in ("--platform", name)]
    subprocess.run([*command, "--constraint", str(machine.ROOT / "constraints.txt"), *CARRIED], check=True)
    for wheel in out.glob("bitsandbytes-*.whl"):
        keep_one_library(wheel, cuda)
    return sum(wheel.stat().st_size for wheel in out.glob("*.whl"))


def keep_one_library(wheel: Path, cuda: str) -> None:
    """Take bitsandbytes' libraries for other versions of CUDA out of its wheel, if it has the one that is wanted."""
    smaller = wheel.with_suffix(".unfinished")
    with zipfile.ZipFile(wheel) as given:
        libraries = {name: kind[1] for name in given.namelist() if (kind := _LIBRARY.search(name))}
        if f"cuda{cuda}" not in libraries.values():
            raise SystemExit(f"error: --cuda is {cuda}; {wheel.name} has libraries for {sorted(libraries.values())}")
        dropped = {name for name, kind in libraries.items() if kind not in ("cpu", f"cuda{cuda}")}
        with zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as kept:
            for entry in given.infolist():
                if entry.filename not in dropped:
                    text = given.read(entry)
                    if entry.filename.endswith(".dist-info/RECORD"):
                        lines = text.decode().splitlines(keepends=True)
                        text = "".join(line for line in lines if line.split(",")[0] not in dropped).encode()
                    kept.writestr(entry, text)
    smaller.replace(wheel)


def provide(wheels: Path, site: Path) -> str | None:
    """Install what is missing here out of a folder of wheels, for this process and its children; what is wrong, if so.

    What is installed already is left alone, in whatever version.
    """
    absent = {name for name, version in machine.versions(machine.NEEDED + machine.OPTIONAL).items() if version is None}
    usable = [wheel for wheel in sorted(wheels.glob("*.whl")) if _distribution(wheel) in absent]
    if usable:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        done = subprocess.run([*command, "--target", str(site), *map(str, usable)], capture_output=True, text=True)
        if done.returncode:
            return f"the wheels in {wheels} cannot be installed: {' '.join(done.stderr.split())[:500]}"
        os.environ["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
        sys.path.insert(0, str(site))
        importlib.invalidate_caches()
    missing = [name for name, version in machine.versions(machine.NEEDED).items() if version is None]
    if not missing:
        return None
    return (
        f"{', '.join(missing)} not installed: run `make setup`, or without network put wheels into {wheels}: run `make "
        "gpu-wheels` on a machine with network, for this one's version of Python, and copy the folder here"
    )


def _distribution(wheel: Path) -> str:
    """The name of a wheel's package as in `machine.NEEDED`."""
    return re.sub(r"[-_.]+", "-", wheel.name.partition("-")[0]).lower()


def facts_of_machine() -> dict[str, Any]:
    """See `machine.facts`; from a process of its own, so that this one never loads torch."""
    benchmarks = str(machine.ROOT / "benchmarks")
    known = os.pathsep.join(filter(None, [benchmarks, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "gpu.machine"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": known})
    if done.returncode:
        raise SystemExit(f"error: torch cannot be loaded here: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Download, and tell the size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="version of the other machine's Python")
    parser.add_argument("--cuda", default="130", help="version of CUDA of its torch, as 126, 128, 130")
    parser.add_argument("--out", type=Path, default=machine.ROOT / ".wheels")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        size = download(options.python, options.cuda, Path(made))
        options.out.mkdir(parents=True, exist_ok=True)
        for old in options.out.glob("*.whl"):
            old.unlink()
        for wheel in Path(made).glob("*.whl"):
            (options.out / wheel.name).write_bytes(wheel.read_bytes())
    print(f"{len(CARRIED)} wheels, {size / 2**20:.1f} MiB, in {options.out}")


if __name__ == "__main__":
    main()
