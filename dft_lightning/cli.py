"""`dft fit | validate | test | predict`: one LightningCLI around `FineTuner`, and the folder that holds a run.

Everything of a run is in `run_dir`: the configuration as run, TensorBoard's events, checkpoints, exports, predictions.
Starting the same command again goes on there.
"""

import logging
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from dft_lightning.callbacks import Checkpoints, Export, Progress, RunSummary, TokenProbabilities, TokenScores
from dft_lightning.callbacks.checkpoints import checkpoint_folder
from dft_lightning.data import ChatDataModule
from dft_lightning.errors import UserError
from dft_lightning.module import FineTuner
from dft_lightning.optimization import PAPERS_ADAMW
from dft_lightning.resume import Change, age, identity_by_options, refuse
from dft_lightning.weighting import TokenWeighting

#: Where we differ from Lightning, whose default is 1,000 epochs.
_TRAINER = {
    "max_epochs": 1,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}
#: What belongs to a run.
_CONTENTS = (
    "config.yaml",
    "tensorboard",
    "checkpoints",
    "export",
    "export-merged",
    "predictions",
    "skipped_steps.jsonl",
)
_ASIDE = ".overwritten"


class Parser(LightningArgumentParser):
    """Says what is wrong in one line, and leaves with 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message without usage and traceback."""
        text = " ".join(message.split())
        unknown = re.search(r'Parser key "(model.weighting|data)".*Expected a dot import path string: (\S+)', text)
        if unknown:
            text = _class_hint(*unknown.groups())
        self.exit(2, f"dft: error: {text}\n")
        raise AssertionError("exit returns")


def _class_hint(key: str, name: str) -> str:
    """What could have been meant by a class name that is not known."""
    base: type = TokenWeighting if key == "model.weighting" else ChatDataModule
    known = [cls.__name__ for cls in [base, *_subclasses(base)] if cls.__module__.startswith("dft_lightning.")]
    known = sorted(name for name in known if name != "TokenWeighting")
    return f"--{key} {name!r} is none of {', '.join(known)}; write a class of your own as file.Class"


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
            config = self.config.clone()
            config.ckpt_path, config.overwrite, config.allow_changes = None, False, []  # of this start, not of the run
            self.parser.save(config, unfinished, skip_none=False, overwrite=True, multifile=False)
            unfinished.rename(folder / "config.yaml")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Everything is in place: what `--overwrite` has set aside can go."""
        if trainer.is_global_zero:
            shutil.rmtree(Path(trainer.default_root_dir) / _ASIDE, ignore_errors=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """A false start: what was set aside comes back."""
        run_dir = Path(trainer.default_root_dir)
        if trainer.is_global_zero and (run_dir / _ASIDE).exists():
            _move(run_dir / _ASIDE, run_dir)


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
            help="Start a fit anew: what an earlier one left in run_dir is removed when the training begins.",
        )
        parser.add_argument(
            "--allow_changes",
            type=list[Change],
            default=[],
            help="What may differ from the run whose checkpoint is gone on with, e.g. '[weighting]'.",
        )
        adamw = PAPERS_ADAMW | {"betas": list(PAPERS_ADAMW["betas"])}
        parser.set_defaults({"model.optimizer": {"class_path": "torch.optim.AdamW", "init_args": adamw}})
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
        asked = config.get("ckpt_path")
        anew = self.subcommand == "fit" and config.overwrite and asked in (None, "last")
        config.ckpt_path = None if anew else find_checkpoint(self.run_dir, asked, self.subcommand)
        if config.ckpt_path is not None:
            self._stored, self._step = _read(config.ckpt_path, self.subcommand)
        if self.subcommand == "predict":
            config.return_predictions = False  # scores go to disk batch by batch, and are not kept in memory

    def instantiate_classes(self) -> None:
        """Turn what a constructor does not take into one line."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, MisconfigurationException) as error:
            if os.environ.get("DFT_TRACEBACK"):
                raise
            raise UserError(" ".join(str(_root(error)).split())) from error

    def after_instantiate_classes(self) -> None:
        """A run goes on in its folder as what it was, unless the user asks for something else."""
        if not self._stored:
            return
        now = identity_by_options(self.model.hparams)
        self.model.allow_changes = frozenset(self._get(self.config, "allow_changes"))
        if self.subcommand != "fit":  # another weighting may look at the model, but its tensors have to fit
            now = {"lora": now["lora"]}
        refuse(identity_by_options(self._stored), now, self.model.allow_changes)

    def before_fit(self) -> None:
        """With `--overwrite`, move an earlier run out of the way; it is removed when this one begins to train."""
        if self.config.fit.overwrite and self.trainer.is_global_zero and self.run_dir.exists():
            _move(self.run_dir, self.run_dir / _ASIDE)

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
        """TensorBoard's events, without those of a run that was not gone on with, or later than the checkpoint."""
        later: Any = {"purge_step": self._step + 1 if self._stored else 0}
        return TensorBoardLogger(str(self.run_dir), name="tensorboard", version="", default_hp_metric=False, **later)

    _stored: Mapping[str, Any] = MappingProxyType({})
    _step = 0


