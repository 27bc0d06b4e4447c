"""A callback that writes down what a fit of the command line does: `--trainer.callbacks+=gpu.recorder.Recorder`."""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

#: In the run's folder.
FILE = "record.json"


class Recorder(pl.Callback):
    """Losses, precisions, compiled graphs, loss scales and memory, step by step, into `record.json`."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before anything is loaded: what others have left behind is no memory of this run."""
        self.steps: list[dict[str, Any]] = []
        gc.collect()
        self.before = 0
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The scale of the losses, and the step, from which this fit begins."""
        self.initial_scale, self.seen = _scale(trainer), trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """After an optimizer step: what it logged, and in what precision its statistics are."""
        if trainer.global_step == self.seen:  # within an accumulation
            return
        self.seen = trainer.global_step
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        statistics = [value.dtype for value in pl_module.trained_on.tensors().values() if value.is_floating_point()]
        narrow = sum(torch.finfo(dtype).bits < 32 for dtype in statistics)
        skipped = pl_module.step.skipped.total
        step = {"logged": logged, "narrow": narrow, "statistics": len(statistics), "skipped": skipped}
        self.steps.append(step | {"scale": _scale(trainer), "graphs": _graphs()})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it all down."""
        peak = torch.cuda.max_memory_allocated() - self.before if torch.cuda.is_available() else None
        weights = sorted({str(parameter.dtype) for parameter in pl_module.parameters()})
        found = {"steps": self.steps, "initial_scale": self.initial_scale, "peak": peak, "weights": weights}
        (Path(trainer.default_root_dir) / FILE).write_text(json.dumps(found))


def _scale(trainer: pl.Trainer) -> float | None:
    """Of the losses, where a gradient scaler is in use."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else float(scaler.get_scale())


def _graphs() -> dict[str, int]:
    """How many graphs torch.compile has made so far, and how many breaks it has met."""
    if "torch._dynamo" not in sys.modules:
        return {"graphs": 0, "breaks": 0}
    from torch._dynamo.utils import counters

    return {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
