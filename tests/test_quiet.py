"""What a command prints into a log file: lines about the run, and none of a library's that a user cannot act on."""

import logging
import os
import re
import subprocess
import sys
import warnings

import pytest
from conftest import sums, write_jsonl
from launching import ROOT

from dft_lightning.quiet import quieten

OPTIONS = """--trainer.accelerator cpu --data NuminaMathDataModule --data.path rows.jsonl --data.val_size 8
    --data.global_batch_size 8 --data.micro_batch_size 4 --data.max_length 200 --model.weighting DFT"""
#: What may be on stderr.
ALLOWED = (
    r"(train|val): \d+ of \d+ rows used",
    r"`Trainer\.fit` stopped: `max_epochs=1` reached\.",
    r"Exported the last model to run/export",
    r"Token scores written to run/predictions",
)
#: What a fit may print on stdout but the table of the run.
STEP = r"step \d+/\d+, objective .*, \d+\.\d min left"
SEVERAL = """
import sys
from dft_lightning.__main__ import main
for words in {commands!r}:
    print(words[0], file=sys.stderr)
    assert main(words) == 0, words
"""


@pytest.fixture
def folder(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", sums(40))
    return tmp_path


def run(folder, words):
    """stdout and stderr, as a shell would write them into two files."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DFT_CACHE": str(folder / "c")}
    environment.pop("PYTHONWARNINGS", None)
    with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
        done = subprocess.run(
            [sys.executable, *words], cwd=folder, env=environment, stdout=out, stderr=err, check=False
        )
    texts = [(folder / name).read_bytes().decode() for name in ("out", "err")]
    assert done.returncode == 0, texts[1]
    return texts


def check(out, err, *more):
    assert "\r" not in out + err
    lines = err.splitlines()
    assert not [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in (*ALLOWED, *more))]
    assert len(lines) == len(set(lines)), err  # each line once, not once a rank
    steps = [line for line in out.splitlines() if line.startswith("step ")]
    assert all(re.fullmatch(STEP, line) for line in steps)
    assert len(steps) == len({line.split(",")[0] for line in steps}), out


def test_of_one_process(folder, model_dir):
    base = ["--model.model_name", str(model_dir), *OPTIONS.split(), "--run_dir", "run"]
    names = ("fit", "validate", "predict", "export", "diagnose", "inspect", "plan")
    commands = [[each, *base] for each in names]
    commands[names.index("export")][1:] = ["run/checkpoints/last.ckpt", "out1"]
    out, err = run(folder, ["-c", SEVERAL.format(commands=commands)])
    for read in ("train: 32 of 32 rows used\n", "val: 8 of 8 rows used\n"):
        assert read in err
        err = err.replace(read, "")  # each command reads the data
    check(out, err, *names)
    assert "step 4/4, " in out
    assert "val/nll" in out


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("command", ["fit", pytest.param("predict", marks=pytest.mark.exhaustive)])
def test_of_two_ranks(folder, model_dir, strategy, command):
    base = ["--model.model_name", str(model_dir), *OPTIONS.split(), "--run_dir", "run"]
    ranks = ["--trainer.devices", "2", "--trainer.strategy", strategy]
    check(*run(folder, ["-m", "dft_lightning", command, *base, *ranks]), ".*batch .*")


def test_other_words_of_the_same_loggers_are_shown(caplog):
    quieten()
    quieten()  # filters are added once
    for name, said, is_shown in (
        ("lightning.pytorch.utilities.rank_zero", "GPU available: False, used: False", False),
        ("lightning.pytorch.utilities.rank_zero", "GPU available: True (cuda), used: False", True),
        ("lightning.pytorch.utilities.rank_zero", "`Trainer.fit` stopped: `max_steps=3` reached.", True),
        ("lightning.fabric.utilities.seed", "[rank: 1] Seed set to 0", False),
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from x", False),
        ("bitsandbytes.backends.cpu.ops", "something else", True),
    ):
        caplog.clear()
        logger = logging.getLogger(name)
        assert len(logger.filters) == len(set(map(type, logger.filters)))
        level, propagate = logger.level, logger.propagate
        logger.addHandler(caplog.handler)
        try:
            logger.warning(said)
        finally:
            logger.removeHandler(caplog.handler)
        assert (logger.level, logger.propagate) == (level, propagate)
        assert (said in caplog.messages) == is_shown, said


def test_other_warnings_are_shown():
    with warnings.catch_warnings(record=True) as shown:
        warnings.resetwarnings()
        quieten()
        warnings.warn("You are using a custom batch sampler `StepSampler` for prediction.", stacklevel=1)
        warnings.warn("You are using a custom batch sampler `Mine` for prediction.", stacklevel=1)
        warnings.warn("torch.distributed.nn.functional.all_gather is deprecated, use x", FutureWarning, stacklevel=1)
    assert [str(each.message) for each in shown] == ["You are using a custom batch sampler `Mine` for prediction."]
