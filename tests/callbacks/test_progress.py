"""Lines in a log file, a bar in a terminal."""

import re
import sys

import pytest
from harness import fit

from dft_lightning.callbacks import Progress, Throughput


def lines(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]


def run(model_dir, rows_file, progress, val_size=0, **more):
    return fit(
        model_dir,
        rows_file,
        callbacks=[Throughput(), progress],
        enable_progress_bar=True,
        data={"micro_batch_size": 4, "val_size": val_size},
        **more,
    )


def test_a_line_at_the_end_whatever_the_time(model_dir, rows_file, capsys):
    run(model_dir, rows_file, Progress(1e9))
    (line,) = lines(capsys)
    assert line.startswith("step 4/4, ")
    for part in ("objective ", "nll ", "tok/s ", "0.0 min left"):
        assert part in line
    assert "v_num" not in line


def test_a_line_where_one_is_due(model_dir, rows_file, capsys):
    run(model_dir, rows_file, Progress(0.0))
    steps = [line.split(",")[0] for line in lines(capsys)]
    assert steps == [f"step {step}/4" for step in (1, 2, 3, 4)]


def test_in_a_terminal_there_is_a_bar_and_no_line(model_dir, rows_file, capsys, monkeypatch):
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    run(model_dir, rows_file, Progress(0.0), max_steps=1)
    captured = capsys.readouterr()
    assert "tok/s=" in captured.out + captured.err
    assert "min left" not in captured.out


def test_other_ranks_are_silent(model_dir, rows_file, capsys):
    progress = Progress(0.0)
    progress.disable()
    assert progress.line_every_s == float("inf")


def test_the_time_that_is_left(model_dir, rows_file, capsys, monkeypatch):
    """Three of four steps in 180 s leave one of 60 s."""

    class Late(Progress):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 3:
                self._began -= 180
                self._last_line = -1e9
            super().on_train_batch_end(trainer, pl_module, *args)

    fit(model_dir, rows_file, callbacks=[Late(1e6)], enable_progress_bar=True)
    line = lines(capsys)[0]
    assert line.startswith("step 3/4")
    assert float(line.split(", ")[-1].removesuffix(" min left")) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("every_s", [0.0, 1e9])
def test_lines_of_a_validation(model_dir, rows_file, capsys, every_s):
    """Where one is due, with the batches, their rate and the time that is left."""
    run(model_dir, rows_file, Progress(every_s), val_size=8)
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("validation: ")]
    assert bool(found) == (every_s == 0)
    assert all(re.fullmatch(r"validation: batch 2/2, \S+ per second, 0\.0 min left", line) for line in found)
