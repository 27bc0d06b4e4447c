"""Messages: names from data cannot drive a terminal; wrong use from Python is one error that says what to pass."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import sums, write_jsonl

from dft_lightning import FineTuner
from dft_lightning.__main__ import main
from dft_lightning.errors import UserError, lines_of, printable
from dft_lightning.weighting import DFT, TokenWeighting

#: Clears the screen, sets the window's title, forges a line, turns the direction of writing, deletes, rings.
HOSTILE = [
    "\x1b[2J",
    "\x1b]0;owned\x07",
    "a\ndft: done",
    "a\rb",
    "\u202egnp.exe",
    "a\x08b",
    "\x9b2J",
    "\u2028",
    "[red]x[/red]",
]
OBEYED = {chr(code) for code in [*range(10), *range(11, 32), *range(127, 160), 0x202E, 0x2028]}


def obeyed(text: str, *, lines: bool = True) -> list[str]:
    return [sign for sign in text if sign in OBEYED or (not lines and sign == "\n")]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_message_holds_nothing_that_a_terminal_obeys(name):
    for text in (printable(name), str(UserError(f"no {name}")), UserError(f"no {name}").args[0]):
        assert not obeyed(text, lines=False)
    assert not obeyed(lines_of(f"one\ntwo {name}"))
    assert printable(printable(name)) == printable(name)


def test_letters_of_all_languages_stay():
    for text in ("données/été.jsonl", "数据", "→ “quoted” – 1×2", "C:\\new\\table"):
        assert printable(text) == text


@pytest.fixture
def dft(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ["--model.model_name", str(model_dir), "--model.weighting", "DFT", "--trainer.accelerator", "cpu"]
    base += ["--data", "ChatDataModule", "--data.max_length", "200", "--data.global_batch_size", "4"]
    base += ["--data.micro_batch_size", "4", "--export.enabled", "false"]
    return lambda command, *more: main([command, *base, *more])


def leaves_with_2(call) -> None:
    try:
        code = call()
    except SystemExit as leaving:
        code = leaving.code
    assert code == 2


#: Where a user-supplied name comes into a message; which words come before it.
PLACES = {
    "a file that is not there": ["--data.path", "{}.jsonl"],
    "a model": ["--data.path", "rows.jsonl", "--model.model_name", "/none/{}"],
    "a checkpoint": ["--data.path", "rows.jsonl", "--ckpt_path", "{}.ckpt"],
    "a column": ["--data.path", "rows.jsonl", "--data.messages", "{}"],
    "a run folder": ["--data.path", "rows.jsonl", "--run_dir", "taken{}"],
    "an option's value": ["--data.path", "rows.jsonl", "--trainer.max_steps", "{}"],
    "a weighting": ["--data.path", "rows.jsonl", "--model.weighting", "{}"],
    "a schedule": ["--data.path", "rows.jsonl", "--model.lr_schedule", "{}"],
    "a file with a damaged row": ["--data.path", "damaged{}.jsonl"],
}


@pytest.mark.parametrize("name", HOSTILE[:3])
@pytest.mark.parametrize("place", PLACES)
def test_hostile_names_in_errors(place, name, dft, capfd):
    write_jsonl(Path("rows.jsonl"), sums(8))
    Path(f"damaged{name}.jsonl").write_text("{")
    Path(f"taken{name}").mkdir()
    (Path(f"taken{name}") / name).touch()
    leaves_with_2(lambda: dft("fit", *(word.replace("{}", name) for word in PLACES[place])))
    out, err = capfd.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("dft: ")]
    assert line.startswith("dft: error: ")
    assert not obeyed(out + err.replace("\r", ""))


@pytest.mark.slow
def test_hostile_names_in_a_whole_run(model_dir, tmp_path):
    """In a file's and a folder's name and in columns: through tables, warnings and progress, in another process."""
    name = "\x1b[31m[red]\nforged"
    for row in (rows := sums(8)):
        row[f"column{name}"] = 1
        row["messages"][0][f"key{name}"] = 1
    write_jsonl(tmp_path / f"rows{name}.jsonl", rows)
    shared = ["--model.model_name", str(model_dir), "--model.weighting", "DFT", "--trainer.accelerator", "cpu"]
    shared += ["--data", "ChatDataModule", "--data.path", f"rows{name}.jsonl", "--data.max_length", "200"]
    shared += ["--data.global_batch_size", "4", "--data.micro_batch_size", "4", "--run_dir", f"run{name}"]
    out = f"out{name}"
    export = ["export", f"run{name}/checkpoints/last.ckpt", out]
    for words in (
        ["fit", *shared],
        ["fit", *shared],
        ["predict", *shared],
        ["plan", *shared],
        ["inspect", *shared],
        export,
    ):
        command = [sys.executable, "-m", "dft_lightning", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said = done.stdout + done.stderr
        assert not [line for line in said.splitlines() if line.startswith("forged")], said
        assert "\x1b[31m" not in said
        assert "[red]" in said or words[0] == "plan"


def test_messages_of_logs_and_warnings(capfd):
    """A line break is one where others wrote the message; our own messages have one line each."""
    from dft_lightning import events

    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(events._escape)
    for file in (events.__file__, "/lightning/trainer.py"):
        args = ("\x1b[2J\nforged", 1)
        handler.handle(logging.LogRecord("dft_lightning", logging.INFO, file, 1, "in %s: %d", args, None))
    said = capfd.readouterr().err
    assert said == "in \\x1b[2J\\nforged: 1\nin \\x1b[2J\nforged: 1\n"
    events.escape_logs()
    shown = warnings.formatwarning("in \x1b[2J\nforged", UserWarning, events.__file__, 1)
    assert "in \\x1b[2J\\nforged" in shown


class TestFromPython:
    @pytest.mark.parametrize(
        ("given", "advice"),
        [
            ("DFT", r"'DFT', a str; .*`from dft_lightning.weighting import DFT` and pass DFT\(\)"),
            ("dft_lightning.weighting.Uniform", r"import Uniform` and pass Uniform\(\)"),
            ("Mine", r"'Mine', a str; .*such as DFT\(\)"),
            (DFT, r"the class DFT; expected an object of it, as in DFT\(\)"),
            (None, "None, a NoneType"),
            (1.0, "1.0, a float"),
        ],
    )
    def test_what_is_no_weighting_is_refused(self, given, advice):
        with pytest.raises(UserError, match=advice):
            FineTuner("m", given)

    def test_the_advice_works(self):
        assert isinstance(FineTuner("m", DFT()).weighting, TokenWeighting)

    def test_the_model_before_it_is_loaded(self, model_dir):
        module = FineTuner(str(model_dir), DFT())
        with pytest.raises(UserError, match=r"not loaded yet: .*configure_model\(\)"):
            _ = module.model
        module.configure_model()
        assert module.model.config.model_type == "llama"


@pytest.mark.parametrize("scheduling", ["{0: 2}", "{4: 1}"])
def test_accumulation_by_a_callback_is_one_line(scheduling, dft, capfd):
    write_jsonl(Path("rows.jsonl"), sums(8))
    callback = ["--trainer.callbacks", "GradientAccumulationScheduler", "--trainer.callbacks.scheduling", scheduling]
    leaves_with_2(lambda: dft("fit", "--data.path", "rows.jsonl", *callback))
    error = capfd.readouterr().err
    assert "Traceback" not in error
    line = error.strip().splitlines()[-1]
    assert "GradientAccumulationScheduler is not supported" in line
    assert "data.global_batch_size" in line
