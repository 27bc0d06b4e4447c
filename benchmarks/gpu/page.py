"""The results as JSON and as a Markdown page."""

import importlib.util
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_DRY = """**A dry run: no GPU was used, and no figure here is one of a GPU.** Every part ran in its CPU form (Triton in
its interpreter, gloo in place of NCCL, tiny models and shapes) to try out the measuring itself."""
_INTRO = """Written by `make gpu`. Each part ran in a process of its own with a time limit, in this order. A number with
a bound passes or fails; one without is reported only."""


def write(folder: Path, name: str, results: dict[str, Any], parts: Sequence[Any]) -> None:
    """`NAME.json` and `NAME.md`; each is replaced at once, so that a kill leaves the former or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / f"{name}.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    _replace(folder / f"{name}.md", page(results, parts))


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def page(results: dict[str, Any], parts: Sequence[Any]) -> str:
    """The page: the machine, a line a part, and each part's measurements."""
    found = results["parts"]
    title = "# GPU checks: a dry run on the CPU" if results["dry_run"] else "# GPU checks"
    lines = [title, "", *([_DRY, ""] if results["dry_run"] else []), _INTRO, "", *_machine(results), ""]
    lines += ["| part | verdict | measurements | time |", "|---|---|---|---|"]
    lines += [_summary(part, found.get(part.name)) for part in parts]
    for part in parts:
        if part.name in found:
            lines += ["", *_section(part, found[part.name])]
    return "\n".join(lines) + "\n"


def _machine(results: dict[str, Any]) -> list[str]:
    machine, repository = results["machine"], results["repository"]
    gpu = "none used" if results["dry_run"] or not machine["gpu"] else (
        f"{machine['gpu']}, {machine['gpu_memory_gib']} GiB, compute capability {machine['compute_capability']}, "
        f"driver {machine['driver']}, CUDA {machine['cuda']}"
    )  # fmt: skip
    commit = repository["commit"] or "not known"
    state = " with changes that are not committed" if repository["dirty"] else ""
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return [
        f"- GPU: {gpu}",
        f"- Python {machine['python']}, {machine['system']}",
        f"- {packages}",
        f"- commit {commit}{state}; code {results['code']}",
    ]


def _summary(part: Any, result: dict[str, Any] | None) -> str:
    if result is None:
        return f"| {part.title} | not run | | |"
    counts = dict.fromkeys(("passed", "failed", "skipped", "reported"), 0)
    for one in result["measurements"]:
        counts[one["verdict"]] += 1
    shown = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return f"| {part.title} | {_verdict(result)} | {shown} | {result['seconds']:.0f} s |"


def _verdict(result: dict[str, Any]) -> str:
    return result["verdict"] + (f": {_cell(result['reason'])}" if result["reason"] else "")


def _section(part: Any, result: dict[str, Any]) -> list[str]:
    ran = time.strftime("%Y-%m-%d", time.gmtime(result["began"]))
    lines = [f"## {part.title}", "", _about(part), "", f"{_verdict(result)} ({ran}, {result['seconds']:.0f} s)"]
    if result["measurements"]:
        lines += ["", "| measured | value | bound | verdict | |", "|---|---|---|---|---|"]
        lines += [_row(one) for one in result["measurements"]]
    if result["verdict"] in ("failed", "timed out", "interrupted") and result["last_lines"]:
        lines += ["", "The end of its output:", "", *(f"    {line}" for line in result["last_lines"][-15:])]
    return lines


def _about(part: Any) -> str:
    """The docstring of the part's module, which says what is measured and where the bounds come from."""
    module = importlib.util.find_spec(part.module)
    assert module is not None
    assert module.origin is not None
    text = Path(module.origin).read_text()
    return text.split('"""')[1].strip()


def _row(one: dict[str, Any]) -> str:
    unit = f" {one['unit']}" if one["unit"] else ""
    value = "" if one["value"] is None else f"{_number(one['value'])}{unit}"
    sign = {"<=": "≤", ">=": "≥"}[one["relation"]]
    bound = "" if one["bound"] is None else f"{sign} {_number(one['bound'])}{unit}"
    return f"| {_cell(one['what'])} | {value} | {bound} | {one['verdict']} | {_cell(one['note'])} |"


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:,.3g}"


def _cell(text: str) -> str:
    """Without what would end a cell."""
    return " ".join(text.replace("|", "\\|").split())
