"""Runs everything that needs a GPU, in parts: one JSON file and one page of results.

    make gpu                                   (or python benchmarks/gpu)
    python benchmarks/gpu --only kernel step   parts by name, see --help
    python benchmarks/gpu --dry_run            every part's CPU form, to try out the script itself

Parts run in order of priority, each in a process of its own with a time limit; one that fails, crashes or hangs does
not stop the others. Parts that the results already have, by the same code and on the same machine, are not run again.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu import machine, page, process, wheels
from gpu.part import DONE

_LAST_LINES = 40
#: A part is not begun with less than this: libraries alone take so long to load.
_LEAST_SECONDS = 20.0


@dataclass(frozen=True)
class Part:
    """One part: a module whose `run` yields measurements.

    Args:
        name: on the command line.
        title: on the page.
        seconds: that it may take on a GPU.
        environment: that its process gets beyond the runner's own.
        dry: the same for a dry run.
        other_module: where it is, if not in `gpu.NAME`.
    """

    name: str
    title: str
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    dry: dict[str, str] = field(default_factory=dict)
    other_module: str = ""

    @property
    def module(self) -> str:
        """That has its `run`."""
        return self.other_module or f"gpu.{self.name}"


#: cuBLAS computes alike from run to run only with a fixed workspace, chosen before it starts.
_REPEATABLE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
#: In order of priority.
PARTS = (
    Part("kernel", "Triton row kernel against float64", 180, dry={"TRITON_INTERPRET": "1"}),
    Part("attention", "Attention: packed documents and documents alone", 90),
    Part("precision", "Half and mixed precision", 120),
    Part("compilation", "Compiled layers", 120),
    Part("fsdp2", "Sharding on one rank", 60),
    Part("qlora", "A base model in 4 bits", 90),
    Part("sharded_checkpoint", "A sharded, asynchronous checkpoint", 90, _REPEATABLE),
    Part("deterministic_resume", "Resuming with deterministic kernels", 120, _REPEATABLE),
    Part("memory", "Memory: planned and measured", 120),
    Part("head_speed", "Speed of the loss head", 180),
    Part("step_speed", "Speed of an optimizer step", 180),
)
#: On one core of a CPU, with shapes that need seconds.
_DRY_SECONDS = 240.0


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Of the command line."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=machine.ROOT / "benchmarks" / "results", help="folder of results")
    parser.add_argument("--minutes", type=float, default=14.0, help="for all parts together")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--from_scratch", action="store_true", help="run parts again that the results already have")
    parser.add_argument("--dry_run", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument(
        "--wheels", type=Path, default=machine.ROOT / ".wheels", help="folder of packages that may be missing here"
    )
    return parser.parse_args(arguments)


class Runner:
    """Runs parts and keeps the results.

    Args:
        options: of the command line.
        parts: all that there are, in order.
        facts: of the machine.
    """

    def __init__(self, options: argparse.Namespace, parts: Sequence[Part], facts: dict[str, Any]) -> None:
        self.options, self.parts = options, parts
        self.name = "gpu_dry_run" if options.dry_run else "gpu"
        self.log = options.out / f"{self.name}.log"
        self.results = {"dry_run": options.dry_run, "machine": facts, "repository": machine.repository()}
        self.results |= {"code": machine.code(), "parts": {}}
        self.deadline = time.monotonic() + 60 * options.minutes
        options.out.mkdir(parents=True, exist_ok=True)
        self._take_earlier()

    def _take_earlier(self) -> None:
        """Keep what an earlier run has found by the same code on the same machine, and drop everything else."""
        path = self.options.out / f"{self.name}.json"
        if self.options.from_scratch or not path.exists():
            return
        try:
            earlier = json.loads(path.read_text())
            same = all(earlier[key] == self.results[key] for key in ("dry_run", "machine", "code"))
            if same:
                self.results["parts"] = earlier["parts"]
        except (json.JSONDecodeError, KeyError, TypeError):
            print(f"{path} is not one of ours and will be replaced", flush=True)

    def run(self) -> bool:
        """Run what is to be run; whether nothing has failed."""
        found = self.results["parts"]
        for part in self.parts:
            if part.name not in self.options.only:
                continue
            if found.get(part.name, {}).get("finished"):
                print(f"{part.name}: {found[part.name]['verdict']} in an earlier run", flush=True)
                continue
            result = self._part(part)
            if result["verdict"] != "not run" or part.name not in found:  # what an earlier run has of it is kept
                found[part.name] = result
            page.write(self.options.out, self.name, self.results, self.parts)
            print(f"{part.name}: {result['verdict']} {result['reason']} ({result['seconds']:.0f} s)", flush=True)
            if result["verdict"] == "interrupted":
                raise KeyboardInterrupt
        page.write(self.options.out, self.name, self.results, self.parts)
        return all(found[name]["verdict"] in ("passed", "skipped") for name in self.options.only)

    def _part(self, part: Part) -> dict[str, Any]:
        """The result of one part."""
        left = self.deadline - time.monotonic()
        limit = min(_DRY_SECONDS if self.options.dry_run else part.seconds, left)
        began, clock = time.time(), time.monotonic()
        if left < min(_LEAST_SECONDS, part.seconds):
            return _result("not run", "no time left of --minutes", [], began, 0.0)
        with tempfile.TemporaryDirectory(prefix="dft-gpu-", ignore_cleanup_errors=True) as made:
            folder, lines = Path(made) / "work", Path(made) / "measurements.jsonl"
            folder.mkdir()
            command = [sys.executable, "-m", "gpu.part", part.module, str(lines), str(folder)]
            command += ["--dry_run"] * self.options.dry_run
            start = self._mark(part, limit)
            verdict, reason = self._end_of(command, limit, self._environment(part, folder))
            measured, done = _read(lines)
        finished = done and not verdict
        verdict = verdict or (_verdict_of(measured) if done else "failed")
        last = _last_lines(self.log, start)
        return _result(verdict, reason, measured, began, time.monotonic() - clock, finished, last)

    def _end_of(self, command: Sequence[str], limit: float, environment: dict[str, str]) -> tuple[str, str]:
        """How a part's process has ended: a verdict and its reason, or nothing where it came to its end."""
        try:
            exit_code = process.run(command, limit, self.log, environment)
        except process.TimedOutError:
            return "timed out", f"killed after {limit:.0f} s"
        except KeyboardInterrupt:
            return "interrupted", "by Ctrl-C or SIGTERM"
        return ("failed", f"its process ended with {exit_code}") if exit_code else ("", "")

    def _mark(self, part: Part, limit: float) -> int:
        """A heading in the log; where the part's own output begins."""
        with self.log.open("ab") as log:
            log.write(f"\n===== {part.name}, at most {limit:.0f} s =====\n".encode())
            return log.tell()

    def _environment(self, part: Part, folder: Path) -> dict[str, str]:
        root = machine.ROOT
        places = [root, root / "benchmarks", root / "tests", root / "tests" / "logprob"]
        known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        found = {"PYTHONPATH": os.pathsep.join([*map(str, places), *filter(None, known)]), "PYTHONUNBUFFERED": "1"}
        found |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DFT_CACHE": str(folder / "cache")}
        found |= part.environment | {process.MARK: str(os.getpid())}
        if self.options.dry_run:
            found |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | part.dry
        return os.environ | found


