"""`dft inspect` through the real command: what it shows is what the loss sees."""

import re

import pytest
from conftest import sums, write_jsonl
from looking import options, train_rows, truth

from dft_lightning import initial_model
from dft_lightning.__main__ import main
from dft_lightning.insight.ansi import render
from dft_lightning.insight.view import Document, Line, Score, Shown

COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def inspect(tmp_path, model, rows, *args, **data):
    page = tmp_path / "out" / "inspect.html"
    status = main(["inspect", *options(model, rows, **data), "--output", str(page), *map(str, args)])
    return status, page


def spans(page):
    """(classes, attributes, text) of each token of the page."""
    return re.findall(r"<span(?: class=\"([^\"]*)\")?((?: [a-z]+=\"[^\"]*\")*)>([^<]*)</span>", page.read_text())


def tokens_of(page):
    return [one for one in spans(page) if "title=" in one[1]]


def test_exactly_the_answer_is_marked(tmp_path, model_dir, rows_file, capsys):
    status, page = inspect(tmp_path, model_dir, rows_file, "--rows", 0, 5, max_length=200)
    said = capsys.readouterr().out
    assert status == 0
    assert "\x1b" not in said  # no terminal
    rows = sums(26)
    assert re.findall("⟦(.*?)⟧", said)[1:] == [f"{rows[number]['solution']}<|im_end|>■" for number in (0, 5)]
    module = train_rows(model_dir, rows_file, max_length=200)
    learnt = [one for one in tokens_of(page) if one[0].startswith("s")]
    assert len(learnt) == sum(module.train_rows.targets[[0, 5]])
    assert sum("stop" in one[0] for one in learnt) == 2
    shown = "".join(text for _, _, text in tokens_of(page))
    assert shown.count(rows[5]["problem"]) == 1


def test_the_numbers_are_the_models_own(tmp_path, model_dir, rows_file):
    floor = "{class_path: DFT, init_args: {floor: 0.01}}"
    _, page = inspect(tmp_path, model_dir, rows_file, "--rows", 3, 1, "--weighting", floor)
    exact = truth(model_dir, train_rows(model_dir, rows_file).train_rows.select([3, 1])).tokens
    found = re.findall(r"p ([\d.e-]+)&#10;weight ([\d.e-]+)&#10;entropy ([\d.]+) nats&#10;rank (\d+)", page.read_text())
    assert len(found) == len(exact)
    for number, (p, weight, entropy, _) in enumerate(found):
        assert float(p) == pytest.approx(float(exact.p[number]), rel=2e-3)  # written with four digits
        assert float(weight) == pytest.approx(max(float(exact.p[number]), 0.01), rel=2e-3)
        assert float(entropy) == pytest.approx(float(exact.entropy[number]), abs=1e-3)


