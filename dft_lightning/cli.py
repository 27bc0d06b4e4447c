"""`dft fit | validate | test | predict`: one LightningCLI around `FineTuner`, and the folder that holds a run.

Everything of a run is in `run_dir`: the configuration as run, TensorBoard's events, checkpoints, exports, predictions.
Starting the same command again goes on there.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import lightning.pytorch as pl
from lightning.fabric.connector import _convert_precision_to_unified_args
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from dft_lightning.callbacks import (
    Checkpoints,
    Environment,
    Export,
    Preemption,
    Progress,
    RollCall,
    RunSummary,
    Throughput,
    TokenProbabilities,
    TokenScores,
)
from dft_lightning.callbacks.checkpoints import checkpoint_folder
from dft_lightning.callbacks.finished import Finished, finished
from dft_lightning.callbacks.lightnings import fit_callbacks, has_progress_bar, options_for, write_enums
from dft_lightning.checkpointing import skeleton
from dft_lightning.checkpointing.lock import RunLock
from dft_lightning.config_check import refuse_unreadable
from dft_lightning.config_file import SaveConfig
from dft_lightning.data import ChatDataModule
from dft_lightning.disk import quiet_threads, reported
from dft_lightning.errors import UserError, printable
from dft_lightning.events import EventLogger, escape_logs
from dft_lightning.module import FineTuner
from dft_lightning.optimization import PAPERS_ADAMW
from dft_lightning.optimizer_options import with_own_options
from dft_lightning.parser import Parser
from dft_lightning.precision import refuse_precision, refuse_precision_name
from dft_lightning.quiet import quieten
from dft_lightning.refusals import refuse_combinations
from dft_lightning.rendezvous import meet_anew
from dft_lightning.restarts import is_started_again
from dft_lightning.resume import CHECKPOINT_KEY, Change, identity_by_options, refuse
from dft_lightning.run_folder import find_checkpoint, read_checkpoint, refuse_own, set_aside
from dft_lightning.run_marker import Claim, check
from dft_lightning.seeds import data_seed, drawn, resumed
from dft_lightning.sharding import FSDP2Strategy
from dft_lightning.signals import NOTICE, Preempted, exit_code
from dft_lightning.trainer_names import refuse_names
from dft_lightning.weighting.plugins import load_plugins

#: Where we differ from Lightning, whose default is 1,000 epochs.
_TRAINER = {
    "max_epochs": 1,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}


class CommandLine(LightningCLI):
    """LightningCLI with a run folder, callbacks that are always there, and options that win over a checkpoint's."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our own options, beside `model`, `data` and `trainer`."""
        parser.add_argument(
            "--run_dir",
            type=str,
            default="runs/default",
            help="Folder of the run: config.yaml, environment.json, tensorboard/, checkpoints/, export/, predictions/. "
            "The same command resumes there. A folder with files of others is refused.",
        )
        parser.add_argument(
            "--overwrite",
            type=bool,
            default=False,
            help="Start a fit from scratch: what an earlier run wrote in run_dir is removed when the training begins; "
            "files of others stay.",
        )
        parser.add_argument(
            "--allow_changes",
            type=list[Change],
            default=[],
            help="What may differ from the run whose checkpoint is gone on with, e.g. '[weighting]'.",
        )
        adamw = PAPERS_ADAMW | {"betas": list(PAPERS_ADAMW["betas"])}
        parser.set_defaults({"model.optimizer": {"class_path": "torch.optim.AdamW", "init_args": adamw}})
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_lightning_class_args(TokenProbabilities, "token_probabilities")
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(Export, "export")
        parser.add_lightning_class_args(RollCall, "roll_call")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Also draw a seed, where one is to be drawn."""
        Parser.root = parser
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        self._seed_asked = config.seed_everything
        config.seed_everything = drawn(self._seed_asked)

    def _seeds_of_checkpoint(self, config: Any) -> None:
        """What was drawn by a seed when the run began is drawn by it still."""
        facts = skeleton(Path(config.ckpt_path)).get(CHECKPOINT_KEY, {})
        config.seed_everything = resumed(self._seed_asked, config.seed_everything, facts)
        options = config.data.get("init_args", {})
        if "seed" in options:
            options["seed"] = data_seed(options["seed"], facts)

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
        refuse_names(config.trainer)
        refuse_precision_name(self._precision, config.trainer.accelerator)
        asked, fit = config.get("ckpt_path"), self.subcommand == "fit"
        if self.subcommand in ("fit", "predict"):
            check(self.run_dir)
        if fit and is_started_again(self.run_dir):
            config.overwrite = False
            asked = "last" if find_checkpoint(self.run_dir, None, "fit") else asked
        anew = fit and config.overwrite and asked in (None, "last")
        config.ckpt_path = None if anew else find_checkpoint(self.run_dir, asked, self.subcommand)
        if fit and config.overwrite:
            refuse_own(config.ckpt_path, self.run_dir)
        if config.ckpt_path is not None:
            self._stored, self._step = read_checkpoint(config.ckpt_path, self.subcommand)
            self._seeds_of_checkpoint(config)
        self._resumes_own = fit and config.ckpt_path == str(checkpoint_folder(self.run_dir) / "last.ckpt")
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
        sharded = isinstance(getattr(self.trainer, "strategy", None), FSDP2Strategy)
        fit_callbacks(self._get(self.config_init, "trainer")["callbacks"], sharded)
        if self.trainer is not None:
            training = self.subcommand == "fit"
            refuse_combinations(self.model, self.trainer, self.datamodule, training=training)
        _ = self.model.adapter_folder  # what model_name stands for is read here, before anything heavy
        refuse_precision(self.model, self._precision)
        if not self._stored:
            return
        now = identity_by_options(self.model.hparams)
        self.model.allow_changes = frozenset(self._get(self.config, "allow_changes"))
        if self.subcommand != "fit":  # another weighting may look at the model, but its tensors have to fit
            now = {"lora": now["lora"]}
        refuse(identity_by_options(self._stored), now, self.model.allow_changes)
        if self._resumes_own and not self.model.allow_changes and not getattr(self.trainer, "fast_dev_run", False):
            done = finished(self.run_dir, self._step, self._options)
            if done is not None:
                raise NothingToDo(done)

    @property
    def _precision(self) -> str:
        """`trainer.precision`, in full."""
        given = self.config[self.subcommand].trainer.precision
        return str(_convert_precision_to_unified_args(given) or "32-true")

    def before_fit(self) -> None:
        """With `--overwrite`, move an earlier run out of the way; it is removed when this one begins to train."""
        if not self.trainer.is_global_zero or getattr(self.trainer, "fast_dev_run", False):
            return
        self.lock.take(self.run_dir)
        self.claim.take(self.run_dir)
        if self.config.fit.overwrite:
            set_aside(self.run_dir)

    def before_predict(self) -> None:
        """The folder's marker is written first."""
        if self.trainer.is_global_zero:
            self.claim.take(self.run_dir)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer, logging into the run's folder."""
        given = self._get(self.config_init, "trainer")
        fitting: list[pl.Callback] = [RunSummary(), Environment(), Preemption(), Finished(self._options)]
        own: list[pl.Callback] = [TokenScores()] if self.subcommand == "predict" else fitting
        if given["logger"] in (None, True):
            kwargs["logger"] = self._logger() if self.subcommand == "fit" else False
        if given["callbacks"] is not None:
            own += given["callbacks"] if isinstance(given["callbacks"], list) else [given["callbacks"]]
            kwargs |= options_for(given["callbacks"])
        if given["enable_progress_bar"] is not False and not has_progress_bar(own):
            own.append(Progress())
        trainer = super().instantiate_trainer(default_root_dir=str(self.run_dir), callbacks=own, **kwargs)
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        # progress shows what the others log, and the configuration is there for those that look at it
        callbacks.sort(key=lambda callback: isinstance(callback, Progress) - isinstance(callback, SaveConfig))
        return trainer

    @property
    def _options(self) -> dict[str, str]:
        """The options of the command by their full names, without those that say how to start it."""
        given = vars(self.config[self.subcommand].as_flat())
        how = ("overwrite", "ckpt_path", "allow_changes", "config")
        return {name: str(value) for name, value in given.items() if name not in how}

    def _logger(self) -> EventLogger:
        """TensorBoard's events, without those of a run that was not gone on with, or later than the checkpoint."""
        later: Any = {"purge_step": self._step + 1 if self._stored else 0}
        return EventLogger(str(self.run_dir), name="tensorboard", version="", default_hp_metric=False, **later)

    lock = RunLock()
    claim = Claim()
    _stored: Mapping[str, Any] = MappingProxyType({})
    _step = 0
    _resumes_own = False


