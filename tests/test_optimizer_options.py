"""`--model.optimizer` on the command line: bare names are torch's, and no option reaches another class."""

import inspect

import pytest
import torch
import yaml

from dft_lightning.cli import InsteadOfTraining
from dft_lightning.cli import run as run_command
from dft_lightning.errors import UserError
from dft_lightning.optimization import PAPERS_ADAMW
from dft_lightning.optimizer_options import accepted, full_name, with_full_names, with_own_options

BASE = ["fit", "--model.model_name", "none", "--data.path", "none.jsonl", "--model.weighting", "DFT"]


class Parsed(InsteadOfTraining):
    """Keeps the module that the options make."""

    module = None

    def _run_subcommand(self, subcommand):
        Parsed.module = self.model


def made(*words):
    """The group of the optimizer that these words make, and its class."""
    assert run_command(Parsed, [*BASE, *words]) == 0
    optimizer = Parsed.module.optimization.over(torch.nn.Parameter(torch.zeros(2, 2)))
    return type(optimizer), {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}


def said(capsys, *words):
    try:
        status = run_command(Parsed, [*BASE, *words])
    except SystemExit as leaving:
        status = leaving.code
    assert status == 2
    error = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in error if line.startswith("dft: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in "".join(error)
    return lines[0].removeprefix("dft: error: ")


NAMES = ["SGD", "Adam", "RMSprop", "Adagrad", "Adafactor", "NAdam", "RAdam", "Muon", "ASGD", "Adamax"]


@pytest.mark.parametrize("name", NAMES)
def test_another_class_has_its_own_defaults(name):
    """RMSprop and Adagrad are classes of bitsandbytes too, and Adafactor of transformers."""
    pytest.importorskip("bitsandbytes.optim")
    cls = getattr(torch.optim, name)
    truth = cls([torch.nn.Parameter(torch.zeros(2, 2))])
    kind, group = made("--model.optimizer", name)
    assert kind is cls
    assert group == {key: value for key, value in truth.param_groups[0].items() if key != "params"}


def test_the_default_class_keeps_the_papers_settings():
    for words in ([], ["--model.optimizer", "AdamW"], ["--model.optimizer=torch.optim.AdamW"]):
        kind, group = made(*words)
        assert kind is torch.optim.AdamW
        assert {key: group[key] for key in PAPERS_ADAMW} == PAPERS_ADAMW
    _, group = made("--model.optimizer.lr", "1e-3")
    assert (group["lr"], group["betas"]) == (1e-3, (0.9, 0.95))


WAYS = [
    ["--model.optimizer", "SGD", "--model.optimizer.lr", "0.5"],
    ["--model.optimizer.lr", "0.5", "--model.optimizer", "SGD"],
    ["--model.optimizer.lr=0.5", "--model.optimizer=torch.optim.SGD"],
    ["--model.optimizer.init_args.lr", "0.5", "--model.optimizer.class_path", "torch.optim.SGD"],
    ["--model.optimizer", '{"class_path": "SGD", "init_args": {"lr": 0.5}}'],
    ["--config", "sgd.yaml"],
    ["--config", "adamw.yaml", "--model.optimizer", "SGD", "--model.optimizer.lr", "0.5"],
    ["--config", "adamw.yaml", "--config", "sgd.yaml"],
    ["--config", "bare.yaml", "--model.optimizer.lr", "0.5"],
    ["--model", "model.yaml"],
]


@pytest.mark.parametrize("words", WAYS, ids=" ".join)
def test_however_it_is_written(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-4, "weight_decay": 0.3, "eps": 1e-5}}
    sgd = {"class_path": "SGD", "init_args": {"lr": 0.5}}
    for name, spec in (("adamw", adamw), ("sgd", sgd), ("bare", "SGD")):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"model": {"optimizer": spec}}))
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"optimizer": sgd | {"class_path": "torch.optim.SGD"}}))
    kind, group = made(*words)
    assert kind is torch.optim.SGD
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.5, 0.0, 0.0)


