"""What a part measures, and the process that runs one.

python -m gpu.part MODULE MEASUREMENTS FOLDER [--dry_run]      (started by the runner)
"""

import argparse
import importlib
import json
import math
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

#: The last line of a part that has come to its end.
DONE = "done"


class SkippedError(Exception):
    """A part, or one of its checks, cannot run here; the message says why."""


@dataclass(frozen=True)
class Measurement:
    """A number, and what it has to be.

    Args:
        what: is measured.
        value: None where nothing could be measured.
        bound: that the value has to meet; None for a number that is only reported.
        relation: of the value to the bound.
        unit: of both.
        note: where the bound comes from; or why this was skipped, or the error.
        status: "measured", or else what happened in place of a measurement.
    """

    what: str
    value: float | None = None
    bound: float | None = None
    relation: Literal["<=", ">="] = "<="
    unit: str = ""
    note: str = ""
    status: Literal["measured", "skipped", "error"] = "measured"

    @property
    def verdict(self) -> str:
        """passed, failed, skipped, or reported where there is no bound."""
        if self.status != "measured":
            return "skipped" if self.status == "skipped" else "failed"
        if self.value is None or self.bound is None:
            return "reported" if self.value is not None and math.isfinite(self.value) else "failed"
        met = self.value <= self.bound if self.relation == "<=" else self.value >= self.bound
        return "passed" if met else "failed"  # a NaN meets no bound

    def as_json(self) -> dict[str, Any]:
        """Its fields and verdict, of which JSON knows no infinite ones: these become words."""
        fields = asdict(self) | {"verdict": self.verdict}
        return {name: str(value) if _is_infinite(value) else value for name, value in fields.items()}


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


@dataclass(frozen=True)
class Setting:
    """Where a part runs.

    Args:
        folder: for its files; removed afterwards.
        dry: on the CPU, with tiny shapes, to try out the part itself.
    """

    folder: Path
    dry: bool = False

    @property
    def device(self) -> str:
        """Of the tensors."""
        return "cpu" if self.dry else "cuda"

    @property
    def accelerator(self) -> str:
        """As `trainer.accelerator`."""
        return "cpu" if self.dry else "gpu"


def attempt(what: str, check: Callable[..., Iterable[Measurement]], *arguments: Any) -> Iterator[Measurement]:
    """The measurements of one check of a part; an exception in it is its result, and does not end the part."""
    try:
        yield from check(*arguments)
    except SkippedError as reason:
        yield Measurement(what, note=str(reason), status="skipped")
    except Exception as error:
        traceback.print_exc()
        message = " ".join(f"{type(error).__name__}: {error}".split())
        yield Measurement(what, note=message[:300], status="error")


def run(module: str, file: Path, setting: Setting) -> None:
    """Write each measurement of a part as a line of JSON, as soon as it is there."""
    with file.open("w") as lines:

        def write(entry: dict[str, Any]) -> None:
            lines.write(json.dumps(entry, allow_nan=False) + "\n")
            lines.flush()

        part = importlib.import_module(module)
        for measurement in attempt(module, part.run, setting):
            print(f"[{measurement.verdict}] {measurement.what}: {measurement.value} {measurement.note}", flush=True)
            write(measurement.as_json())
        write({DONE: True})


def main() -> None:
    """One part in this process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry_run", action="store_true")
    options = parser.parse_args()
    run(options.module, options.file, Setting(options.folder, options.dry_run))


if __name__ == "__main__":
    from gpu import part

    part.main()  # not this module's own: parts import their classes from `gpu.part`
