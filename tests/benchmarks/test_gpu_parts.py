"""`make gpu` itself: its parts, a dry run of one, and the packages for machines without network."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from gpu import machine, page, runner, wheels

ROOT = Path(__file__).resolve().parents[2]


def test_every_part_is_a_module_that_says_what_it_measures():
    assert len(runner.PARTS) == 11
    for part in runner.PARTS:
        assert len(page._about(part)) > 100
        assert "\ndef run(setting: Setting)" in (ROOT / "benchmarks" / "gpu" / f"{part.name}.py").read_text()
    assert sum(part.seconds for part in runner.PARTS[:9]) / 60 < 17, "what has to pass fits the time of one run"


@pytest.mark.slow
def test_a_dry_run_of_a_real_part(tmp_path):
    """The kernel's, in Triton's interpreter; from another folder, as `make gpu` may be called."""
    pytest.importorskip("triton")
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu"),
        "--dry_run",
        "--only",
        "kernel",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_dry_run.json").read_text())["parts"]["kernel"]
    assert found["verdict"] == "passed"
    assert len(found["measurements"]) > 30
    assert max(one["value"] for one in found["measurements"]) > 0


@pytest.mark.slow
def test_without_a_gpu_it_says_so(tmp_path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: torch sees no GPU here; --dry_run tries out the parts on the CPU"


class TestWheels:
    def test_what_is_missing_is_named_with_what_to_do(self, tmp_path, monkeypatch):
        monkeypatch.setattr(machine, "NEEDED", (*machine.NEEDED, "no-such-package"))
        problem = wheels.provide(tmp_path, tmp_path)
        assert problem.startswith("no-such-package not installed: run `make setup`")
        assert "make gpu-wheels" in problem

    @pytest.mark.slow
    def test_what_is_missing_is_installed_without_network(self, tmp_path, monkeypatch):
        monkeypatch.setattr(machine, "NEEDED", (*machine.NEEDED, "no-such-package"))
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setenv("PYTHONPATH", "before")
        own = "no_such_package-1.0.dist-info"
        with zipfile.ZipFile(tmp_path / "no_such_package-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("no_such_package.py", "")
            wheel.writestr(f"{own}/METADATA", "Metadata-Version: 2.1\nName: no-such-package\nVersion: 1.0\n")
            wheel.writestr(f"{own}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{own}/RECORD", f"no_such_package.py,,\n{own}/METADATA,,\n{own}/WHEEL,,\n{own}/RECORD,,\n")
        (tmp_path / "numpy-0.1-py3-none-any.whl").write_text("not even a wheel, but numpy is here")
        assert wheels.provide(tmp_path, tmp_path / "site") is None
        assert (tmp_path / "site" / "no_such_package.py").exists()
        assert os.environ["PYTHONPATH"] == f"{tmp_path / 'site'}{os.pathsep}before"

    def test_one_library_of_many_is_kept(self, tmp_path):
        path = tmp_path / "bitsandbytes-1.0-py3-none-any.whl"
        names = [f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cpu", "cuda126", "cuda130", "rocm70")]
        with zipfile.ZipFile(path, "w") as wheel:
            for name in [*names, "bitsandbytes/__init__.py"]:
                wheel.writestr(name, name)
            wheel.writestr("b.dist-info/RECORD", "".join(f"{name},sha,1\n" for name in names))
        with pytest.raises(SystemExit, match=r"--cuda is 999; .* has libraries for \['cpu', 'cuda126', 'cuda130'"):
            wheels.keep_one_library(path, "999")
        wheels.keep_one_library(path, "130")
        with zipfile.ZipFile(path) as wheel:
            kept = [names[0], names[2]]
            assert wheel.namelist() == [*kept, "bitsandbytes/__init__.py", "b.dist-info/RECORD"]
            assert wheel.read("b.dist-info/RECORD").decode() == "".join(f"{name},sha,1\n" for name in kept)
