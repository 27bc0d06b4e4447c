"""Draws mutants of the numerical core with a fixed seed, and runs the tests that mirror each mutated file.

    python tests/mutants.py [--count 600 --seed 0 --jobs 2 --out benchmarks/results/mutants.jsonl]

A mutant is one small change of one expression or statement: a comparison, an operator, a constant, a condition, a
dropped call. A mutant that no test notices (a survivor) is behaviour that is not tested, or a change that changes
nothing. Those of the second kind are listed with their reason in `tests/equivalent_mutants.json`, and do not count.

Interrupted, the same command resumes. Exits with 1 if there are survivors without a reason.
"""

import argparse
import ast
import contextlib
import copy
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = "dft_lightning"
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.json")

STEP = ["test_step_weights", "test_module", "test_nonfinite", "test_metrics"]
#: Which files are mutated, and the tests that mirror them.
MIRROR: dict[str, list[str]] = {
    "weighting/*.py": ["tests/weighting"],
    "logprob/*.py": ["tests/logprob", "tests/test_models.py"],
    "normalizer.py": [f"tests/{name}.py" for name in STEP],
    "step.py": [f"tests/{name}.py" for name in STEP],
    "data/batch.py": ["tests/data/test_batch.py", "tests/data/test_weights.py", "tests/test_attention.py"],
    "data/steps.py": ["tests/data/test_steps.py", "tests/data/test_datamodule.py"],
    "data/packing.py": ["tests/data/test_packing.py", "tests/data/test_steps.py"],
}
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
CALLS = {"min": "max", "max": "min", "sum": "mean", "mean": "sum", "exp": "expm1", "all": "any", "any": "all"}


@dataclass(frozen=True)
class Mutant:
    """A piece of a file (byte offsets), and what stands in its place."""

    file: str
    line: int
    start: int
    end: int
    old: str
    new: str
    source: str
    """The line, without indentation: with `old` and `new` what identifies a mutant in the list of equivalents."""

    @property
    def key(self) -> str:
        return f"{self.file} | {self.source} | {self.old} → {self.new}"


def _changed(node: ast.AST, **fields: object) -> ast.AST:
    made = copy.copy(node)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def _constants(node: ast.Constant) -> Iterator[ast.AST]:
    value = node.value
    if isinstance(value, bool):
        yield _changed(node, value=not value)
    elif isinstance(value, int):
        yield _changed(node, value=value + 1)
    elif isinstance(value, float):
        yield _changed(node, value=value * 2 if value else 1.0)


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in place of an expression."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            yield _changed(node, ops=[SWAPS[type(op)]()])
        case ast.BinOp(op=op, left=left) if type(op) in SWAPS and not isinstance(left, ast.Constant | ast.JoinedStr):
            yield _changed(node, op=SWAPS[type(op)]())
        case ast.BinOp(op=op, left=ast.Constant(value=int() | float())) if type(op) in SWAPS:
            yield _changed(node, op=SWAPS[type(op)]())
        case ast.BoolOp(op=op, values=[first, *_]):
            yield _changed(node, op=SWAPS[type(op)]())
            yield first
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            yield operand
        case ast.Constant():
            yield from _constants(node)
        case ast.Call(func=ast.Attribute(value=value, attr="detach"), args=[]):
            yield value
        case ast.Call(func=ast.Attribute(attr=name) as func) if name in CALLS:
            yield _changed(node, func=_changed(func, attr=CALLS[name]))
        case ast.Call(func=ast.Name(id=name) as func) if name in CALLS:
            yield _changed(node, func=_changed(func, id=CALLS[name]))
        case ast.IfExp(body=body, orelse=orelse):
            yield from (body, orelse)


