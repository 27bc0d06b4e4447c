"""Every callback that Lightning ships, from the command line: it works, with resuming too, or is refused by name."""

from pathlib import Path

import lightning.pytorch.callbacks as shipped
import pytest
import torch
import yaml
from test_cli import dft, fails, here, scalars  # noqa: F401 - fixtures

from dft_lightning.__main__ import main
from dft_lightning.callbacks.lightnings import REFUSED

OWN = '''
import lightning.pytorch.callbacks as shipped


class Writer(shipped.BasePredictionWriter):
    """A user's."""


class Bar(shipped.ProgressBar):
    """A user's."""

    def disable(self): ...
    def enable(self): ...


class Finetuning(shipped.BaseFinetuning):
    """A user's."""

    def freeze_before_training(self, pl_module): ...
    def finetune_function(self, pl_module, epoch, optimizer): ...


def count(batch):
    return len(batch)


def hook(trainer, pl_module):
    print("the hook was here")
'''

#: By name: its options, and what is seen of it.
WORKS = {
    "BasePredictionWriter": {"class_path": "{own}.Writer", "init_args": {"write_interval": "batch"}},
    "Callback": {},
    "Checkpoint": {},
    "DeviceStatsMonitor": {"init_args": {"cpu_stats": False}},
    "EarlyStopping": {"init_args": {"monitor": "val/nll", "patience": 9}},
    "LambdaCallback": {"init_args": {"on_train_end": "{own}.hook"}},
    "LearningRateFinder": {"init_args": {"num_training_steps": 14}},
    "LearningRateMonitor": {"init_args": {"logging_interval": "step"}},
    "ModelCheckpoint": {"init_args": {"every_n_train_steps": 2, "save_top_k": -1}},
    "ModelSummary": {"init_args": {"max_depth": 2}},
    "ProgressBar": {"class_path": "{own}.Bar"},
    "RichModelSummary": {},
    "RichProgressBar": {},
    "StochasticWeightAveraging": {"init_args": {"swa_lrs": 1e-5, "swa_epoch_start": 1}},
    "ThroughputMonitor": {"init_args": {"batch_size_fn": "{own}.count", "window_size": 2}},
    "Timer": {"init_args": {"duration": "00:01:00:00"}},
    "TQDMProgressBar": {"init_args": {"refresh_rate": 1}},
    "EMAWeightAveraging": {"init_args": {"decay": 0.5}},
    "WeightAveraging": {},
}
OPTIONS = {
    "BackboneFinetuning": {},
    "BaseFinetuning": {"class_path": "{own}.Finetuning"},
    "GradientAccumulationScheduler": {"init_args": {"scheduling": {0: 2}}},
    "OnExceptionCheckpoint": {"init_args": {"dirpath": "saved"}},
    "ModelPruning": {"init_args": {"pruning_fn": "l1_unstructured"}},
}
DFT = ["--model.weighting", "DFT"]
#: Rows that run in `make test`; the others in `make test-all`.
QUICK = {"Timer", "TQDMProgressBar", "EMAWeightAveraging"}


def entry(own, name, options):
    given = {"class_path": f"lightning.pytorch.callbacks.{name}"} | options
    return yaml.safe_load(yaml.safe_dump(given).replace("{own}", own))


@pytest.fixture
def config(here):  # noqa: F811
    with open(f"{here}.py", "a") as file:
        file.write(OWN)

    def write(*given):
        Path("callbacks.yaml").write_text(
            yaml.safe_dump({"trainer": {"callbacks": [entry(here, *each) for each in given]}})
        )
        return ["--config", "callbacks.yaml"]

    return write


def test_the_table_has_every_callback():
    refused = {name for name in shipped.__all__ if issubclass(getattr(shipped, name), tuple(REFUSED))}
    assert {*WORKS} | refused == {*shipped.__all__}
    assert not {*WORKS} & refused


def twice(dft, given):  # noqa: F811
    """A run of two epochs, and one more."""
    common = [*given, *DFT, "--data.val_size", "2", "--data.global_batch_size", "15"]
    common += ["--token_probabilities.every_n_steps", "0"]
    assert dft("fit", *common, "--trainer.max_epochs", "2") == 0
    step = torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert step == 4
    assert dft("fit", *common, "--trainer.max_epochs", "3") == 0
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
    assert sorted(scalars("run")["train/nll"]) == [1, 2, 3, 4, 5, 6]
    assert Path("run/export/model.safetensors").exists()


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.exhaustive) for name in WORKS]
)
def test_it_works_in_a_run_and_its_resume(dft, config, name):  # noqa: F811
    twice(dft, config((name, WORKS[name])))
    saved = yaml.safe_load(Path("run/config.yaml").read_text())["trainer"]["callbacks"]
    assert saved[0]["class_path"].rpartition(".")[2] in (name, "Writer", "Bar")


def test_all_that_go_together_do(dft, config, capsys):  # noqa: F811
    """Those that are not one of their kind."""
    alone = {
        "ProgressBar",
        "TQDMProgressBar",
        "ModelSummary",
        "WeightAveraging",
        "EMAWeightAveraging",
        "ThroughputMonitor",
    }
    twice(dft, config(*[(name, options) for name, options in WORKS.items() if name not in alone]))
    assert "the hook was here" in capsys.readouterr().out


@pytest.mark.parametrize("name", [n for n in shipped.__all__ if issubclass(getattr(shipped, n), tuple(REFUSED))])
def test_it_is_refused_with_what_to_use(dft, config, capsys, name):  # noqa: F811
    given = config((name, OPTIONS.get(name, {})))
    shown = "Finetuning" if name == "BaseFinetuning" else name
    for command in ("fit", "plan"):
        reason = next(why for kind, why in REFUSED.items() if issubclass(getattr(shipped, name), kind))
        fails(
            lambda command=command: dft(command, *given, *DFT),
            capsys,
            f"the callback {shown} is not supported: ",
            reason,
        )
    assert not Path("run").exists()


def test_by_the_command_line_alone(dft, capsys):  # noqa: F811
    more = [
        *DFT,
        "--trainer.callbacks+=EMAWeightAveraging",
        "--trainer.callbacks.decay=0.5",
        "--trainer.callbacks+=Timer",
    ]
    assert dft("fit", *more, "--trainer.callbacks.duration", "00:01:00:00", "--trainer.max_steps", "1") == 0
    assert main(["export", "run/checkpoints/last.ckpt", "averaged", "--which", "averaged"]) == 0
    fails(lambda: main(["export", "run/checkpoints/last.ckpt", "other", "--which", "best"]), capsys, "--which")


def test_a_plan_counts_the_averages(dft, capsys):  # noqa: F811
    import json

    def held(*more):
        assert dft("plan", "--json", "--device", "h100", *DFT, *more) == 0
        return json.loads(capsys.readouterr().out)

    plain, averaged = held(), held("--trainer.callbacks+=EMAWeightAveraging")
    on_the_host = held("--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.device=cpu")
    assert plain == on_the_host
    assert averaged != plain
    half = held("--trainer.callbacks+=EMAWeightAveraging", "--trainer.precision=bf16-true")
    assert json.dumps(half).count("averages of the trained weights") == 1