def _root(error: BaseException) -> BaseException:
    """Where a chain of errors began: jsonargparse wraps a constructor's error in some of its own."""
    while (earlier := error.__cause__ or error.__context__) is not None and isinstance(earlier, ValueError):
        error = earlier
    return error


def _move(source: Path, target: Path) -> None:
    """Move what belongs to a run from one folder to another, in place of what is there."""
    for name in _CONTENTS:
        if not (source / name).exists():
            continue
        if (target / name).is_dir():
            shutil.rmtree(target / name)
        target.mkdir(exist_ok=True)
        (source / name).rename(target / name)


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
    if asked in (None, "last") and subcommand == "fit" and not (folder / "last.ckpt").exists():
        if (folder / ".last.ckpt.unfinished").exists():
            print(f"{folder} has no whole checkpoint, only one that was cut off while it was written: starting anew")
        return None  # nothing there: a fresh start
    asked = asked or "last"
    path = folder / f"{asked}.ckpt" if asked in ("last", "best") else Path(str(asked))
    if not path.exists():
        raise UserError(f"ckpt_path {asked!r}: there is no {path}; give a file, or 'last' or 'best' of the run_dir")
    return str(path)


def _read(checkpoint: str, subcommand: str) -> tuple[dict[str, Any], int]:
    """The options and the step of a checkpoint; says how old it is."""
    try:
        stored = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        options, step = dict(stored["hyper_parameters"]), int(stored["global_step"])
        identity_by_options(options)
    except Exception as error:  # zip, pickle, file system and missing keys have no common class
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot read checkpoint {checkpoint} ({reason}): remove it, or give another ckpt_path"
        ) from error
    cut_off = Path(checkpoint).with_name(f".{Path(checkpoint).name}.unfinished").exists()
    rank_zero_info(
        f"{'Going on from' if subcommand == 'fit' else 'Using'} {checkpoint}: step {step:,}, written "
        f"{age(time.time() - Path(checkpoint).stat().st_mtime)} ago"
        + (" (a later one was cut off while it was written, and is left out)" if cut_off else "")
    )
    return options, step


def run(command_line: type[CommandLine], args: Sequence[str] | None) -> int:
    """Parse, run and report in one line what the user has to mend."""
    sys.path.insert(0, os.getcwd())  # for a weighting from the user's own file
    _quieten()
    try:
        command_line(
            FineTuner,
            ChatDataModule,
            subclass_mode_data=True,
            parser_class=Parser,
            save_config_callback=SaveConfig,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults=_TRAINER,
            args=None if args is None else list(args),
        )
    except UserError as error:
        print(f"dft: error: {error}", file=sys.stderr)
        return 2
    return 0


def _quieten() -> None:
    """Leave out what Lightning says that the user of `dft` can do nothing about."""
    for message in (
        "LightningCLI's args parameter",
        ".*LeafSpec",
        ".*GPU available but not used",
        ".*does not have many workers",
    ):
        warnings.filterwarnings("ignore", message)
    tips = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    tips.addFilter(
        lambda record: "litlogger" not in record.getMessage() and "estimate number of" not in record.getMessage()
    )


def main(args: Sequence[str] | None = None) -> int:
    """Run `dft` with arguments; 2 where the user's input cannot be used."""
    return run(CommandLine, args)
