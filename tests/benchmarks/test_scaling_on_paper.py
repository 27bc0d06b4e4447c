"""The tables of docs/scaling.md are what the code says, of the models that they name."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import scaling_on_paper as paper

from dft_lightning.planning.memory import GIB
from dft_lightning.planning.scaling import MASTERS, Mesh


def cells(name, model):
    """A row of a table of the document."""
    document = paper.DOCUMENT.read_text()
    table = document.split(f"<!-- {name} -->")[1].split("<!--")[0]
    (row,) = (line for line in table.splitlines() if line.startswith((f"| {model}:", f"| {model} |")))
    return [cell.strip() for cell in row.strip("| ").split("|")]


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("1.5B", 1_543_714_304),
        ("7B", 7_615_616_512),
        ("8B", 8_030_261_248),
        ("32B", 32_763_876_352),
        ("70B", 70_553_706_496),
        ("405B", 405_853_388_800),
    ],
)
def test_the_models_are_those_that_are_published(name, numbers):
    """The sizes of the safetensors on the hub, in numbers."""
    assert paper.subject(name).weights.total == numbers


def figures(text):
    """The text with # for each number, and the numbers."""
    number = r"\d[\d,]*(?:\.\d+)?"
    return re.sub(number, "#", text), [float(one.replace(",", "")) for one in re.findall(number, text)]


def test_the_document_has_the_tables_of_the_code():
    """Within 3 %: another version of torch or transformers may keep a tensor more or less for the backward pass."""
    document = paper.DOCUMENT.read_text()
    (words, numbers), (made, computed) = figures(document), figures(paper.renewed(document))
    assert words == made
    assert numbers == pytest.approx(computed, rel=0.03, abs=0.1)


def test_a_row_by_hand():
    """8.03e9 numbers of 16 bytes over eight devices, beside what is whole; and what they gather and sum."""
    need = paper.need("8B", 8, MASTERS)
    assert need.states == pytest.approx(8_030_261_248 * 16 / 8, rel=1e-3)
    shown = cells("memory, float32 masters", "8B")
    assert float(shown[3].strip("*")) == pytest.approx(need.total / GIB, abs=0.06)
    around = 2 * 128256 * 4096
    moved = 7 / 8 * (8 * (8_030_261_248 - around) + 6 * around)
    assert float(cells("traffic", "8B")[1].split("/")[0]) == pytest.approx(moved / 1e9, rel=2e-3)


def test_bold_is_what_fits():
    for name in paper.MODELS:
        for cell in cells("memory, float32 masters", name)[2:]:
            assert cell.startswith("**") == (float(cell.strip("*").replace(",", "")) <= 139)


def test_the_paper_step_is_what_utilisation_says():
    """256 rows of 2,048 tokens on one device: 6 FLOPs a number and token, and the pairs that attend."""
    numbers = 1_543_714_304
    pairs = 12 * 12 * 128 * 28 * 2048 * 2049 / 2
    seconds = 256 * (6 * numbers * 2048 + pairs) / (0.4 * 989.4e12)
    found = paper.timed("1.5B", Mesh(1), 256)
    assert found.total == pytest.approx(seconds, rel=2e-3)  # one token in 2,048 is not supervised
    assert paper.timed("405B", Mesh(8), 32) is None


def test_a_document_without_its_marks_is_refused():
    with pytest.raises(SystemExit, match="expected the marks <!-- memory, float32 masters -->"):
        paper.renewed("no tables here")
