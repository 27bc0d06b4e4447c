"""Every family of language models: it works, or is refused by name; and the table in the documentation says so."""

from pathlib import Path

import families
import pytest
from tiny_families import FAMILIES, UnknownFamilyError

PAGE = Path(__file__).parents[1] / "docs" / "model-families.md"
#: Llama's kind is everywhere else; these differ in how decoder, layers, attention, experts and adapters are found.
COVERING = {"deepseek_v3", "falcon_h1", "gemma3n_text", "gpt2", "gpt_oss", "llama4_text"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [name if name in COVERING else pytest.param(name, marks=pytest.mark.exhaustive) for name in FAMILIES]
)
def test_what_the_table_says_is_so(family, tmp_path):
    try:
        row = families.examine(family, tmp_path)
    except UnknownFamilyError as unknown:
        pytest.skip(str(unknown))
    assert not row.faults()
    page = PAGE.read_text()
    if families.versions() in page:
        assert families.line(row) in page.splitlines()


def test_the_table_has_every_family():
    lines = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert lines == ["family", *FAMILIES]