class NothingToDo(SystemExit):
    """The run is finished."""

    def __init__(self, why: str) -> None:
        super().__init__(0)
        self.why = why


class InsteadOfTraining(CommandLine):
    """Reads the options of `dft fit`, and does something else in its place: no checkpoint, and no trainer."""

    def before_instantiate_classes(self) -> None:
        """No checkpoint is looked for."""
        refuse_names(self.config[self.subcommand].trainer)

    def instantiate_trainer(self, **_: Any) -> pl.Trainer:
        """None: a trainer would ask for the accelerator that it names."""
        return cast(pl.Trainer, None)


def _root(error: BaseException) -> BaseException:
    """Where a chain of errors began: jsonargparse wraps a constructor's error in some of its own."""
    while (earlier := error.__cause__ or error.__context__) is not None and isinstance(earlier, ValueError):
        if isinstance(error, UserError):  # it says more than what it was made of
            break
        error = earlier
    return error


def run(command_line: type[CommandLine], args: Sequence[str] | None) -> int:
    """Parse, run and report in one line what the user has to mend."""
    sys.path.insert(0, os.getcwd())  # for a weighting from the user's own file
    quieten()
    quiet_threads()
    escape_logs()
    load_plugins()
    write_enums()
    meet_anew()
    try:
        words = [*(sys.argv[1:] if args is None else args)]
        refuse_unreadable(words)
        given = with_own_options(_with_settings_of_fsdp2(words))
        Parser.given = given
        command_line(
            FineTuner,
            ChatDataModule,
            subclass_mode_data=True,
            parser_class=Parser,
            save_config_callback=SaveConfig,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults=_TRAINER,
            args=given,
        )
    except UserError as error:
        print(f"dft: error: {error}", file=sys.stderr)
        # a signal can break off what then looks like a wrong option
        return 2 if NOTICE.received is None else exit_code(NOTICE.received)
    except Exception as error:
        if os.environ.get("DFT_TRACEBACK") or (line := _line_of(error)) is None:
            raise
        print(f"dft: error: {line}", file=sys.stderr)
        return 2
    except NothingToDo as done:
        if (rank_zero_only.rank or 0) == 0:  # type: ignore[attr-defined]
            print(printable(done.why))
        return 0
    except Preempted as leaving:
        if not NOTICE.is_kept:  # else the first rank has said it
            print(f"dft: {leaving.why}: start the same command again", file=sys.stderr)
        return int(cast(int, leaving.code))
    finally:
        command_line.claim.release()
        command_line.lock.release()
    return 0


def _line_of(error: Exception) -> str | None:
    """One line for wrong options that Lightning finds, and for what the file system refuses; else None."""
    if isinstance(error, MisconfigurationException):
        return printable(" ".join(str(error).split()))
    found = reported(error)
    return None if found is None else str(found)


#: What the strategy's short name stands for: its class, whose settings are merged with those of configuration files.
_FSDP2 = json.dumps({"class_path": "dft_lightning.sharding.FSDP2Strategy"})


def _with_settings_of_fsdp2(args: list[str]) -> list[str]:
    """A strategy's short name has no settings, and would replace those of a configuration file; its class has them."""
    found = [f"--trainer.strategy={_FSDP2}" if word == "--trainer.strategy=fsdp2" else word for word in args]
    for place in range(1, len(found)):
        if found[place - 1 : place + 1] == ["--trainer.strategy", "fsdp2"]:
            found[place] = _FSDP2
    return found


def main(args: Sequence[str] | None = None) -> int:
    """Run `dft` with arguments; 2 where the user's input cannot be used, 85 where a fit wants to be started again."""
    with NOTICE.watching() if "fit" in (sys.argv[1:] if args is None else args) else nullcontext():
        return run(CommandLine, args)
