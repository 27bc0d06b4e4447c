"""At the end of training, the model as a folder that transformers loads."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dft_lightning.adapters import merged
from dft_lightning.averaging import averaging_of
from dft_lightning.callbacks.checkpoints import checkpoint_folder
from dft_lightning.errors import UserError
from dft_lightning.exporting.card import card, is_metric, logged_metrics
from dft_lightning.exporting.folder import add_stops, stop_ids, write_model
from dft_lightning.exporting.stored import Stored, read_stored, weights_of
from dft_lightning.resume import facts_of
from dft_lightning.shapes import fleeting
from dft_lightning.sharding import FSDP2Strategy

if TYPE_CHECKING:
    from dft_lightning.module import FineTuner


class Export(Callback):
    """Writes `run_dir/export`: model, tokenizer, generation config; with LoRA the adapter, and a merged model if asked.

    Args:
        enabled: whether to export at all.
        which: the last state of the training, or the best by the checkpoints' monitor. Where a callback averages the
            weights (EMAWeightAveraging, …), both are averages; averaged is the last state, and refused without one.
        merge_lora: also write `run_dir/export-merged`, a model without adapter.
        stop_tokens: tokens that end an answer, added to those in the exported generation config.
    """

    def __init__(
        self,
        enabled: bool = True,
        which: Literal["last", "best", "averaged"] = "last",
        merge_lora: bool = False,
        stop_tokens: list[str] | None = None,
    ) -> None:
        self.enabled, self.which, self.merge_lora = enabled, which, merge_lora
        self.stop_tokens = stop_tokens or []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse unknown stop tokens before the training, not after it."""
        if self.enabled and self.which == "averaged" and averaging_of(trainer) is None:
            raise UserError(
                "export.which is 'averaged', but no callback averages the weights: add one, as in "
                "--trainer.callbacks+=EMAWeightAveraging, or leave export.which out"
            )
        if self.enabled:
            stop_ids(cast("FineTuner", pl_module).tokenizer, self.stop_tokens)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the folders, on the first rank; all ranks have a part in it where the model is sharded."""
        if not self.enabled or getattr(trainer, "fast_dev_run", False):
            return
        module = cast("FineTuner", pl_module)
        is_best = self.which == "best" and trainer.strategy.broadcast(_has_best(trainer))
        gathered = None if is_best else _gathered(module)
        if trainer.is_global_zero:
            self._write(module, read_stored(_best(trainer)) if is_best else None, gathered)
        trainer.strategy.barrier()  # launchers end the others some time after the first rank that ends

    def _write(self, module: "FineTuner", stored: Stored | None, gathered: Stored | None) -> None:
        source = stored or gathered
        model = module.model if source is None else source.model()
        self._add_stops(module, model.get_base_model() if module.lora is not None else model)
        folder = Path(module.trainer.default_root_dir) / "export"
        _write(module, stored, model, folder)
        rank_zero_info(f"Exported the {self.which} model to {folder}")
        if self.merge_lora and module.lora is not None:
            full = merged(copy.deepcopy(model, fleeting(model))) if source is None else source.merged()
            self._add_stops(module, full)
            _write(module, stored, full, folder.with_name("export-merged"), is_merged=True)

    def _add_stops(self, module: "FineTuner", model: Any) -> None:
        add_stops(model.generation_config, stop_ids(module.tokenizer, self.stop_tokens))


def _best(trainer: pl.Trainer) -> Path:
    return checkpoint_folder(trainer.default_root_dir) / "best.ckpt"


def _has_best(trainer: pl.Trainer) -> bool:
    """Whether there is a best state; says so where there is none."""
    if not _best(trainer).exists():
        rank_zero_warn(
            f"export.which is 'best', but there is no {_best(trainer)} (no validation?): exporting the last state"
        )
    return _best(trainer).exists()


def _gathered(module: "FineTuner") -> Stored | None:
    """The present state, whole on the first rank, where its weights are dealt over the ranks, which all have to ask.

    And where a base is quantized, into whose weights nothing can be merged.
    """
    strategy = module.trainer.strategy
    if isinstance(strategy, FSDP2Strategy):
        state = strategy.whole_state_dict()
    elif module.source.quantization is not None:
        state = strategy.lightning_module_state_dict()
    else:
        return None
    return Stored(dict(module.hparams), weights_of(state), module.trainer.global_step, facts_of(module))


def _write(module: "FineTuner", stored: Stored | None, model: Any, folder: Path, is_merged: bool = False) -> None:
    """One of the folders, with the card of a checkpoint, or of what the training has come to."""
    trainer = module.trainer
    run_dir = Path(trainer.default_root_dir)
    if stored is None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if is_metric(name)}
        text = card(module.hparams, facts_of(module), trainer.global_step, metrics, run_dir, is_merged)
    else:
        text = card(stored.options, stored.facts, stored.step, logged_metrics(run_dir, stored.step), run_dir, is_merged)
    with_base = module.adapter == "merge" and module.lora is not None and not is_merged
    write_model(model, module.tokenizer, folder, text, with_base=with_base, run_dir=run_dir)
