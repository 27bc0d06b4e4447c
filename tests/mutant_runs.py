"""Runs tests on a copy of the tree, in processes that are forked from one that has imported what is slow to import."""

import contextlib
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = "dft_lightning"
INTERPRETER = "TRITON_INTERPRET"
QUICK = ["-q", "-p", "no:cacheprovider", "-m", "not slow and not exhaustive", "--hypothesis-seed=0"]
#: As in `tests/logprob/test_kernel.py`: the interpreter cuts bits off bfloat16 where a GPU rounds.
NOT_INTERPRETED = ["-k", "not lose_no_more and not RealShape"]
#: Imported once, for all processes that are forked from this one; nothing of ours.
HEAVY = [
    "datasets", "hypothesis", "jsonargparse", "lightning.pytorch.cli", "matplotlib.figure", "pyarrow.parquet", "pytest",
    "torch", "torchmetrics", "transformers",
]  # fmt: skip
#: Bytes of memory that a mutant may ask for: one that makes a number of rows huge fails instead of the machine.
MEMORY = 12 * 1024**3


@dataclass(frozen=True)
class Outcome:
    """What became of the tests: survived, killed, timeout or an error of the run itself; and pytest's last line."""

    result: str
    seconds: float
    last: str


def preload() -> None:
    """Import what is slow to import; Triton and the hub's client, which some of it imports, read switches then."""
    os.environ |= {INTERPRETER: "1", "HF_HUB_OFFLINE": "1"}
    for name in HEAVY:
        importlib.import_module(name)
    import torch
    import transformers

    for name in ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM", "PreTrainedTokenizerFast"):
        getattr(transformers, name)
    torch.set_num_threads(1)


def copy_of_the_tree(parent: Path) -> Path:
    """A copy that a mutant may change, without compiled files; data next to the repository is next to it too."""
    folder = parent / "repository"
    shutil.copytree(REPOSITORY, folder, ignore=shutil.ignore_patterns("__pycache__", ".*", "runs", "*.egg-info"))
    shared = REPOSITORY.parent / "shared"
    if shared.exists():
        (parent / "shared").symlink_to(shared.resolve())
    return folder


def _digest(folder: Path, tests: Sequence[str]) -> str:
    """Of the tests, and of all Python files."""
    content = hashlib.sha256(repr(sorted(tests)).encode())
    for path in sorted(folder.rglob("*.py")):
        content.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return content.hexdigest()[:16]


class Chosen:
    """A plugin of pytest: of the collected tests those chosen, in their order; where no names are given, all."""

    def __init__(self, names: Sequence[str]) -> None:
        self.order = {name: place for place, name in enumerate(names)}
        self.seconds: dict[str, float] = {}

    def pytest_collection_modifyitems(self, items: list) -> None:
        if self.order:
            items[:] = sorted((item for item in items if item.nodeid in self.order), key=self._place)

    def _place(self, item: object) -> int:
        return self.order[item.nodeid]  # type: ignore[attr-defined]

    def pytest_runtest_logreport(self, report: object) -> None:
        name = report.nodeid  # type: ignore[attr-defined]
        self.seconds[name] = self.seconds.get(name, 0.0) + report.duration  # type: ignore[attr-defined]


def in_fork(log: Path, limit: float, work: Callable[[], int]) -> Outcome:
    """Run a function in a forked process with a group of its own, which ends with it; 0 is survived, 5 is an error."""
    begun = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _in_child(log, work)
    status = None
    try:
        while status is None and time.monotonic() - begun < limit:
            done, found = os.waitpid(pid, os.WNOHANG)
            status = found if done else None
            time.sleep(0 if done else 0.02)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1] if log.exists() else ""
    if status is None:
        os.waitpid(pid, 0)
        return Outcome("timeout", limit, last)
    code = os.waitstatus_to_exitcode(status)
    return Outcome({0: "survived", 5: "error"}.get(code, "killed"), time.monotonic() - begun, last)


def _in_child(log: Path, work: Callable[[], int]) -> None:
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = work()
    finally:
        sys.stdout.flush()
        os._exit(code)


