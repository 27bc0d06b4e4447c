"""Draws mutants of the numerical core with a fixed seed, and runs the tests that mirror each mutated file.

    python tests/mutants.py [--count 600 --seed 0 --out runs/mutants.jsonl --again]

A mutant is one small change of one expression or statement: a comparison, an operator, a constant, a condition, a
dropped call. Of the mirrored quick tests those run that execute the changed statement, quick ones first, until one
fails. A mutant that no test notices (a survivor) is behaviour that is not tested, or a change that changes nothing.
Those of the second kind are listed with their reason in `tests/equivalent_mutants.json`, and do not count.

Interrupted, the same command resumes. Exits with 1 if there are survivors without a reason.
"""

import argparse
import contextlib
import json
import random
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TypeAlias

from mutant_runs import PACKAGE, REPOSITORY, Coverage, Outcome, copy_of_the_tree, preload
from mutant_sources import Mutant, mutants_of

EQUIVALENT = Path(__file__).with_name("equivalent_mutants.json")
Row: TypeAlias = dict[str, object]

STEP = [
    f"tests/{name}.py"
    for name in ("test_step", "test_normalizer", "test_step_weights", "test_module", "test_nonfinite")
]
STEP += ["tests/test_metrics.py"]
#: Which files are mutated, and the tests that mirror them.
MIRROR: dict[str, list[str]] = {
    "weighting/*.py": ["tests/weighting/", "tests/logprob/test_targets.py", "tests/test_errors.py"],
    "logprob/*.py": ["tests/logprob/", "tests/test_models.py"],
    "normalizer.py": STEP,
    "step.py": STEP,
    "data/batch.py": ["tests/data/test_batch.py", "tests/data/test_weights.py", "tests/test_attention.py"],
    "data/steps.py": ["tests/data/test_steps.py", "tests/data/test_datamodule.py"],
    "data/packing.py": ["tests/data/test_packing.py", "tests/data/test_steps.py"],
}
#: Files that Triton's interpreter runs in place of a GPU, and the tests of that.
INTERPRETED = {
    "logprob/kernel.py": "tests/logprob/test_kernel_cases.py",
    "logprob/kernel_triton.py": "tests/logprob/test_kernel_cases.py",
    "logprob/passes.py": "tests/logprob/test_weighted_nll.py",
    "logprob/rows.py": "tests/logprob/test_weighted_nll.py",
}


def draw(count: int, seed: int, words: list[str]) -> list[Mutant]:
    """`count` mutants of all, in an order that the seed gives; a word chooses files that have it in their name."""
    package = REPOSITORY / PACKAGE
    paths = sorted({path for pattern in MIRROR for path in package.glob(pattern) if path.name != "__init__.py"})
    every = [mutant for path in paths for mutant in mutants_of(path, path.relative_to(package).as_posix())]
    drawn = random.Random(seed).sample(every, min(count, len(every)))
    return [mutant for mutant in drawn if all(word in mutant.file for word in words)]


def mirrored(file: str) -> list[str]:
    """Prefixes of the names of the tests that mirror a file."""
    return next(tests for pattern, tests in MIRROR.items() if Path(file).match(pattern))