def _skipped(node: ast.AST) -> bool:
    """Annotations are not looked into, nor messages of errors, nor assertions."""
    return isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _skipped(child):
                yield child
                yield from _walk(child)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _replacements(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Nodes, and the source of what may stand in their place."""
    for node in _walk(tree):
        if isinstance(node, ast.expr):
            yield from ((node, f"({ast.unparse(each)})") for each in variants(node))
        if isinstance(node, ast.If) and not _is_type_checking(node):
            yield from ((node.test, text) for text in ("True", "False"))
        if (isinstance(node, ast.Expr) and not _is_docstring(node)) or isinstance(node, ast.AugAssign):
            yield node, "pass"


def _is_type_checking(node: ast.If) -> bool:
    return "TYPE_CHECKING" in ast.unparse(node.test)


def mutants_of(path: Path, name: str) -> list[Mutant]:
    """All mutants of a file, in its order."""
    raw = path.read_bytes()
    lines = raw.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    found = []
    for node, new in _replacements(ast.parse(raw)):
        start, end = (
            starts[row - 1] + column
            for row, column in ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
        )
        source = lines[node.lineno - 1].decode().strip()
        found.append(Mutant(name, node.lineno, start, end, raw[start:end].decode(), new, source))
    return list(dict.fromkeys(found))


def draw(count: int, seed: int, words: list[str]) -> list[Mutant]:
    """`count` mutants of all, in an order that the seed gives; a word chooses files that have it in their name."""
    package = REPOSITORY / PACKAGE
    paths = sorted({path for pattern in MIRROR for path in package.glob(pattern) if path.name != "__init__.py"})
    every = [mutant for path in paths for mutant in mutants_of(path, path.relative_to(package).as_posix())]
    drawn = random.Random(seed).sample(every, min(count, len(every)))
    return [mutant for mutant in drawn if all(word in mutant.file for word in words)]


def tests_of(file: str) -> list[str]:
    """The mirrored tests; those of the same name as the file come first."""
    tests = next(tests for pattern, tests in MIRROR.items() if Path(file).match(pattern))
    own = REPOSITORY / "tests" / Path(file).parent / f"test_{Path(file).name}"
    first = [own.relative_to(REPOSITORY).as_posix()] if own.exists() else []
    return list(dict.fromkeys(first + tests))


def preload() -> None:
    """Import what is slow to import, once, for all processes that are forked from this one."""
    import datasets  # noqa: F401
    import torch
    import transformers

    for name in ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM", "PreTrainedTokenizerFast"):
        getattr(transformers, name)
    torch.set_num_threads(1)


def run_tests(folder: Path, tests: list[str], limit: float) -> tuple[str, float, str]:
    """killed, survived or timeout, seconds, and the last line of pytest, in a process forked from this one."""
    begun, log = time.monotonic(), folder / "log"
    pid = os.fork()
    if pid == 0:
        _in_child(folder, tests, log)
    while time.monotonic() - begun < limit:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
            return ("survived" if code == 0 else "killed"), time.monotonic() - begun, last
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "timeout", limit, ""


def _in_child(folder: Path, tests: list[str], log: Path) -> None:
    code = 70
    try:
        os.setsid()
        out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(folder)
        sys.dont_write_bytecode = True
        os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        sys.path.insert(0, str(folder))
        import pytest

        quick = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not exhaustive", "--hypothesis-seed=0"]
        code = int(pytest.main([*quick, *tests]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def copy_of_the_tree(parent: Path) -> Path:
    """A copy that a mutant may change; data next to the repository are next to it too."""
    folder = parent / "repository"
    shutil.copytree(REPOSITORY, folder, ignore=shutil.ignore_patterns("__pycache__", ".*", "runs", "*.egg-info"))
    shared = REPOSITORY.parent / "shared"
    if shared.exists():
        (parent / "shared").symlink_to(shared.resolve())
    return folder


def judge(mutant: Mutant, folder: Path, limit: float) -> dict[str, object]:
    """What became of a mutant; the copy is as before afterwards."""
    path = folder / PACKAGE / mutant.file
    raw = path.read_bytes()
    path.write_bytes(raw[: mutant.start] + mutant.new.encode() + raw[mutant.end :])
    try:
        compile(path.read_bytes(), str(path), "exec")
        result, seconds, last = run_tests(folder, tests_of(mutant.file), limit)
    except SyntaxError as error:
        result, seconds, last = "invalid", 0.0, str(error)
    finally:
        path.write_bytes(raw)
    return {"result": result, "seconds": round(seconds, 1), "last": last[-200:], **asdict(mutant)}


def baseline(folder: Path, mutants: list[Mutant]) -> float:
    """Seconds of the slowest mirrored tests without a mutant, which have to pass."""
    slowest = 0.0
    for tests in sorted({tuple(tests_of(mutant.file)) for mutant in mutants}, key=len):
        result, seconds, last = run_tests(folder, list(tests), 3600)
        if result != "survived":
            sys.exit(f"the tests fail without a mutant: {' '.join(tests)}: {last}")
        slowest = max(slowest, seconds)
    return slowest


def known(out: Path) -> dict[str, dict[str, object]]:
    """Results of an earlier, interrupted call, by place and text; a torn last line is left out."""
    found = {}
    for line in out.read_text().splitlines() if out.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            found[f"{row['file']}:{row['start']}:{row['source']}:{row['new']}"] = row
    return found


def _identity(mutant: Mutant) -> str:
    return f"{mutant.file}:{mutant.start}:{mutant.source}:{mutant.new}"


def report(rows: list[dict[str, object]]) -> int:
    """Print the score and the survivors; how many have no reason."""
    reasons: dict[str, str] = json.loads(EQUIVALENT.read_text()) if EQUIVALENT.exists() else {}
    valid = [row for row in rows if row["result"] != "invalid"]
    survivors = [row for row in valid if row["result"] == "survived"]
    keys = [f"{row['file']} | {row['source']} | {row['old']} → {row['new']}" for row in survivors]
    open_ones = [(row, key) for row, key in zip(survivors, keys, strict=True) if key not in reasons]
    counts = Counter(str(row["result"]) for row in valid)
    killed, equivalent = counts["killed"] + counts["timeout"], len(survivors) - len(open_ones)
    for row, key in open_ones:
        print(f"survived: line {row['line']}: {key}")
    judged = max(len(valid) - equivalent, 1)
    print(
        f"{len(valid)} mutants: {killed} killed ({counts['timeout']} by the time limit), {equivalent} equivalent, "
        f"{len(open_ones)} survivors: score {killed / judged:.1%}"
    )
    return len(open_ones)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only files whose names have all of these words")
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/mutants.jsonl"), help="results, one line per mutant")
    given = parser.parse_args(args)
    mutants = draw(given.count, given.seed, given.words)
    before = known(given.out)
    to_do = [mutant for mutant in mutants if _identity(mutant) not in before]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    preload()
    with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor(given.jobs) as pool, given.out.open("a") as out:
        copies: Queue[Path] = Queue()
        for job in range(given.jobs):
            copies.put(copy_of_the_tree(Path(made) / str(job)))
        first = copies.get()
        limit = 60 + 10 * (baseline(first, to_do) if to_do else 0.0)
        copies.put(first)

        def run(mutant: Mutant) -> dict[str, object]:
            folder = copies.get()
            try:
                return judge(mutant, folder, limit)
            finally:
                copies.put(folder)

        for number, row in enumerate(pool.map(run, to_do), 1):
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
            before[f"{row['file']}:{row['start']}:{row['source']}:{row['new']}"] = row
            print(f"{number}/{len(to_do)} {row['result']:<8} {row['file']}:{row['line']}", file=sys.stderr, flush=True)
    return 1 if report([before[_identity(mutant)] for mutant in mutants]) else 0


if __name__ == "__main__":
    sys.exit(main())