def test_without_a_model_nothing_is_loaded(tmp_path, model_dir, rows_file, capsys, monkeypatch):
    def refuse(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(initial_model, "load_model", refuse)
    status, page = inspect(tmp_path, model_dir, rows_file, "--no_model", "--first", 2)
    assert status == 0
    assert capsys.readouterr().out.count("───") == 2
    assert "entropy" not in "".join(attributes for _, attributes, _ in spans(page))
    assert 'id="by-mask" checked' in page.read_text()
    assert 'id="by-p"' not in page.read_text()


@pytest.mark.parametrize("packing", ["true", "padding_free"])
def test_a_packed_row_shows_its_borders_and_the_same_numbers(tmp_path, model_dir, rows_file, capsys, packing):
    alone, together = tmp_path / "alone", tmp_path / "together"
    inspect(alone, model_dir, rows_file, "--rows", 2, 7, 4)
    capsys.readouterr()
    eager = ("--model.attn_implementation", "eager")
    inspect(together, model_dir, rows_file, "--rows", 2, 7, 4, *eager, packing=packing, pack_length=180)
    said = capsys.readouterr().out
    assert "row 0 of the batch: 3 documents" in said
    assert ("positions of padding" in said) == (packing == "true")
    assert [int(row) for row in re.findall(r"document \d of 3: training row (\d+)", said)] != []
    one, other = ((folder / "out" / "inspect.html") for folder in (alone, together))
    numbers = [sorted(re.findall(r"p ([\d.e-]+)&#10;weight", page.read_text())) for page in (one, other)]
    assert len(numbers[0]) == len(numbers[1]) > 20
    for first, second in zip(*numbers, strict=True):
        assert float(first) == pytest.approx(float(second), rel=2e-3)
    assert other.read_text().count('<div class="document">') == 3
    assert other.read_text().count('<article class="packed">') == 1


def test_without_rows_a_packed_row_of_the_first_step_is_shown(tmp_path, model_dir, rows_file, capsys):
    inspect(tmp_path, model_dir, rows_file, "--no_model", packing="true", pack_length=120)
    shown = [int(row) for row in re.findall(r"training row (\d+)", capsys.readouterr().out)]
    module = train_rows(model_dir, rows_file, packing=True, pack_length=120, global_batch_size=8)
    assert shown == module.sampler().rows(0, 0)[0]
    assert len(shown) > 1


def test_colours_on_demand_and_by_what_is_asked(tmp_path, model_dir, rows_file, capsys):
    inspect(tmp_path, model_dir, rows_file, "--rows", 0)
    plain = capsys.readouterr().out
    coloured = {}
    for by in ("p", "weight", "mask"):
        inspect(tmp_path, model_dir, rows_file, "--rows", 0, "--color", "always", "--by", by)
        coloured[by] = capsys.readouterr().out
        assert plain.splitlines()[-3:-1] == COLOUR.sub("", coloured[by]).splitlines()[-3:-1]
    assert len(set(coloured.values())) == 3


def document(*tokens):
    return [Line([Document(0, 0, "", list(tokens))], 0)]


def test_the_colour_follows_the_value():
    tokens = [Shown(number, str(number), True, False, Score(p, 2 * p, 1.0, 0)) for number, p in enumerate((0.01, 0.99))]
    for by in ("p", "weight"):
        shades = re.findall(r"48;5;(\d+)m\x1b\[38;5;16m[01]\x1b", render(document(*tokens), by, colour=True))
        assert shades == ["203", "119"]


def test_a_row_cannot_write_into_terminal_or_page(tmp_path, model_dir, capsys):
    hostile = '<script>alert(1)</script>\x1b[2J\u202e "quoted" & done'
    row = {"source": hostile, "problem": hostile, "solution": hostile + " so"}
    rows = write_jsonl(tmp_path / "rows.jsonl", [row])
    status, page = inspect(tmp_path, model_dir, rows, "--rows", 0, "--color", "always", max_length=250)
    assert status == 0
    said, text = capsys.readouterr().out, page.read_text()
    assert "\x1b[2J" not in said
    assert "\\x1b[2J" in COLOUR.sub("", said)
    assert "\u202e" not in said + text
    assert "<script" not in text
    assert "\x1b" not in text
    assert "&lt;" in text


def test_line_breaks_are_seen_and_kept():
    tokens = [Shown(1, "a\n\n", True, False), Shown(2, "b", True, True)]
    assert render(document(*tokens), "mask", colour=False).splitlines()[-3:] == ["⟦a↵", "↵", "b■⟧"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--rows", "0", "26"], "--rows has 26; there are 26 training rows, from 0 on"),
        (["--rows", "-1"], "--rows has -1"),
        (["--weighting", "Nonsense"], "--weighting 'Nonsense' is none of ASFT, "),
        (["--data.path", "nowhere.jsonl"], "'nowhere.jsonl' matches no files"),
        (["--first", "0"], "--first is 0; expected 1 or more"),
        (["--no_model", "--by", "p"], "--by p needs the model"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_leaves_nothing(tmp_path, model_dir, rows_file, capsys, args, message):
    status = main(["inspect", *options(model_dir, rows_file), "--run_dir", str(tmp_path / "run"), *args])
    said = capsys.readouterr().err
    assert status == 2
    assert message in [line for line in said.splitlines() if line.startswith("dft: error: ")][-1]
    assert not (tmp_path / "run").exists()
