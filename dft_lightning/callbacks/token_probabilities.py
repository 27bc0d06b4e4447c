"""What training does to the probabilities of single tokens: the DFT paper's figure 2, live, and what lies behind it."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from dft_lightning.callbacks.looks.initial import InitialDistributions
from dft_lightning.callbacks.looks.probe import Probe
from dft_lightning.callbacks.looks.report import Report, Seen, Start
from dft_lightning.callbacks.looks.tally import ENTROPY_EDGES, P_EDGES, P_LABELS, Tally, histogram
from dft_lightning.callbacks.looks.writing import LAYOUT
from dft_lightning.callbacks.throughput import not_training
from dft_lightning.errors import UserError
from dft_lightning.token_classes import class_of, token_texts
from dft_lightning.weighting.spec import label

if TYPE_CHECKING:
    from dft_lightning.data import ChatDataModule
    from dft_lightning.module import FineTuner

__all__ = ["ENTROPY_EDGES", "P_EDGES", "P_LABELS", "Tally", "TokenProbabilities", "histogram"]

_WANTED = frozenset({"entropy", "rank", "top_p"})


class TokenProbabilities(Callback):
    """Logs the distribution of token probabilities, weights and entropies on a fixed probe set and on training tokens.

    Beside it: where the weight goes (by p, by token class), loss and p by position, the calibration of the likeliest
    token, the KL from the initial model, which tokens are pushed up and down most, and pictures of all that.

    Args:
        every_n_steps: optimizer steps between two reports (the end is always one); 0 switches them off.
        probe_rows: rows of the probe set, spread evenly over the validation rows (or the training rows).
        figure: draw the distribution before and now as an image, with each report.
        pictures_every: reports between two that have the other images too, which cost more; the first and the last
            always do. 0, or no `figure`: none.
        kl_tokens: tokens of the probe at which the initial model's distribution is kept, in files beside TensorBoard's
            (4 bytes a token and word of the vocabulary: 78 MB for 128 and 152k), for the KL from it; 0 switches it off.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        probe_rows: int = 16,
        figure: bool = True,
        pictures_every: int = 5,
        kl_tokens: int = 128,
    ) -> None:
        if every_n_steps < 0 or probe_rows < 1:
            raise UserError("token_probabilities: expected every_n_steps >= 0 and probe_rows >= 1")
        if pictures_every < 0 or kl_tokens < 0:
            raise UserError("token_probabilities: expected pictures_every >= 0 and kl_tokens >= 0")
        self.every_n_steps, self.probe_rows, self.figure = every_n_steps, probe_rows, figure
        self.pictures_every, self.kl_tokens = pictures_every, kl_tokens
        self.start: Start | None = None
        self._initial: InitialDistributions | None = None
        self._trained: Tally | None = None
        self._reported = 0

    @property
    def before(self) -> list[float] | None:
        """Per cent of the probe's tokens in each bin of p before the first step."""
        return None if self.start is None else self.start.shares

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the probe set, and look at it before the first step."""
        if not self.every_n_steps:
            return
        module = cast("FineTuner", pl_module)
        self._probe = self._chosen(cast("ChatDataModule", trainer.datamodule))  # type: ignore[attr-defined]
        self._reported = trainer.global_step  # a checkpoint's step was reported before it was written
        assert module.network is not None
        size = module.network.base.get_output_embeddings().weight.shape[0]
        self._special = torch.tensor(module.tokenizer.all_special_ids, device=module.device)
        self._classes = class_of(module.tokenizer, size).to(module.device)
        texts = token_texts(module.tokenizer)
        self._texts = texts + [""] * (size - len(texts))
        if isinstance(trainer.logger, TensorBoardLogger) and self.kl_tokens:
            folder = Path(trainer.logger.log_dir) / "probe"
            self._initial = InitialDistributions(folder, self._probe, self.kl_tokens)
        if self.start is not None and self.start.probe != self._probe.fingerprint:
            rank_zero_warn(f"the probe has other rows by now: what it is compared with is step {trainer.global_step}")
            self.start = None
        if self.start is None:
            self._report(trainer, module)

    def _chosen(self, data: "ChatDataModule") -> Probe:
        """A run that goes on keeps its rows."""
        stage = "train" if data.val_rows is None else "val"
        rows = data.rows_used(stage)  # others have no cached reference
        assert rows is not None
        known = None if self.start is None else rows.find(self.start.rows)
        evenly = np.unique(np.linspace(0, len(rows) - 1, min(self.probe_rows, len(rows))).astype(np.int64))
        chosen = rows.select(evenly if known is None else known)
        return Probe(chosen, list(data.scoring_loader(chosen, stage, workers=0)))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """In a step that is reported, have the loss compute the training tokens' statistics too."""
        if self.every_n_steps:
            due = self._due(trainer.global_step + 1, pl_module)
            cast("FineTuner", pl_module).wanted = _WANTED if due else frozenset()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Count the micro-batch's tokens; report after every so many steps."""
        module = cast("FineTuner", pl_module)
        if not self.every_n_steps or module.trained_on is None:
            return
        if module.wanted:  # a reported step: its tokens, with all statistics
            tally = Tally.of(module.trained_on, self._special, self._classes)
            self._trained = tally if self._trained is None else self._trained + tally
        if self._due(trainer.global_step, pl_module) and trainer.global_step != self._reported:
            self._reported = trainer.global_step
            self._report(trainer, module)

    def _due(self, step: int, pl_module: pl.LightningModule) -> bool:
        """Whether to report after this many steps: every so many, and at the end."""
        return step % self.every_n_steps == 0 or step == cast("FineTuner", pl_module).total_steps

    def _has_pictures(self, step: int, last: int) -> bool:
        if not self.figure or not self.pictures_every:
            return False
        first = self.start is not None and step == self.start.step
        return first or step == last or step % (self.every_n_steps * self.pictures_every) == 0

    def _report(self, trainer: pl.Trainer, module: "FineTuner") -> None:
        with not_training(trainer):
            self._compare(trainer, module)

    def _compare(self, trainer: pl.Trainer, module: "FineTuner") -> None:
        seen, step = self._look(trainer, module).together(trainer), trainer.global_step
        probe = self._probe
        self._trained = None
        writer = _writer(trainer)
        if self.start is None:
            if writer is not None:
                writer.add_custom_scalars(LAYOUT)
            self.start = Start(step, probe.sources, probe.fingerprint, seen.probe.shares(), seen.logp)
        if writer is None:
            return
        report = Report(writer, seen, self.start, probe, self._texts, label(module.weighting), step)
        report.numbers()
        if self.figure:
            report.figure()
        if self._has_pictures(step, module.total_steps):
            report.pictures()

    def _look(self, trainer: pl.Trainer, module: "FineTuner") -> Seen:
        """What this rank sees of its rows of the probe."""
        network, training = module.network, module.training
        assert network is not None
        watching = nullcontext() if self._initial is None else self._initial.watching(network, self.start is None)
        module.eval()
        with trainer.precision_plugin.forward_context(), watching:
            looked = module.score_together(self._probe.batches, _WANTED)
        module.train(training)
        tallies = [Tally.of(tokens, self._special, self._classes) for tokens in looked]
        return Seen(
            probe=sum(tallies[1:], tallies[0]),
            logp=self._probe.spread([tokens.logp for tokens in looked]),
            trained=self._trained,
            kl=None if self._initial is None else self._initial.found(),
        )

    def state_dict(self) -> dict[str, Any]:
        """What the probe looked like before the first step."""
        return {"before": None} if self.start is None else {"before": self.before, **vars(self.start)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep comparing with it."""
        if "logp" in state_dict:
            self.start = Start(**{name: value for name, value in state_dict.items() if name != "before"})


def _writer(trainer: pl.Trainer) -> Any:
    """TensorBoard's, on the first rank; else None."""
    logger = trainer.logger
    return logger.experiment if trainer.is_global_zero and isinstance(logger, TensorBoardLogger) else None