def test_a_run_of_the_saved_configuration_is_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.0}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"optimizer": saved}}))
    assert made("--config", "config.yaml")[1]["momentum"] == 0.9
    assert made("--config", "config.yaml", "--model.optimizer", "SGD")[1]["momentum"] == 0.9
    assert made("--config", "config.yaml", "--model.optimizer", "AdamW")[1]["lr"] == PAPERS_ADAMW["lr"]


WRONG = [
    (["--model.optimizer.lr", "-1"], "model.optimizer.lr is -1.0: Invalid learning rate"),
    (["--model.optimizer.lr", "fast"], "--model.optimizer.lr is 'fast'; expected float"),
    (["--model.optimizer.betas", "[2, 3]"], "model.optimizer.betas is (2.0, 3.0)"),
    (["--model.optimizer.learning_rate", "1"], "--model.optimizer.learning_rate: torch.optim.AdamW has no such option"),
    (["--model.optimizer", "SGD", "--model.optimizer.betas", "[0.9, 0.9]"], "torch.optim.SGD has no such option"),
    (["--model.optimizer", "AdamX"], "--model.optimizer 'AdamX' is no optimizer class that can be imported"),
    (["--model.optimizer", "torch.optim.AdamX"], "'torch.optim.AdamX' is no optimizer class"),
    (["--model.optimizer", "torch.nn.Linear"], "'torch.nn.Linear' is no optimizer class"),
    (["--model.optimizer", "LBFGS"], "model.optimizer LBFGS evaluates the loss several times"),
    (["--model.lr_schedule_kwargs.power", "2"], "lr_schedule_kwargs has power, which cosine does not have"),
    (["--seed_everything", "-1"], "--seed_everything is -1; expected a number from 0"),
    (["--data.seed", "-1"], "data.seed is -1; expected 0 or more"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=lambda each: str(each))
def test_what_is_wrong_is_said_in_one_line(capsys, words, message):
    assert message in said(capsys, *words)


def test_bare_names():
    assert full_name("AdamW") == "torch.optim.AdamW"
    assert full_name("my.own.AdamW") == "my.own.AdamW"
    assert full_name("NoSuchThing") == "NoSuchThing"
    pytest.importorskip("bitsandbytes.optim")
    assert full_name("AdamW8bit") == "bitsandbytes.optim.AdamW8bit"
    assert full_name("RMSprop") == "torch.optim.RMSprop"


class Lamb9(torch.optim.SGD):
    """There are two of this name."""


Other = type("Lamb9", (torch.optim.SGD,), {"__module__": "elsewhere", "__qualname__": "Lamb9"})


def test_an_ambiguous_name_lists_the_import_paths():
    with pytest.raises(UserError, match=r"'Lamb9' is ambiguous: give one of elsewhere.Lamb9, .*options.L"):
        full_name("Lamb9")


class Hands(torch.optim.SGD):
    """Has an option of its own, without a default, and hands the others on."""

    def __init__(self, params, strength, **others):
        super().__init__(params, **others)


def test_options_of_a_class_that_hands_them_on():
    found = accepted(f"{__name__}.Hands")
    assert found["strength"] is inspect.Parameter.empty
    assert found["lr"] == accepted("torch.optim.SGD")["lr"] == 1e-3
    assert accepted("torch.optim.AdamW")["weight_decay"] == 0.01
    assert accepted("no.such.Class") == {}
    assert "--model.optimizer.weight_decay=0" in with_own_options(["fit", "--model.optimizer", f"{__name__}.Hands"])


def test_words_without_an_optimizer_stay_as_they_are():
    words = ["fit", "--trainer.max_steps", "3", "--model.lora.rank=4", "--overwrite", "true"]
    assert with_own_options(words) == words
    assert with_full_names("model: {lora: {rank: 4}}") == "model: {lora: {rank: 4}}"
    text = "# a comment stays\nmodel: {optimizer: {class_path: torch.optim.SGD}}"
    assert with_full_names(text) == text
