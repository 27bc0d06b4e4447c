"""What a run stands on, kept with each of its starts: versions, state of the working directory, data and hardware."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from dft_lightning.disk import writing
from dft_lightning.planning.automatic import capacity_of

FILE = "environment.json"
_DRIVER = Path("/proc/driver/nvidia/version")
_PACKAGES = (
    "dft-lightning", "torch", "lightning", "transformers", "tokenizers", "safetensors", "accelerate", "peft",
    "bitsandbytes", "torchao", "datasets", "pyarrow", "numpy", "jsonargparse", "triton", "flash-attn",
)  # fmt: skip
#: Variables that decide how sums are taken, and over what: those of other names may be secrets.
_VARIABLES = ("OMP_", "MKL_", "KMP_", "NCCL_", "GLOO_", "CUDA_", "CUBLAS_", "PYTORCH_", "TORCH_", "PL_GLOBAL_SEED")


def versions() -> dict[str, str]:
    """Of Python, of the packages that compute, and of what they were built for; without those that are not there."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
        cudnn: Any = torch.backends.cudnn
        found["cudnn"] = str(cudnn.version())
    if _DRIVER.exists():
        found["driver"] = _DRIVER.read_text().splitlines()[0]
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, and what differs from it, of the repository that a folder is in; None where there is none."""
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=normal")
    if commit is None or changed is None:
        return None
    text = _git(folder, "diff", "HEAD") or ""
    differing = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest() if text else None
    files = changed.splitlines()[:100]
    return {"commit": commit.strip(), "dirty": bool(files), "changed": files, "diff_sha256": differing}


def source_state() -> dict[str, Any] | None:
    """The same of this package, where it runs from a working copy, whose version says little; else None."""
    here = Path(__file__)
    return git_state(here.parent) if _git(here.parent, "ls-files", "--error-unmatch", here.name) else None


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says; None where it is not installed, takes too long, or knows no repository or commit here."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, errors="replace", check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def hardware(device: torch.device) -> dict[str, Any]:
    """Of this process: its host, its device, and what it may use of the machine."""
    gpu = device.type == "cuda"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if gpu else f"{device.type} {platform.machine()}",
        "device_memory": capacity_of(device) if gpu else None,
        "cores": cores,
        "memory": capacity_of(torch.device("cpu")),
        "threads": torch.get_num_threads(),
    }


def arithmetic() -> dict[str, Any]:
    """What torch was told about how to compute, and the environment's variables about it."""
    named = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)}
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "variables": named,
    }


def start(ranks: list[dict[str, Any]], run: Mapping[str, Any]) -> dict[str, Any]:
    """All that is known of a start: `run`, and what this process stands on."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "directory": os.getcwd(),
        "versions": versions(),
        "git": git_state(Path.cwd()),
        "source": source_state(),
        "arithmetic": arithmetic(),
        **run,
        "ranks": ranks,
    }


def starts(run_dir: Path) -> list[dict[str, Any]]:
    """Those of a run so far; a file that is not ours is set aside, and said."""
    path = run_dir / FILE
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["starts"]
        if isinstance(found, list) and all(isinstance(each, dict) for each in found):
            return found
    except (ValueError, KeyError, TypeError):
        pass
    aside = path.with_name(f"{FILE}.unreadable")
    shutil.move(path, aside)
    rank_zero_warn(f"{path} has no list of starts: it is {aside.name} now, and a new one is begun")
    return []


def record(run_dir: Path, found: Mapping[str, Any]) -> None:
    """Add a start to the run's list; the file is whole at every moment."""
    text = json.dumps({"starts": [*starts(run_dir), found]}, indent=1, default=str)
    unfinished = run_dir / f".{FILE}.unfinished"
    with writing(run_dir / FILE, "--run_dir"):
        run_dir.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(f"{text}\n", encoding="utf-8")
        os.replace(unfinished, run_dir / FILE)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as at an earlier start, of what the bits of a result hang on."""
    pairs = [
        *_pairs(then.get("versions", {}), now["versions"]),
        *_pairs(then.get("arithmetic", {}), now["arithmetic"]),
        *(_of_git(where, name, then, now) for where in ("git", "source") for name in ("commit", "diff_sha256")),
        ("devices", _devices(then), _devices(now)),
    ]
    return [f"{name} {before} → {after}" for name, before, after in pairs if before != after]


def _of_git(where: str, name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any]:
    what = name if where == "git" else f"{name} of dft-lightning"
    before, after = ((found.get(where) or {}).get(name) for found in (then, now))
    return what, before, after


def _pairs(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, then.get(name), now.get(name)) for name in sorted({*then, *now})]


def _devices(found: Mapping[str, Any]) -> list[tuple[str, int]]:
    """How many there are of each kind."""
    names = [str(rank["device"]) for rank in found.get("ranks", [])]
    return sorted((name, names.count(name)) for name in set(names))