class Judge:
    """Runs the tests of one mutant after the other in a copy of the tree."""

    def __init__(self, parent: Path, files: set[str], kept: Path) -> None:
        self.folder = copy_of_the_tree(parent)
        tests = list(dict.fromkeys(test for file in sorted(files) for test in mirrored(file)))
        self.coverages = {False: Coverage(self.folder, tests, interpreted=False, kept=kept)} if files else {}
        interpreted = sorted({INTERPRETED[file] for file in files if file in INTERPRETED})
        if interpreted:
            self.coverages[True] = Coverage(self.folder, interpreted, interpreted=True, kept=kept)

    def __call__(self, mutant: Mutant) -> Row:
        """What became of a mutant; the copy is as before afterwards."""
        path = self.folder / PACKAGE / mutant.file
        raw = path.read_bytes()
        changed = raw[: mutant.start] + mutant.new.encode() + raw[mutant.end :]
        try:
            compile(changed, str(path), "exec")
            path.write_bytes(changed)
            number, outcome = self._test(mutant)
        except SyntaxError as error:
            number, outcome = 0, Outcome("invalid", 0.0, str(error))
        finally:
            path.write_bytes(raw)
        facts = {"result": outcome.result, "seconds": round(outcome.seconds, 1), "last": outcome.last[-200:]}
        return {**facts, "tests": number, **asdict(mutant)}

    def _test(self, mutant: Mutant) -> tuple[int, Outcome]:
        """How many tests were chosen, and what became of them; no test at all is a survivor, too."""
        total, seconds, outcome = 0, 0.0, Outcome("survived", 0.0, "no test executes the line")
        own = (Path("tests") / Path(mutant.file).parent / f"test_{Path(mutant.file).name}").as_posix()
        for interpreted, coverage in self.coverages.items():
            tests = [INTERPRETED.get(mutant.file, "-")] if interpreted else mirrored(mutant.file)
            names = coverage.ordered(coverage.of(mutant.file, mutant.first, mutant.last, tests), own)
            if names and outcome.result == "survived":
                outcome = coverage.run(names)
                total, seconds = total + len(names), seconds + outcome.seconds
        if outcome.result == "error":
            sys.exit(f"the tests of {mutant.key} did not run: {(self.folder / 'log').read_text()[-3000:]}")
        return total, Outcome(outcome.result, seconds, outcome.last)


def known(out: Path) -> dict[str, Row]:
    """Results of earlier calls, by place and text; the last one counts, and a torn line is left out."""
    found = {}
    for line in out.read_text().splitlines() if out.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            found[_identity(row)] = row
    return found


def _identity(row: Row) -> str:
    return f"{row['file']}:{row['start']}:{row['source']}:{row['new']}"


def _key(row: Row) -> str:
    return f"{row['file']} | {row['source']} | {row['old']} → {row['new']}"


def report(rows: list[Row]) -> int:
    """Print the score and the survivors; how many have no reason."""
    reasons: dict[str, str] = json.loads(EQUIVALENT.read_text()) if EQUIVALENT.exists() else {}
    valid = [row for row in rows if row["result"] != "invalid"]
    survivors = [row for row in valid if row["result"] == "survived"]
    left = [row for row in survivors if _key(row) not in reasons]
    for row in left:
        print(f"survived {row['tests']} tests: line {row['line']}: {_key(row)}")
    counts = Counter(str(row["result"]) for row in valid)
    killed, equivalent = counts["killed"] + counts["timeout"], len(survivors) - len(left)
    score = (killed + equivalent) / max(len(valid), 1)
    print(
        f"{len(valid)} mutants: {killed} killed ({counts['timeout']} by the time limit), {equivalent} equivalent, "
        f"{len(left)} survivors: {score:.1%} killed or equivalent"
    )
    return len(left)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only files whose names have all of these words")
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/mutants.jsonl"), help="results, one line per mutant")
    parser.add_argument("--again", action="store_true", help="run the survivors of an earlier call again, too")
    parser.add_argument("--report", action="store_true", help="only report what was run by earlier calls")
    given = parser.parse_args(args)
    given.out = given.out.resolve()  # processes that run tests have another working folder
    mutants, rows = draw(given.count, given.seed, given.words), known(given.out)
    if not given.report:
        done = {name for name, row in rows.items() if not (given.again and row["result"] == "survived")}
        _run([mutant for mutant in mutants if _identity(asdict(mutant)) not in done], given.out, rows)
    drawn = [_identity(asdict(mutant)) for mutant in mutants]
    return 1 if report([rows[name] for name in drawn if name in rows]) else 0


def _run(mutants: list[Mutant], out: Path, rows: dict[str, Row]) -> None:
    """Judge mutants, and write each result at once."""
    out.parent.mkdir(parents=True, exist_ok=True)
    preload()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as made, out.open("a") as lines:
        judge = Judge(Path(made), {mutant.file for mutant in mutants}, out.with_suffix(""))
        for number, mutant in enumerate(mutants, 1):
            row = rows[_identity(asdict(mutant))] = judge(mutant)
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            lines.flush()
            took = f"{row['seconds']} s, {row['tests']} tests"
            print(f"{number}/{len(mutants)} {row['result']:<8} {mutant.key} ({took})", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
