"""What the measurements were taken on, and by what code.

python -m gpu.machine      (prints the facts as JSON, in a process of its own, which may fail)
"""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: Whose versions matter. The first are imported by every part.
NEEDED = ("torch", "lightning", "transformers", "accelerate", "jsonargparse", "docstring-parser", "typeshed-client",
          "datasets", "dill", "multiprocess", "xxhash", "torchmetrics", "tensorboard", "matplotlib", "pyarrow", "rich",
          "peft", "safetensors", "tokenizers", "numpy")  # fmt: skip
OPTIONAL = ("triton", "bitsandbytes", "flash-attn", "liger-kernel", "cut-cross-entropy")
#: The code that the results depend on.
_CODE = ("dft_lightning/**/*.py", "dft_lightning/**/*.jinja", "benchmarks/**/*.py", "tests/harness.py",
         "tests/logprob/kernel_truth.py")  # fmt: skip


def versions(names: Iterable[str]) -> dict[str, str | None]:
    """Of installed packages; None for those that are not there."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def facts() -> dict[str, Any]:
    """GPU, driver, versions and the state of the repository."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform()}
    found["packages"] = {name: version for name, version in versions(NEEDED + OPTIONAL).items() if version}
    found["cuda"] = torch.version.cuda
    found["gpu"] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = torch.cuda.get_device_name(0)
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["driver"] = _driver()
    return found


def _driver() -> str | None:
    lines = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).splitlines()
    return lines[0].strip() if lines else None


def repository() -> dict[str, Any]:
    """The commit, where git knows one, and whether files differ from it."""
    git = ["git", "-C", str(ROOT)]
    commit = _output([*git, "rev-parse", "HEAD"]).strip()
    return {
        "commit": commit or None,
        "dirty": bool(_output([*git, "status", "--porcelain"]).strip()) if commit else None,
    }


def _output(command: list[str]) -> str:
    """What a command prints; nothing where there is no such command, or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def code() -> str:
    """A fingerprint of the code that the results depend on."""
    digest = hashlib.sha256()
    for pattern in _CODE:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    print(json.dumps(facts()))
