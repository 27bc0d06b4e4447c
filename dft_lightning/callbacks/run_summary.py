"""What a run is about to optimise, said before it starts."""

from typing import TYPE_CHECKING, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from dft_lightning import schedules
from dft_lightning.adapters import described
from dft_lightning.attention import implementation_of
from dft_lightning.averaging import averaging_in_words
from dft_lightning.callbacks.throughput import Throughput
from dft_lightning.data.packing import Packed
from dft_lightning.errors import lines_of, printable
from dft_lightning.optimizers import described as groups_of
from dft_lightning.precision import precision_of
from dft_lightning.quantization import numbers

if TYPE_CHECKING:
    from dft_lightning.data import ChatDataModule
    from dft_lightning.module import FineTuner

_NORMALIZE = {
    "tokens": "mean over the supervised tokens of the optimizer step",
    "sequences": "mean over the sequences of the optimizer step of each one's mean",
    "micro_batch": "mean over micro-batches of each one's mean (depends on the micro-batch size)",
}

_RECOMPUTED = {"none": "nothing", "selective": "all but products and attention", "full": "everything"}


class RunSummary(Callback):
    """Prints the objective, the data, the steps and the machine; the same text goes to TensorBoard."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print, on the first rank."""
        facts = run_facts(trainer, cast("FineTuner", pl_module))
        show(facts)
        if isinstance(trainer.logger, TensorBoardLogger):
            table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
            trainer.logger.experiment.add_text("run", f"| | |\n|---|---|\n{table}", trainer.global_step)


def run_facts(trainer: pl.Trainer, module: "FineTuner") -> dict[str, str]:
    """What this run optimises, on what, and where."""
    assert module.network is not None
    parameters = list(module.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = numbers(module)
    beside = "" if module.source.quantization is None else f", beside adapters in 4 bits ({module.source.quantization})"
    device = module.device.type
    weights, learnt = (_name(dtype) for dtype in (parameters[0].dtype, trained_dtype(module)))
    if module.lora is not None:
        beside = f"{beside}, adapters in {learnt}"
    facts = {
        "objective": f"−Σ sg(w)·log π(y), w by {module.weighting!r}",
        "normalised by": f"{module.normalize}: {_NORMALIZE[module.normalize]}",
        "model": f"{printable(module.source.name)}, {trained / 1e6:,.1f} M of {total / 1e6:,.1f} M parameters trained",
        "precision": f"{precision_of(trainer)}, weights in {weights}{beside}",
        "attention": _attention(module, cast("ChatDataModule", getattr(trainer, "datamodule", None))),
        "layers": f"{'compiled' if module.compile_layers else 'not compiled'}; recomputed in the backward pass: "
        + _RECOMPUTED[module.recomputation],
        "devices": f"{trainer.world_size} × {device}, {type(trainer.strategy).__name__}",
    }
    if module.lora is not None:
        facts["adapter"] = _adapter(module)
    facts |= _optimizer_facts(trainer, module)
    if hasattr(trainer, "datamodule") and trainer.datamodule is not None:
        facts |= _data_facts(cast("ChatDataModule", trainer.datamodule))
    if (rule := averaging_in_words(trainer)) is not None:
        facts["averaging"] = f"{rule}; validation, best.ckpt and export use the averaged weights"
    facts |= [("speed", one.said) for one in _callbacks(trainer) if isinstance(one, Throughput)]
    monitor, mode = module.weighting.monitor
    return facts | {
        "steps": f"{module.total_steps:,} (from step {trainer.global_step:,})",
        "best by": f"{'lowest' if mode == 'min' else 'highest'} {monitor}",
        "run folder": printable(trainer.default_root_dir),
    }


def trained_dtype(module: "FineTuner") -> torch.dtype:
    """The precision of the trained weights, as they are."""
    return next(parameter.dtype for parameter in module.parameters() if parameter.requires_grad)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _adapter(module: "FineTuner") -> str:
    """The settings of the adapters in force, and where they come from."""
    assert module.lora is not None
    origin = {"continue": "; trained further", "merge": "; new, on the model that another was merged into"}
    assert module.network is not None
    return f"{described(module.lora)}{origin.get(module.adapter or '', '')}; {module.network.adapted}"


def _optimizer_facts(trainer: pl.Trainer, module: "FineTuner") -> dict[str, str]:
    """The optimizer's groups as they are, the schedule, what is frozen by its name, and the seeds."""
    assert module.network is not None
    groups = groups_of(trainer.optimizers[0], module._settings)
    total, options = module.total_steps, module.lr_schedule_kwargs
    facts = {
        "optimizer": "\n".join(groups),
        "learning rate": schedules.described(module.lr_schedule, options, int(module.warmup_ratio * total), total),
    }
    if any(group.get("maximize") for group in module._settings):
        facts["optimizer"] += "\nmaximize: gradient ascent, away from what the data say"
    if module.freezing:
        model = module.network.model
        frozen = module.freezing.frozen(model)
        also = module.freezing.also_frozen(model)
        tied = f", tied: {', '.join(also)}" if also else ""
        facts["frozen"] = f"{sum(each.numel() for each in frozen):,} parameters in {len(frozen):,} tensors{tied}"
    own = getattr(getattr(trainer, "datamodule", None), "seed", module.seed)
    facts["seeds"] = f"{module.seed} (initialisation, dropout); {own} (subset, validation split, shuffle)"
    return facts


def _callbacks(trainer: pl.Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]  # set where Lightning starts


def _attention(module: "FineTuner", data: "ChatDataModule | None") -> str:
    assert module.network is not None
    name = implementation_of(module.network.decoder)
    if data is None or not data.is_packed:
        return name
    slow = ""
    if name in ("sdpa", "eager"):
        with module.trainer.precision_plugin.forward_context():
            better = "varlen" in module.network.packs_with()
        slow = "; varlen would not multiply a document with the others of its row" if better else ""
    return f"{name}, proved to keep packed sequences apart{slow}"


def _data_facts(data: "ChatDataModule") -> dict[str, str]:
    rows, sampler = data.train_rows, data.sampler()
    assert rows is not None
    shape, layout = sampler.geometry, sampler.layout
    kind = "sequences"
    if isinstance(layout, Packed):
        kind = f"rows of {layout.capacity:,} tokens" if layout.fill else f"row of at most {layout.capacity:,} tokens"
    used = sampler.share_used(fixed=data.fixed_shape)
    read, learnt = int(rows.lengths.sum()), int(rows.targets.sum())
    return {
        "data": f"{len(rows):,} rows an epoch, {learnt:,} supervised of {read:,} tokens",
        "step": f"{shape.global_batch_size} sequences = {shape.ranks} ranks × {sampler.micro_batches} micro-batches "
        f"of at most {shape.micro_batch_size} {kind}; {used:.1%} of their positions hold a token",
    }


@rank_zero_only
def show(facts: dict[str, str], title: str = "This run") -> None:
    """The facts as a table in the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, title=title, title_justify="left")
    for name, value in facts.items():
        table.add_row(name, Text(lines_of(value)))  # a name in it may look like rich's markup
    Console().print(table)