def _read(lines: Path) -> tuple[list[dict[str, Any]], bool]:
    """The measurements of a part, and whether it came to its end; a last line may have been cut off by a kill."""
    found = []
    for line in lines.read_text().splitlines() if lines.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return [one for one in found if DONE not in one], any(DONE in one for one in found)


def _verdict_of(measured: list[dict[str, Any]]) -> str:
    verdicts = {one["verdict"] for one in measured}
    if "failed" in verdicts or not verdicts:
        return "failed"
    return "skipped" if verdicts == {"skipped"} else "passed"


def _result(
    verdict: str,
    reason: str,
    measured: list[dict[str, Any]],
    began: float,
    seconds: float,
    finished: bool = False,
    last_lines: Sequence[str] = (),
) -> dict[str, Any]:
    """What the JSON file has of a part. Only a finished one is not run again."""
    if verdict == "skipped":
        reason = measured[0]["note"]
    return {
        "verdict": verdict,
        "reason": reason,
        "finished": finished,
        "began": began,
        "seconds": round(seconds, 1),
        "measurements": measured,
        "last_lines": list(last_lines),
    }


def _last_lines(log: Path, start: int) -> list[str]:
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace").splitlines()[-_LAST_LINES:]


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM as Ctrl-C, so that children are killed and results are kept."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where everything has passed or was skipped, 1 where something has not, 130 after Ctrl-C."""
    options = options_of(arguments)
    with _terminated_as_interrupted(), tempfile.TemporaryDirectory(prefix="dft-gpu-site-") as site:
        if problem := wheels.provide(options.wheels, Path(site)):
            print(f"error: {problem}", file=sys.stderr)
            return 2
        facts = wheels.facts_of_machine()
        if facts["gpu"] is None and not options.dry_run:
            print("error: torch sees no GPU here; --dry_run tries out the parts on the CPU", file=sys.stderr)
            return 2
        runner = Runner(options, PARTS, facts)
        try:
            passed = runner.run()
        except KeyboardInterrupt:
            print(f"interrupted; what is there is in {options.out}", file=sys.stderr)
            return 130
    print(f"results: {options.out / runner.name}.md", flush=True)
    return 0 if passed else 1
