"""tqdm's bars in a terminal; lines in a log file, after a while and now and then."""

import io

import pytest
from lightning.pytorch.utilities import rank_zero_only
from tqdm.auto import tqdm

from dft_lightning import progress_lines
from dft_lightning.progress_lines import line, use_lines


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def lines():
    use_lines()
    use_lines()  # once is enough


def shown(file, count=3, **options):
    for _ in tqdm(range(count), desc="Tokenizing", file=file, mininterval=0, **options):
        pass
    return file.getvalue()


def test_short_work_shows_nothing_in_a_file():
    assert shown(io.StringIO()) == ""


def test_long_work_shows_lines(monkeypatch):
    monkeypatch.setattr(progress_lines, "EVERY_S", 0.0)
    text = shown(io.StringIO(), unit=" examples")
    assert "\r" not in text
    every = text.splitlines()
    assert len(every) >= 2
    assert every[-1].startswith("Tokenizing: 3 of 3 examples (100%), ")
    assert all(each.startswith("Tokenizing: ") for each in every)
    assert shown(io.StringIO(), leave=False).splitlines()[-1].startswith("Tokenizing: 3 of 3 (100%)")


def test_lines_are_apart(monkeypatch):
    """300 rounds of 0.1 s: a line after 10 s and 20 s, and one at the end."""
    clock = [1000.0]
    monkeypatch.setattr(progress_lines.time, "time", lambda: clock[0])
    file = io.StringIO()
    bar = tqdm(total=300, desc="Reference", file=file, mininterval=0, miniters=1)
    bar.start_t = bar.last_print_t = clock[0]
    for _ in range(300):
        clock[0] += 0.0999
        bar.update()
        bar.refresh()
    bar.close()
    done = [text.split(" of ")[0] for text in file.getvalue().splitlines()]
    assert done == ["Reference: 101", "Reference: 202", "Reference: 300"]


def test_a_terminal_has_a_bar():
    text = shown(Terminal())
    assert "\rTokenizing" in text
    assert "100%" in text


@pytest.mark.parametrize("file", [io.StringIO, Terminal])
def test_one_rank_shows_them(file, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    monkeypatch.setattr(progress_lines, "EVERY_S", 0.0)
    assert shown(file()) == ""


def test_disabled_bars_stay_so(monkeypatch):
    monkeypatch.setattr(progress_lines, "EVERY_S", 0.0)
    assert shown(io.StringIO(), disable=True) == ""


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (
            {"n": 1200, "total": 40000, "elapsed": 6.0, "rate": 200.0, "prefix": "Tokenizing: ", "unit": " examples"},
            "Tokenizing: 1,200 of 40,000 examples (3%), 200 per second, 3.2 min left",
        ),
        (
            {"n": 5, "total": None, "elapsed": 10.0, "rate": 2, "prefix": "", "unit": "it"},
            "Progress: 5, 2 per second",
        ),
        ({"n": 0, "total": 8, "elapsed": 0.0, "rate": None, "prefix": "Loading", "unit": "it"}, "Loading: 0 of 8 (0%)"),
    ],
)
def test_a_line(state, text):
    """38,800 examples at 200 per second take 194 s."""
    assert line(state) == text
