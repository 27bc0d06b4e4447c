"""At the end of training, the model as a folder that transformers loads."""

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dft_lightning.callbacks.checkpoints import checkpoint_folder
from dft_lightning.errors import UserError
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
        best = checkpoint_folder(trainer.default_root_dir) / "best.ckpt"
        if self.which == "best" and not best.exists():
            rank_zero_warn(f"export.which is 'best', but there is no {best} (no validation?): exporting the last state")
        if self.which == "best" and best.exists():
            model = _of_checkpoint(module, best) if trainer.is_global_zero else None
        else:
            model = _of_the_run(module)
        if trainer.is_global_zero:
            self._write(trainer, module, model)

    def _write(self, trainer: pl.Trainer, module: "FineTuner", model: Any) -> None:
        base = model.get_base_model() if module.lora is not None else model
        add_stops(base.generation_config, stop_ids(module.tokenizer, self.stop_tokens))
        folder = Path(trainer.default_root_dir) / "export"
        write_model(model, module.tokenizer, folder)
        rank_zero_info(f"Exported the {self.which} model to {folder}")
        if self.merge_lora and module.lora is not None:
            write_model(copy.deepcopy(model).merge_and_unload(), module.tokenizer, folder.with_name("export-merged"))


def stop_ids(tokenizer: Any, stop_tokens: list[str]) -> list[int]:
    """The ids of these tokens.

    Raises:
        UserError: one of them is no token of the tokenizer.
    """
    known = tokenizer.get_vocab()
    if unknown := [token for token in stop_tokens if token not in known]:
        raise UserError(f"export.stop_tokens: {unknown} are no tokens of the tokenizer")
    return [known[token] for token in stop_tokens]


def add_stops(generation: Any, stops: list[int]) -> None:
    """Let generation end at these tokens too."""
    ends = generation.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    ends += [stop for stop in dict.fromkeys(stops) if stop not in ends]
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends or None


def write_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """`save_pretrained` of model and tokenizer into a folder that is either whole or not there."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def _of_the_run(module: "FineTuner") -> Any:
    """The live model; a whole copy of it, on the first rank, where its weights are dealt over the ranks."""
    strategy = module.trainer.strategy
    if not isinstance(strategy, FSDP2Strategy):
        return module.model
    state = strategy.lightning_module_state_dict()
    return _with_weights(module, state) if module.trainer.is_global_zero else None


def _of_checkpoint(module: "FineTuner", checkpoint: Path) -> Any:
    """A copy of the model with the weights of a checkpoint."""
    return _with_weights(module, torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["state_dict"])


def _with_weights(module: "FineTuner", state: dict[str, Any]) -> Any:
    model, prefix = module.initial_model(), "network.model."
    model.load_state_dict({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})
    return model
