"""The list of the weightings is what is in the package, and the README has it as it is."""

import inspect
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

import dft_lightning.weighting as package
from dft_lightning.weighting import DFT, Source, TokenWeighting
from dft_lightning.weighting.catalogue import Entry, cost, entries, markdown, url, weightings_in
from dft_lightning.weighting.spec import from_spec, to_spec

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- weightings:begin -->", "<!-- weightings:end -->"
GROUPS = [
    "Functions of p",
    "Of the whole distribution",
    "Against a reference or an earlier policy",
    "Of whole responses",
]
PUBLISHED = [entry for entry in entries() if entry.group in GROUPS]


def by_name():
    return {entry.name: entry for entry in entries()}


def test_the_readme_has_the_tables_that_the_code_makes():
    """If this is red: put the output of `dft weightings --markdown` between the marks."""
    between = README.read_text().split(BEGIN)[1].split(END)[0]
    assert between.strip() == markdown(entries()).strip()


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_each_says_what_it_is(entry):
    assert entry.formula
    assert "\n" not in entry.formula
    assert inspect.getdoc(entry.cls)
    assert getattr(package, entry.name) is entry.cls, "and can be imported from the package"
    if entry.source is not None:
        assert entry.source.link in inspect.getdoc(entry.cls), "the docstring cites it, too"
        assert url(entry.source.link)
    every = [field.name for field in fields(entry.cls)]
    if every:
        assert "Args:" in inspect.getdoc(entry.cls)
        assert all(f"    {name}: " in inspect.getdoc(entry.cls) for name in every), "each field is explained"


@pytest.mark.parametrize(
    ("link", "address"),
    [
        ("2508.05629", "https://arxiv.org/abs/2508.05629"),
        ("0704.0001", "https://arxiv.org/abs/0704.0001"),
        ("owner/some.repo-1", "https://github.com/owner/some.repo-1"),
        ("2508.056291", None),
        ("a book", None),
        ("owner/repo/file", None),
    ],
)
def test_a_link_is_an_arxiv_number_or_a_repository(link, address):
    assert url(link) == address


def test_each_published_one_has_its_source():
    assert [entry.name for entry in PUBLISHED if entry.source is None] == ["Uniform"]


def test_what_is_known_from_others_only_says_so():
    third = {entry.name for entry in entries() if entry.source is not None and entry.source.third}
    assert third == {"TALR", "InfoSFT", "Rho1", "CADFT"}
    assert all("implementation" in inspect.getdoc(by_name()[name].cls) for name in third)


def test_the_groups_in_their_order():
    assert list(dict.fromkeys(entry.group for entry in entries()))[:4] == GROUPS
    assert by_name()["TALR"].group == "Functions of p"


def test_facts_of_some():
    listed = by_name()
    assert listed["DFT"].signature == "DFT(floor=0.0)"
    assert listed["Thresholded"].signature == 'Thresholded(threshold, on="p", keep="top")'
    assert listed["ImportanceWeighted"].scope == "sequence"  # a property, read from the defaults
    assert listed["Rho1"].divisor == "tokens with w ≠ 0"
    assert listed["DFT"].cost == "one pass"
    assert listed["EAFT"].cost == "one pass; topk_entropy of the logits in the same pass"
    assert listed["Rho1"].cost == "one more forward a step; one forward of the reference over the data, once, cached"
    assert "frozen copy" in cost("token", {"ref_distribution"})


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry.name)
def test_defaults_survive_a_checkpoint(entry):
    weighting = entry.cls(0.3) if entry.name == "Thresholded" else entry.cls()
    assert from_spec(to_spec(weighting)) == weighting


@dataclass(frozen=True)
class Mine(TokenWeighting):
    """What it is in one line.

    And more.
    """

    needed: float

    def weights(self, tokens):
        return tokens.p

    @property
    def scope(self):
        return "sequence" if self.needed else "token"

    @property
    def divisor(self):
        return "weights" if self.needed else "tokens"


class Bare(TokenWeighting):
    def weights(self, tokens):
        return tokens.p


def test_what_there_is_to_say_of_one_of_your_own():
    """It says nothing itself, and what its fields decide is not known without them."""
    entry = Entry(Mine, "yours")
    assert (entry.name, entry.formula, entry.source) == ("Mine", "What it is in one line.", None)
    assert (entry.signature, entry.scope, entry.divisor) == ("Mine(needed)", None, "as what it wraps")
    assert (entry.needs, entry.cost) == (frozenset(), "as what it wraps")
    assert Entry(type("Silent", (Mine,), {"__doc__": None}), "yours").source is None
    cells = [cell.strip() for cell in markdown([entry]).splitlines()[-1].split("|")[1:-1]]
    wrapped = "as wrapped; step around another divisor"
    assert cells == ["`Mine(needed)`", "What it is in one line.", "–", wrapped, "–", "as what it wraps"]


def test_only_what_a_run_can_use_is_listed():
    names = {"Mine": Mine, "_Hidden": DFT, "Bare": Bare, "TokenWeighting": TokenWeighting, "number": 3, "text": str}
    assert weightings_in(names) == [Mine]


@pytest.mark.parametrize(
    ("scope", "needs", "parts"),
    [
        ("token", set(), ["one pass"]),
        ("sequence", set(), ["one pass of the loss, two for very long responses"]),
        ("step", set(), ["one more forward a step"]),
        ("token", {"position", "reward"}, ["one pass"]),
        ("token", {"rank", "entropy"}, ["one pass", "entropy, rank of the logits in the same pass"]),
        ("token", {"ref_logp"}, ["one pass", "one forward of the reference over the data, once, cached"]),
        ("token", {"old_logp"}, ["one pass", "one more forward a step"]),
        (
            "token",
            {"ref_distribution"},
            ["one pass", "a frozen copy of the model, or its adapter off: one more forward a step"],
        ),
    ],
)
def test_the_cost_of_each_need(scope, needs, parts):
    assert cost(scope, needs) == "; ".join(parts)


def test_a_source_known_from_others_is_cited_as_such():
    cited = [type("Cited", (Mine,), {"source": Source("A et al.", "T", "2508.05629", third=third)}) for third in (0, 1)]
    rows = [markdown([Entry(each, "yours")]).splitlines()[-1] for each in cited]
    assert "A et al., [2508.05629](https://arxiv.org/abs/2508.05629) |" in rows[0]
    assert "(https://arxiv.org/abs/2508.05629) (known from others' code) |" in rows[1]
