"""A misspelt or abbreviated option, key, class or value: one line with the nearest that is valid, and where it is."""

import contextlib
import io
import re

import pytest

from dft_lightning.__main__ import main
from dft_lightning.option_names import Names, find_unknown, known_options
from dft_lightning.option_sources import entries
from dft_lightning.parser import Parser
from dft_lightning.suggestions import did_you_mean, nearest

DFT = ["--model.weighting", "DFT"]
STOPPING = ["--trainer.callbacks+=EarlyStopping"]


def error_of(*words):
    """The one line of a command that ends with 2."""
    said, shown = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
        try:
            code = main([*map(str, words)])
        except SystemExit as leaving:
            code = leaving.code
    error = said.getvalue()
    assert code == 2, error or shown.getvalue()
    assert error.startswith("dft: error: ")
    assert error.count("\n") == 1
    assert len(error) < 700
    assert not shown.getvalue()
    return error.removeprefix("dft: error: ").strip()


def of_fit(*words, command="fit"):
    return error_of(command, "--model.model_name", "x", *words, "--print_config")


@pytest.fixture(scope="module")
def parser():
    """That of `dft fit`."""
    of_fit(*DFT, "--nonsense")
    assert Parser.root is not None
    return Parser.root._command()


MISSPELT = {
    "of the trainer": ([*DFT, "--trainer.max_stpes", "5"], "--trainer.max_stpes", "--trainer.max_steps"),
    "with a sign": ([*DFT, "--trainer.max_stpes=5"], "--trainer.max_stpes", "--trainer.max_steps"),
    "of the command": ([*DFT, "--overwrit", "true"], "--overwrit", "--overwrite"),
    "of the model": ([*DFT, "--model.attention", "sdpa"], "--model.attention", "--model.attn_implementation"),
    "without its group": ([*DFT, "--max_steps", "5"], "--max_steps", "--trainer.max_steps"),
    "a group": ([*DFT, "--trainr.max_steps", "5"], "--trainr.max_steps", "--trainer"),
    "of a weighting": ([*DFT, "--model.weighting.flor", "1"], "--model.weighting.flor", "--model.weighting.floor"),
    "of init_args": (
        [*DFT, "--model.weighting.init_args.flor", "1"],
        "--model.weighting.init_args.flor",
        "--model.weighting.init_args.floor",
    ),
    "of a nested one": (
        ["--model.weighting", "Mixed", "--model.weighting.of", "DFT", "--model.weighting.of.flor", "1"],
        "--model.weighting.of.flor",
        "--model.weighting.of.floor",
    ),
    "of adapters": ([*DFT, "--model.lora.rnak", "8"], "--model.lora.rnak", "--model.lora.rank"),
    "of the optimizer": ([*DFT, "--model.optimizer.lrr", "1"], "--model.optimizer.lrr", "--model.optimizer.lr"),
    "of the data": ([*DFT, "--data.pathh", "x"], "--data.pathh", "--data.path"),
    "of a callback": (
        [*DFT, *STOPPING, "--trainer.callbacks.moniter", "x"],
        "--trainer.callbacks.moniter",
        "--trainer.callbacks.monitor",
    ),
    "of a logger": (
        [*DFT, "--trainer.logger", "{class_path: CSVLogger, init_args: {save_dri: x}}"],
        "--trainer.logger.init_args.save_dri",
        "--trainer.logger.init_args.save_dir",
    ),
    "beside a class": (
        ["--model.weighting", "{class_path: DFT, floor: 0.1}"],
        "--model.weighting.floor",
        "--model.weighting.init_args.floor",
    ),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_of_the_command_line(name):
    words, wrong, right = MISSPELT[name]
    error = of_fit(*words)
    assert error.startswith(f"{wrong}: ")
    assert f"did you mean {right}?" in error


FILES = {
    "a group": ("trainr:\n  max_steps: 3\n", "trainr", "trainer"),
    "of the trainer": ("trainer:\n  max_stps: 3\n", "trainer.max_stps", "trainer.max_steps"),
    "without its group": ("max_steps: 3\n", "max_steps", "trainer.max_steps"),
    "of a weighting": (
        "model:\n  weighting:\n    class_path: DFT\n    init_args:\n      flor: 1\n",
        "model.weighting.init_args.flor",
        "model.weighting.init_args.floor",
    ),
    "of a nested one": (
        "model: {weighting: {class_path: Mixed, init_args: {of: {class_path: DFT, init_args: {flor: 1}}}}}",
        "model.weighting.init_args.of.init_args.flor",
        "model.weighting.init_args.of.init_args.floor",
    ),
    "of a callback": (
        "trainer:\n  callbacks:\n  - class_path: EarlyStopping\n    init_args: {moniter: x}\n",
        "trainer.callbacks.0.init_args.moniter",
        "trainer.callbacks.0.init_args.monitor",
    ),
    "of a logger": (
        "trainer:\n  logger:\n    class_path: CSVLogger\n    init_args: {save_dri: x}\n",
        "trainer.logger.init_args.save_dri",
        "trainer.logger.init_args.save_dir",
    ),
    "of adapters": ("model:\n  lora: {rnk: 8}\n", "model.lora.rnk", "model.lora.rank"),
    "of the data": ("data:\n  init_args: {pth: x}\n", "data.init_args.pth", "data.init_args.path"),
    "of the optimizer": (
        "model:\n  optimizer: {class_path: AdamW, init_args: {lrr: 1}}\n",
        "model.optimizer.init_args.lrr",
        "model.optimizer.init_args.lr",
    ),
    "the class": (
        "model:\n  weighting: {clas_path: DFT}\n",
        "model.weighting.clas_path",
        "model.weighting.class_path",
    ),
    "beside a class": (
        "model:\n  weighting: {class_path: DFT, floor: 1}\n",
        "model.weighting.floor",
        "model.weighting.init_args.floor",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_of_a_file(name, tmp_path):
    text, wrong, right = FILES[name]
    file = tmp_path / "c.yaml"
    file.write_text(text)
    weighting = [] if "weighting" in text else DFT
    error = of_fit(*weighting, "--config", file)
    assert error.startswith(f"{file}: {wrong}: ")
    assert error.endswith(f"did you mean {right}?")


ABBREVIATED = [
    ("--trainer.max_step", "--trainer.max_steps"),
    ("--model.weight", "--model.weighting"),
    ("--model.norm", "--model.normalize"),
    ("--data.pack", "--data.packing"),
    ("--ov", "--overwrite"),
    ("--run", "--run_dir"),
    ("--conf", "--config"),
    ("--export.enable", "--export.enabled"),
    ("--model.optimizer.weight", "--model.optimizer.weight_decay"),
    ("--trainer.strat", "--trainer.strategy"),
]


@pytest.mark.parametrize(("short", "full"), ABBREVIATED)
@pytest.mark.parametrize("sign", [True, False])
def test_abbreviations_are_refused(short, full, sign):
    error = of_fit(*DFT, *([f"{short}=true"] if sign else [short, "true"]))
    assert error.startswith(f"{short}: ")
    assert f"did you mean {full}" in error
    assert error.endswith("Options cannot be abbreviated")


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "plan", "diagnose", "inspect", "demo"])
def test_of_every_command(command):
    own = {"diagnose": "--sample_row", "inspect": "--row", "plan": "--utilisatio", "demo": "--run_di"}
    short = own.get(command, "--ckpt_pat")
    error = error_of(command, "--model.model_name", "x", *DFT, short, "3", "--print_config")
    assert error.startswith(f"{short}: ")
    assert f"did you mean {short}" in error


@pytest.mark.exhaustive
def test_every_option_of_the_command_line_is_refused_without_its_last_letter(parser):
    known = known_options(parser)
    refused = [name[:-1] for name in known if name not in ("help", "print_config") and name[:-1] not in known]
    assert len(refused) > 80
    for short in refused:
        assert of_fit(*DFT, f"--{short}", "1").startswith((f"--{short}: ", f"--{short} is")), short


def test_every_option_is_found_where_two_letters_are_swapped(parser):
    """Of all options of the command, by the names alone."""
    known = known_options(parser)
    for name in known:
        group, _, last = name.rpartition(".")
        at = len(last) // 2
        swapped = last[: at - 1] + last[at] + last[at - 1] + last[at + 1 :]
        wrong = f"{group}.{swapped}" if group else swapped
        if wrong in known or len(last) < 4:
            continue
        unknown = find_unknown(known, [f"--{wrong}", "1"], parser.get_default)
        assert unknown is not None, wrong
        assert f"did you mean --{name}" in str(unknown), (wrong, str(unknown))


def test_what_is_valid_is_not_found_fault_with(parser, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "model:\n  lora: {rank: 8}\n  lr_schedule_kwargs: {any: 1}\ntrainer: {callbacks: [EarlyStopping]}\n"
    )
    words = [
        "fit",
        "--config",
        str(file),
        *DFT,
        "--model.weighting.floor",
        "1",
        "--trainer.devices+=1",
        "--print_config",
    ]
    words += [
        *STOPPING,
        "--trainer.callbacks.monitor",
        "x",
        "--trainer.callbacks+",
        "Timer",
        "--model.optimizer.lr=1",
        "--print_config",
    ]
    words += ["--data", "NuminaMathDataModule", "--data.path", "--odd", "--model.weighting.init_args.floor", "0.2"]
    names = Names(known_options(parser), parser.get_default)
    unknown = names.first_unknown(entry for entry in entries(words) if entry.path != ("odd",))
    assert unknown is None, str(unknown)


CLASSES = {
    "a weighting": (["--model.weighting", "DTF"], "--model.weighting 'DTF' ", "DFT"),
    "a data module": ([*DFT, "--data", "ChatDataModul"], "--data 'ChatDataModul' ", "ChatDataModule"),
    "an optimizer": ([*DFT, "--model.optimizer", "AdmaW"], "--model.optimizer 'AdmaW' ", "AdamW"),
    "a callback": ([*DFT, "--trainer.callbacks+=EarlyStoping"], "--trainer.callbacks 'EarlyStoping' ", "EarlyStopping"),
    "a logger": ([*DFT, "--trainer.logger", "CSVLoger"], "--trainer.logger 'CSVLoger' ", "CSVLogger"),
    "a path": (
        ["--model.weighting", "dft_lightning.weighting.DTF"],
        "--model.weighting 'dft_lightning.weighting.DTF' cannot be imported",
        "DFT",
    ),
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes(name):
    words, said, right = CLASSES[name]
    error = of_fit(*words)
    assert error.startswith(said)
    assert error.endswith(f"did you mean {right}?")


def test_a_class_in_a_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("trainer:\n  callbacks:\n  - class_path: EarlyStoping\n")
    error = of_fit(*DFT, "--config", file)
    assert error.startswith(f"{file}: trainer.callbacks.0 'EarlyStoping' ")
    assert error.endswith("did you mean EarlyStopping?")


VALUES = {
    "normalize": ("model", "token", "tokens"),
    "quantization": ("model", "nf5", "nf4"),
    "precision": ("trainer", "bf61-mixed", "bf16-mixed"),
    "mode": ("checkpoints", "mim", "min"),
    "unsupported_losses": ("model", "ignor", "ignore"),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("in_a_file", [True, False])
def test_values(name, in_a_file, tmp_path):
    group, wrong, right = VALUES[name]
    file = tmp_path / "c.yaml"
    file.write_text(f"{group}:\n  {name}: {wrong}\n")
    error = of_fit(*DFT, *(["--config", file] if in_a_file else [f"--{group}.{name}", wrong]))
    place = f"{file}: {group}.{name}" if in_a_file else f"--{group}.{name}"
    assert error.startswith(f"{place} is {wrong!r}; expected ")
    assert error.endswith(f"did you mean {right}?")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vaildate"], "no command 'vaildate'.*did you mean validate"),
        (["--confg", "x", "fit"], "--confg: no such option; did you mean --config"),
        (["export", "a", "b", "--merge_lor", "true"], "--merge_lor: no such option.*did you mean --merge_lora"),
        (["export", "--merge", "true", "a", "b"], "--merge: no such option.*did you mean --merge_lora"),
        (["export", "a", "b", "--which", "averagd"], "--which is 'averagd'; .*did you mean averaged"),
        (["weightings", "DTF"], "no weighting 'DTF'.*did you mean DFT"),
        (["weightings", "DFT", "--floo", "0.2"], "--floo: DFT has no such option; did you mean --floor"),
        (["weightings", "--markdwon"], ".*'--markdwon'; did you mean --markdown"),
    ],
)
def test_of_our_own_commands(words, said):
    error = error_of(*words)
    assert re.match(said, error), error


@pytest.mark.parametrize(
    ("option", "wrong", "right"),
    [
        ("strategy", "fspd2", "fsdp2"),
        ("strategy", "dpd", "ddp"),
        ("accelerator", "cup", "cpu"),
        ("profiler", "simpel", "simple"),
        ("gradient_clip_algorithm", "nrom", "norm"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "plan"])
def test_names_that_the_trainer_looks_up(option, wrong, right, command, tmp_path):
    words = ["--model.model_name", "x", *DFT, "--data", "ChatDataModule", "--data.path", "x", "--run_dir", tmp_path]
    error = error_of(command, *words, f"--trainer.{option}", wrong)
    assert error.startswith(f"trainer.{option} is {wrong!r}; expected one of ")
    assert f"did you mean {right}" in error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trainer:\n  max_steps: 3\ntrainer:\n  max_epochs: 3\n", ", line 3: trainer is given in line 1, too"),
        ("model:\n  lora:\n    rank: 3\n    rank: 8\n", ", line 4: rank is given in line 3, too"),
        ("trainer: [1\n", ", line 2: not YAML"),
        ("- 1\n- 2\n", " is a list; expected options"),
        ("", " is empty; expected options"),
    ],
)
def test_a_file_that_is_no_configuration(text, said, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    error = of_fit(*DFT, "--config", file)
    assert str(file) in error
    assert said in error


def test_a_file_that_there_is_not(tmp_path, monkeypatch):
    (tmp_path / "base.yaml").write_text("trainer: {}\n")
    monkeypatch.chdir(tmp_path)
    assert of_fit(*DFT, "--config", "bsae.yaml") == (
        "--config bsae.yaml: there is no such file; did you mean base.yaml?"
    )


def test_the_nearest_name():
    names = ["max_steps", "max_time", "min_steps", "max_epochs"]
    assert nearest("max_step", names) == ["max_steps"]  # the only one that it abbreviates
    assert nearest("max", names)[0] == "max_time"  # of several the shortest first
    assert nearest("mxa_steps", names)[0] == "max_steps"
    assert nearest("zzz", names) == []
    assert nearest("", names) == []
    assert did_you_mean("zzz", names) == ""
    assert did_you_mean("MAX_STEP", names, "--") == "; did you mean --max_steps?"
