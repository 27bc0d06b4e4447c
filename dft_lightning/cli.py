"""`dft fit | validate | test | predict`: one LightningCLI around `FineTuner`, and the folder that holds a run.

Everything of a run is in `run_dir`: the configuration as run, TensorBoard's events, checkpoints, exports, predictions.
Starting the same command again goes on there.
"""

import importlib
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from dft_lightning.callbacks import Checkpoints, Export, Progress, RunSummary, TokenProbabilities, TokenScores
from dft_lightning.callbacks.checkpoints import checkpoint_folder
from dft_lightning.data import ChatDataModule
from dft_lightning.errors import UserError
from dft_lightning.module import FineTuner
from dft_lightning.weighting import TokenWeighting

#: The subfolders of a run.
_CONTENTS = ("tensorboard", "checkpoints", "export", "export-merged", "predictions")
#: What another run in the same folder may not change without being asked for it.
_IDENTITY = ("model_name", "weighting", "normalize", "lora")


class Parser(LightningArgumentParser):
    """Says what is wrong in one line, and leaves with 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message without usage and traceback."""
        text = " ".join(message.split())
        if unknown := re.search(r"Expected a dot import path string: (\S+)", text):
            text += _class_hint(text, unknown.group(1))
        self.exit(2, f"dft: error: {text}\n")
        raise AssertionError("exit returns")


def _class_hint(text: str, name: str) -> str:
    """What could have been meant by a class name that is not known."""
    base: type = TokenWeighting if "weighting" in text else ChatDataModule
    known = [cls.__name__ for cls in _subclasses(base) if cls.__module__.startswith("dft_lightning.")]
    return f" — {name!r} is none of {', '.join(sorted(known))}; write a class of your own as file.Class"


def _subclasses(base: type) -> list[type]:
    found: list[type] = base.__subclasses__()
    return found + [deeper for cls in found for deeper in _subclasses(cls)]


class SaveConfig(SaveConfigCallback):
    """Writes the configuration of a fit, as parsed and merged, to `run_dir/config.yaml`."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the file, on the first rank."""
        if stage == "fit" and trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = folder / ".config.yaml.unfinished"
            self.parser.save(self.config, unfinished, skip_none=False, overwrite=True, multifile=False)
            unfinished.rename(folder / "config.yaml")


class CommandLine(LightningCLI):
    """LightningCLI with a run folder, callbacks that are always there, and options that win over a checkpoint's."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our own options, beside `model`, `data` and `trainer`."""
        parser.add_argument(
            "--run_dir",
            type=str,
            default="runs/default",
            help="Folder of the run: config.yaml, tensorboard/, checkpoints/, export/, predictions/. The same command "
            "goes on there.",
        )
        parser.add_argument(
            "--overwrite",
            type=bool,
            default=False,
            help="Start a fit anew: remove what an earlier one left in run_dir, in place of going on with it.",
        )
        parser.add_lightning_class_args(TokenProbabilities, "token_probabilities")
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(Export, "export")

    def _parse_ckpt_path(self) -> None:
        """Not as in Lightning, where a checkpoint's options replace those that the user gives."""

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self._get(self.config, "run_dir"))

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint to start from, before anything heavy happens."""
        assert self.subcommand is not None
        config = self.config[self.subcommand]
        if self.subcommand == "fit" and config.overwrite:
            for name in _CONTENTS:
                shutil.rmtree(self.run_dir / name, ignore_errors=True)
        asked = config.get("ckpt_path")
        config.ckpt_path = find_checkpoint(self.run_dir, asked, self.subcommand)
        if self.subcommand == "fit" and config.ckpt_path is not None:
            self._step = _check_same_run(config.ckpt_path, config, self.run_dir, asked not in (None, "last"))
        if self.subcommand == "predict":
            config.return_predictions = False  # scores go to disk batch by batch, and are not kept in memory

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer, logging into the run's folder."""
        given = self._get(self.config_init, "trainer")
        own: list[pl.Callback] = [TokenScores()] if self.subcommand == "predict" else [RunSummary()]
        if given["enable_progress_bar"] is not False:
            own.append(Progress())
        if given["logger"] in (None, True):
            kwargs["logger"] = self._logger() if self.subcommand == "fit" else False
        if given["callbacks"] is not None:
            own += given["callbacks"] if isinstance(given["callbacks"], list) else [given["callbacks"]]
        return super().instantiate_trainer(default_root_dir=str(self.run_dir), callbacks=own, **kwargs)

    def _logger(self) -> TensorBoardLogger:
        """TensorBoard's events, without those that are later than the checkpoint."""
        purge: Any = {"purge_step": self._step} if self._step else {}
        return TensorBoardLogger(str(self.run_dir), name="tensorboard", version="", default_hp_metric=False, **purge)

    _step = 0


def find_checkpoint(run_dir: Path, asked: str | None, subcommand: str) -> str | None:
    """The file to start from: for a fit the run's last checkpoint, if there is one, unless another is asked for.

    Args:
        asked: a file; "last" or "best" of the run; None.

    Raises:
        UserError: a checkpoint that was asked for by name or path is not there.
    """
    folder = checkpoint_folder(run_dir)
    if asked is None and subcommand != "fit":
        return None
    if asked in (None, "last") and subcommand == "fit":  # nothing there: a fresh start
        return str(folder / "last.ckpt") if (folder / "last.ckpt").exists() else None
    path = folder / f"{asked}.ckpt" if asked in ("last", "best") else Path(str(asked))
    if not path.exists():
        raise UserError(f"ckpt_path {asked!r}: there is no {path}; give a file, or 'last' or 'best' of the run_dir")
    return str(path)


def _check_same_run(checkpoint: str, config: Namespace, run_dir: Path, asked: bool) -> int:
    """The checkpoint's step; refused where a run would go on as another one without being asked to."""
    try:
        stored = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        then, step = stored["hyper_parameters"], int(stored["global_step"])
    except Exception as error:
        raise UserError(
            f"cannot read checkpoint {checkpoint} ({error}): remove it, or give another ckpt_path"
        ) from error
    now = {key: _as_data(config.model.get(key)) for key in _IDENTITY}
    changed = [f"model.{key}: {then.get(key)!r} → {now[key]!r}" for key in _IDENTITY if then.get(key) != now[key]]
    if changed and not asked:
        raise UserError(
            f"{run_dir} holds a run with other options ({'; '.join(changed)}): choose another --run_dir, or, to go on "
            f"with these all the same, give --ckpt_path {checkpoint}"
        )
    return step


def _as_data(value: Any) -> Any:
    """A parsed option as `save_hyperparameters` keeps it."""
    return value.as_dict() if isinstance(value, Namespace) else value


def run(command_line: type[CommandLine], args: Sequence[str] | None) -> int:
    """Parse, run and report in one line what the user has to mend."""
    sys.path.insert(0, os.getcwd())  # for a weighting from the user's own file
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    torch.set_float32_matmul_precision("high")
    importlib.invalidate_caches()
    try:
        command_line(
            FineTuner,
            ChatDataModule,
            subclass_mode_data=True,
            parser_class=Parser,
            save_config_callback=SaveConfig,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={
                "log_every_n_steps": 1,
                "use_distributed_sampler": False,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
            },
            args=None if args is None else list(args),
        )
    except UserError as error:
        print(f"dft: error: {error}", file=sys.stderr)
        return 2
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Run `dft` with arguments; 2 where the user's input cannot be used."""
    return run(CommandLine, args)