def run_pytest(folder: Path, options: Sequence[str], plugin: Chosen, interpreted: bool) -> int:
    """pytest's exit code in a copy of the tree; 5, as if nothing had run, where the copy is not what was imported."""
    os.chdir(folder)
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    if not interpreted:
        os.environ.pop(INTERPRETER)
    sys.path.insert(0, str(folder))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    import pytest

    shutil.rmtree(folder / ".hypothesis", ignore_errors=True)  # examples that killed another mutant
    options = [*options, *(NOT_INTERPRETED if interpreted else [])]
    code = int(pytest.main([*QUICK, f"--basetemp={folder.parent / 'temporary'}", *options], plugins=[plugin]))
    foreign = [name for name, each in sys.modules.items() if name.split(".")[0] == PACKAGE and _elsewhere(each, folder)]
    return 5 if foreign else code


def _elsewhere(module: object, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and not Path(file).is_relative_to(folder)


class Coverage:
    """Which tests execute a line, and how long each test takes: found by one run without a mutant, which has to pass.

    Args:
        tests: files or folders of tests.
        interpreted: whether Triton's interpreter is switched on, which takes the place of a GPU.
        kept: where to keep what is found, for later calls with the same tests and package.
    """

    def __init__(self, folder: Path, tests: Sequence[str], interpreted: bool, kept: Path) -> None:
        self.folder, self.interpreted = folder, interpreted
        kept = kept / _digest(folder, tests)
        kept.mkdir(parents=True, exist_ok=True)
        self._data, self._times = kept / f"lines{interpreted:d}", kept / f"times{interpreted:d}.json"
        if not self._times.exists():
            outcome = in_fork(folder / "log", 3600, lambda: self._measure(tests))
            if outcome.result != "survived":
                self._times.unlink(missing_ok=True)
                sys.exit(f"tests fail without a mutant: {' '.join(tests)}: {(folder / 'log').read_text()[-3000:]}")
        self.seconds: dict[str, float] = json.loads(self._times.read_text())

    def _measure(self, tests: Sequence[str]) -> int:
        os.environ["COVERAGE_FILE"] = str(self._data)
        plugin = Chosen([])
        options = [f"--cov={PACKAGE}", "--cov-context=test", "--cov-report=", *tests]
        code = run_pytest(self.folder, options, plugin, self.interpreted)
        self._times.write_text(json.dumps(plugin.seconds))
        return code

    @cached_property
    def _found(self):  # coverage.CoverageData
        import coverage

        data = coverage.CoverageData(str(self._data))
        data.read()
        return data

    def of(self, file: str, first: int, last: int, mirrored: Sequence[str]) -> list[str]:
        """Mirrored tests that execute one of a file's lines; all, if a line runs at import too.

        What a fixture executes may be noticed by any test of that file.
        """
        measured = (each for each in self._found.measured_files() if each.endswith(f"/{PACKAGE}/{file}"))
        lines = self._found.contexts_by_lineno(next(measured, ""))
        contexts = {context for line in range(first, last + 1) for context in lines.get(line, [])}
        mine = [name for name in self.seconds if name.startswith(tuple(mirrored))]
        if "" in contexts:
            return mine
        files = {context.partition("::")[0] for context in contexts if context.endswith("|setup")}
        names = {context.rpartition("|")[0] for context in contexts}
        return [name for name in mine if name in names or name.partition("::")[0] in files]

    def ordered(self, names: Sequence[str], first: str) -> list[str]:
        """Quick tests first, file by file; those of the file that mirrors the mutated one before all others."""
        totals: dict[str, float] = {}
        for name in names:
            file = name.partition("::")[0]
            totals[file] = totals.get(file, 0.0) + self.seconds[name]

        def key(name: str) -> tuple[bool, float, str, float]:
            file = name.partition("::")[0]
            return file != first, totals[file], file, self.seconds[name]

        return sorted(names, key=key)

    def run(self, names: Sequence[str]) -> Outcome:
        """Run tests until one fails, within ten times the seconds that they take without a mutant, and a minute."""
        files = list(dict.fromkeys(name.partition("::")[0] for name in names))
        limit = 60 + 10 * sum(self.seconds[name] for name in names)
        options = ["-x", *files]
        plugin = Chosen(names)
        return in_fork(self.folder / "log", limit, lambda: run_pytest(self.folder, options, plugin, self.interpreted))
