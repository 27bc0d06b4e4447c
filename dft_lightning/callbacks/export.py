"""At the end of training, the model as a folder that transformers loads."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dft_lightning.callbacks.checkpoints import checkpoint_folder
from dft_lightning.exporting.card import card, is_metric, logged_metrics
from dft_lightning.exporting.folder import add_stops, stop_ids, write_model
from dft_lightning.exporting.stored import Stored, read_stored, weights_of
from dft_lightning.resume import facts_of
from dft_lightning.sharding import FSDP2Strategy

if TYPE_CHECKING:
    from dft_lightning.module import FineTuner


class Export(Callback):
    """Writes `run_dir/export`: model, tokenizer, generation config; with LoRA the adapter, and a merged model if asked.

    Args:
        enabled: whether to export at all.
        which: the last state of the training, or the best by the checkpoints' monitor.
        merge_lora: also write `run_dir/export-merged`, a model without adapter.
        stop_tokens: tokens that end an answer, added to those in the exported generation config.
    """

    def __init__(
        self,
        enabled: bool = True,
        which: Literal["last", "best"] = "last",
        merge_lora: bool = False,
        stop_tokens: list[str] | None = None,
    ) -> None:
        self.enabled, self.which, self.merge_lora = enabled, which, merge_lora
        self.stop_tokens = stop_tokens or []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse unknown stop tokens before the training, not after it."""
        if self.enabled:
            stop_ids(cast("FineTuner", pl_module).tokenizer, self.stop_tokens)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the folders, on the first rank; all ranks have a part in it where the model is sharded."""
        if not self.enabled or getattr(trainer, "fast_dev_run", False):
            return
        module = cast("FineTuner", pl_module)
        stored = _best(trainer) if self.which == "best" else None
        gathered = _gathered(module) if stored is None else None
        if trainer.is_global_zero:
            self._write(module, stored, gathered)

    def _write(self, module: "FineTuner", stored: Stored | None, gathered: Stored | None) -> None:
        source = stored or gathered
        model = module.model if source is None else source.model()
        base = model.get_base_model() if module.lora is not None else model
        add_stops(base.generation_config, stop_ids(module.tokenizer, self.stop_tokens))
        folder = Path(module.trainer.default_root_dir) / "export"
        _write(module, stored, model, folder)
        rank_zero_info(f"Exported the {self.which} model to {folder}")
        if self.merge_lora and module.lora is not None:
            merged = copy.deepcopy(model).merge_and_unload()
            _write(module, stored, merged, folder.with_name("export-merged"), is_merged=True)


def _best(trainer: pl.Trainer) -> Stored | None:
    """The best state so far; None where there is none."""
    checkpoint = checkpoint_folder(trainer.default_root_dir) / "best.ckpt"
    if checkpoint.exists():
        return read_stored(checkpoint)
    rank_zero_warn(f"export.which is 'best', but there is no {checkpoint} (no validation?): exporting the last state")
    return None


def _gathered(module: "FineTuner") -> Stored | None:
    """The present state, whole on the first rank, where its weights are dealt over the ranks, which all have to ask."""
    strategy = module.trainer.strategy
    if not isinstance(strategy, FSDP2Strategy):
        return None
    weights = weights_of(strategy.whole_state_dict())
    return Stored(dict(module.hparams), weights, module.trainer.global_step, facts_of(module))


def _write(module: "FineTuner", stored: Stored | None, model: Any, folder: Path, is_merged: bool = False) -> None:
    """One of the folders, with the card of a checkpoint, or of what the training has come to."""
    trainer = module.trainer
    run_dir = Path(trainer.default_root_dir)
    if stored is None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if is_metric(name)}
        text = card(module.hparams, facts_of(module), trainer.global_step, metrics, run_dir, is_merged)
    else:
        text = card(stored.options, stored.facts, stored.step, logged_metrics(run_dir, stored.step), run_dir, is_merged)
    write_model(model, module.tokenizer, folder, text)
