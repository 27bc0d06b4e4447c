"""Every test that docs/honoured-or-refused.md names is there."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "honoured-or-refused.md"


def names_in(path):
    """Names of the test functions and classes of a file: `name`, `Class` and `Class::name`."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}::{each.name}" for each in node.body if isinstance(each, ast.FunctionDef))


EVERY = {str(path.relative_to(TESTS)): {*names_in(path)} for path in TESTS.rglob("test_*.py")}


def is_there(named):
    """A file, or a test in it; without a file, a test of any file (that of the row above)."""
    file, _, test = re.sub(r"\[.*\]$", "", named).removeprefix("tests/").rpartition(".py")
    if not file:
        ends = test.removeprefix("::")
        return any(name == ends or name.endswith(f"::{ends}") for names in EVERY.values() for name in names)
    names = EVERY.get(f"{file}.py")
    return names is not None and (not test or test.removeprefix("::") in names)


def rows():
    """The first cell of each row, and the tests of its last one."""
    for line in PAGE.read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| Item"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            yield cells[0], re.findall(r"`([^`]+)`", cells[-1])


@pytest.mark.parametrize("named", sorted({named for _, tests in rows() for named in tests}))
def test_a_test_that_is_named_is_there(named):
    assert is_there(named), named


@pytest.mark.parametrize("named", ["tests/test_no.py", "tests/test_cli.py::test_no", "test_no", "TestNo::test_no"])
def test_others_are_not(named):
    assert not is_there(named)
