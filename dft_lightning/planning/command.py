"""`dft plan`: what a fit with the same options will need, before any GPU is touched and any weight is loaded."""

import json
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from lightning.fabric.connector import _convert_precision_to_unified_args

from dft_lightning.adapters import refuse_sharded
from dft_lightning.callbacks.lightnings import averages_on_device, fit_callbacks
from dft_lightning.cli import InsteadOfTraining, run
from dft_lightning.data import ChatDataModule
from dft_lightning.errors import UserError
from dft_lightning.loading import load_config
from dft_lightning.planning.dealt import Dealing, strategy_of
from dft_lightning.planning.memory import GIB
from dft_lightning.planning.peaks import Device, find_device
from dft_lightning.planning.plan import Options, Place, Plan, make_plan
from dft_lightning.planning.report import as_json, print_plan
from dft_lightning.sharding.initial import refuse_quantized


class PlanCommand(InsteadOfTraining):
    """Reads the options of `dft fit`, and prints a plan in place of training."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Our own options, beside those of a fit."""
        super().add_arguments_to_parser(parser)
        share = "Share of the device's peak that is reached."
        parser.add_argument("--utilisation", type=float, default=0.4, help=share)
        parser.add_argument("--device", type=str | None, help="h100, a100, …, cpu; by default what is here.")
        parser.add_argument("--memory_gib", type=float | None, help="Memory of a device.")
        parser.add_argument("--json", action="store_true", help="Print the plan as JSON.")

    def _run_subcommand(self, subcommand: str) -> None:
        config = self.config[subcommand]
        plan = self.plan(config)
        if config.json:
            print(json.dumps(as_json(plan), indent=1))
        else:
            print_plan(plan)

    def plan(self, config: Any) -> Plan:
        """What the options come to."""
        if not 0 < config.utilisation <= 1:
            raise UserError(f"--utilisation is {config.utilisation}; expected a share of the peak, above 0 and up to 1")
        trainer = config.trainer
        if config.memory_gib is not None and not config.memory_gib > 0:
            raise UserError(f"--memory_gib is {config.memory_gib}; expected GiB of a device, more than 0")
        precision = _convert_precision_to_unified_args(trainer.precision) or "32-true"
        strategy, callbacks = (
            strategy_of(trainer.strategy, precision),
            self._get(self.config_init, "trainer")["callbacks"],
        )
        fit_callbacks(callbacks, sharded=strategy is not None)
        if strategy is not None:
            refuse_sharded(self.model.lora)
            refuse_quantized(self.model.source)
        place = _place(config.device, config.memory_gib, trainer, config.throughput.peak_flops)
        options = Options(
            precision=precision,
            limits=SimpleNamespace(
                world_size=place.devices,
                global_rank=0,
                max_epochs=trainer.max_epochs,
                max_steps=trainer.max_steps,
                state=SimpleNamespace(fn="fit"),
            ),
            utilisation=config.utilisation,
            dealing=None if strategy is None else Dealing.by(strategy, place.devices),
            averaged=averages_on_device(callbacks, place.cuda),
        )
        model_config = load_config(self.model.base_source)
        return make_plan(self.model, cast(ChatDataModule, self.datamodule), model_config, place, options)


def _place(name: str | None, memory_gib: float | None, trainer: Any, peak: float | None) -> Place:
    """The devices: those named, or those that are here, or an H100."""
    found = torch.cuda.is_available()
    if name is None and trainer.accelerator != "cpu" and found:
        name = torch.cuda.get_device_name(0)
        memory_gib = memory_gib or torch.cuda.get_device_properties(0).total_memory / GIB
    elif name is None:
        name = "cpu" if trainer.accelerator == "cpu" else "H100"
    devices = _count(trainer.devices, here=torch.cuda.device_count() if found else 1) * trainer.num_nodes
    if name == "cpu":
        here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Place("cpu", None, False, devices, int((memory_gib * GIB) if memory_gib else here), peak)
    known: Device | None = find_device(name)
    if known is None and (memory_gib is None or peak is None):
        raise UserError(f"--device {name!r} is not known: give --memory_gib and --throughput.peak_flops with it")
    gib = memory_gib or (0.0 if known is None else known.gib)
    return Place(name if known is None else known.name, known, True, devices, int(gib * GIB), peak)


def _count(devices: Any, here: int) -> int:
    """How many devices a node has, by `trainer.devices`."""
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    if text in ("auto", "-1"):
        return here
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"trainer.devices is {text!r}; expected a number of devices, a list of them, or auto")
    return int(text)


def main(args: Sequence[str] | None = None) -> int:
    """Print the plan; 2 where the user's input cannot be used."""
    return run(PlanCommand, ["fit", *(args or [])])
