"""What training does to the probabilities of single tokens: the DFT paper's figure 2, live."""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from dft_lightning.callbacks.throughput import not_training
from dft_lightning.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dft_lightning.data import ChatDataModule
    from dft_lightning.data.batch import Batch
    from dft_lightning.module import FineTuner
    from dft_lightning.weighting import TokenStats

#: Bins of arXiv 2508.05629, figure 2.
P_EDGES = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
P_LABELS = ("<1e-4", "<1e-3", "<.01", *(f"<.{tenth}" for tenth in range(1, 10)), "≤1")
#: Weights of all published weightings lie here; what is larger counts to the last bin.
WEIGHT_EDGES = (*P_EDGES[:-1], 1.0, 1.1, 1.5, 2.0, 4.0, 8.0, 16.0)
#: Nats; a uniform distribution over 150,000 tokens has 11.9.
ENTROPY_EDGES = tuple(0.5 * step for step in range(25))

_SUMS = ("tokens", "nll", "p", "top1", "weight", "weight_squared", "entropy", "stop_p", "stops")


def histogram(values: Tensor, edges: tuple[float, ...]) -> Tensor:
    """Counts (bins,) in float64 of `values` (N,) in [edge, next edge); values outside count to the outermost bins."""
    inner = torch.tensor(edges[1:-1], dtype=values.dtype, device=values.device)
    bins = torch.bucketize(values, inner, right=True)
    return torch.bincount(bins, minlength=len(edges) - 1).to(torch.float64)


def is_stop(tokens: "TokenStats", special: Tensor) -> Tensor:
    """(N,) whether a token ends its response: the last supervised one of its sequence, and a special token."""
    last = torch.ones_like(tokens.sequence, dtype=torch.bool)
    last[:-1] = tokens.sequence[1:] != tokens.sequence[:-1]
    return last & torch.isin(tokens.target, special)


@dataclass
class Tally:
    """Counts and sums over tokens that add up over micro-batches and ranks."""

    p: Tensor
    weight: Tensor
    entropy: Tensor
    sums: Tensor

    @staticmethod
    def of(tokens: "TokenStats", special: Tensor) -> "Tally":
        """From the tokens of one micro-batch; entropy and rank only where they were computed."""
        weight, p = tokens.need("weight").double(), tokens.p.double()
        stop = is_stop(tokens, special)
        zero = torch.zeros_like(p)
        entropy = zero if tokens.entropy is None else tokens.entropy.double()
        top1 = zero if tokens.rank is None else (tokens.rank == 0).double()
        columns = [
            torch.ones_like(p),
            -tokens.logp.double(),
            p,
            top1,
            weight,
            weight.square(),
            entropy,
            p * stop,
            stop.double(),
        ]
        return Tally(
            p=histogram(p, P_EDGES),
            weight=histogram(weight, WEIGHT_EDGES),
            entropy=histogram(entropy if tokens.entropy is not None else entropy[:0], ENTROPY_EDGES),
            sums=torch.stack([column.sum() for column in columns]),
        )

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def reduced(self, trainer: pl.Trainer) -> "Tally":
        """Summed over all ranks, on the CPU: one message."""
        parts = list(vars(self).values())
        whole = cast(Tensor, trainer.strategy.reduce(torch.cat(parts), reduce_op="sum")).cpu()
        return Tally(*torch.split(whole, [len(part) for part in parts]))

    def scalars(self) -> dict[str, float]:
        """Means over the tokens."""
        total = dict(zip(_SUMS, self.sums.tolist(), strict=True))
        count = max(total["tokens"], 1.0)
        means = {f"{name}_mean": total[name] / count for name in ("p", "weight", "entropy")}
        means |= {"nll": total["nll"] / count, "top1": total["top1"] / count}
        means["effective_sample_size"] = total["weight"] ** 2 / max(count * total["weight_squared"], 1e-300)
        if total["stops"]:
            means["p_stop"] = total["stop_p"] / total["stops"]
        return means

    def shares(self) -> list[float]:
        """Per cent of the tokens in each bin of p."""
        return (100.0 * self.p / self.p.sum().clamp(min=1)).tolist()


class TokenProbabilities(Callback):
    """Logs the distribution of token probabilities, weights and entropies on a fixed probe set and on training tokens.

    Args:
        every_n_steps: optimizer steps between two reports (the end is always one); 0 switches them off.
        probe_rows: rows of the probe set, spread evenly over the validation rows (or the training rows).
        figure: draw the distribution before and now as an image.
    """

    def __init__(self, every_n_steps: int = 50, probe_rows: int = 16, figure: bool = True) -> None:
        if every_n_steps < 0 or probe_rows < 1:
            raise UserError("token_probabilities: expected every_n_steps >= 0 and probe_rows >= 1")
        self.every_n_steps, self.probe_rows, self.figure = every_n_steps, probe_rows, figure
        self.before: list[float] | None = None
        """Per cent of the probe's tokens in each bin of p before the first step."""
        self._probe: list[Batch] = []
        self._trained: Tally | None = None
        self._reported = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the probe set, and look at it before the first step."""
        if not self.every_n_steps:
            return
        data = cast("ChatDataModule", trainer.datamodule)  # type: ignore[attr-defined]
        stage = "train" if data.val_rows is None else "val"
        rows = data.rows_used(stage)  # others have no cached reference
        assert rows is not None
        picked = np.unique(np.linspace(0, len(rows) - 1, min(self.probe_rows, len(rows))).astype(int))
        self._probe = list(data.scoring_loader(rows.select(picked), stage, workers=0))
        self._reported = trainer.global_step  # a checkpoint's step was reported before it was written
        self._special = torch.tensor(cast("FineTuner", pl_module).tokenizer.all_special_ids, device=pl_module.device)
        if self.before is None:
            self._report(trainer, cast("FineTuner", pl_module))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """In a step that is reported, have the loss compute the training tokens' entropy too."""
        if self.every_n_steps:
            due = self._due(trainer.global_step + 1, pl_module)
            cast("FineTuner", pl_module).wanted = frozenset({"entropy", "rank"}) if due else frozenset()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Count the micro-batch's tokens; report after every so many steps."""
        module = cast("FineTuner", pl_module)
        if not self.every_n_steps or module.trained_on is None:
            return
        if module.wanted:  # a reported step: its tokens, with all statistics
            tally = Tally.of(module.trained_on, self._special)
            self._trained = tally if self._trained is None else self._trained + tally
        if self._due(trainer.global_step, pl_module) and trainer.global_step != self._reported:
            self._reported = trainer.global_step
            self._report(trainer, module)

    def _due(self, step: int, pl_module: pl.LightningModule) -> bool:
        """Whether to report after this many steps: every so many, and at the end."""
        return step % self.every_n_steps == 0 or step == cast("FineTuner", pl_module).total_steps

    def _report(self, trainer: pl.Trainer, module: "FineTuner") -> None:
        with not_training(trainer):
            self._compare(trainer, module)

    def _compare(self, trainer: pl.Trainer, module: "FineTuner") -> None:
        now = self._look(trainer, module).reduced(trainer)
        trained = None if self._trained is None else self._trained.reduced(trainer)
        self._trained = None
        if self.before is None:
            self.before = now.shares()
        if trainer.is_global_zero and isinstance(trainer.logger, TensorBoardLogger):
            writer = trainer.logger.experiment
            write(writer, "probe", now, trainer.global_step)
            if trained is not None:
                write(writer, "trained", trained, trainer.global_step)
            if self.figure:
                drawn = draw(self.before, now.shares(), f"step {trainer.global_step}", repr(module.weighting))
                writer.add_figure("probe/token_probabilities", drawn, trainer.global_step)

    def _look(self, trainer: pl.Trainer, module: "FineTuner") -> Tally:
        network, training = module.network, module.training
        assert network is not None
        module.eval()
        with trainer.precision_plugin.forward_context():
            looked = module.score_together(self._probe, frozenset({"entropy", "rank"}))
        tallies = [Tally.of(tokens, self._special) for tokens in looked]
        module.train(training)
        return sum(tallies[1:], tallies[0])

    def state_dict(self) -> dict[str, Any]:
        """What the probe looked like before the first step."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep comparing with it."""
        self.before = state_dict["before"]


def write(writer: Any, name: str, tally: Tally, step: int) -> None:
    """Scalars, the share of each bin of p, and three histograms, to a TensorBoard writer."""
    for key, value in tally.scalars().items():
        writer.add_scalar(f"{name}/{key}", value, step)
    for number, (label, share) in enumerate(zip(P_LABELS, tally.shares(), strict=True)):
        writer.add_scalar(f"{name}_p_bins/{number:02d} {label}", share, step)
    for key, edges in (("p", P_EDGES), ("weight", WEIGHT_EDGES), ("entropy", ENTROPY_EDGES)):
        counts = getattr(tally, key)
        if counts.sum() > 0:
            _write_histogram(writer, f"{name}_histograms/{key}", edges, counts, step)


def _write_histogram(writer: Any, tag: str, edges: tuple[float, ...], counts: Tensor, step: int) -> None:
    middles = torch.tensor([(low + high) / 2 for low, high in pairwise(edges)], dtype=torch.float64)
    writer.add_histogram_raw(
        tag,
        min=edges[0],
        max=edges[-1],
        num=int(counts.sum()),
        sum=float((counts * middles).sum()),
        sum_squares=float((counts * middles.square()).sum()),
        bucket_limits=list(edges[1:]),
        bucket_counts=counts.tolist(),
        global_step=step,
    )


def draw(before: list[float], now: list[float], title: str, weighting: str) -> "Figure":
    """Per cent of tokens by bin of p, before under now, on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = np.arange(len(P_LABELS))
    axes.bar(places, before, width=0.9, color="#c8ccd4", label="before training")
    axes.bar(places, now, width=0.5, color="#2f6db5", label=title)
    for place, share in zip(places, now, strict=True):
        axes.annotate(f"{share:.1f}", (place, max(share, 0.01)), ha="center", va="bottom", fontsize=7)
    axes.set_yscale("log")
    axes.set_ylim(0.01, 150)
    axes.set_xticks(places, P_LABELS, fontsize=8)
    axes.set_xlabel("probability that the model gives the token")
    axes.set_ylabel("% of the probe's supervised tokens")
    axes.set_title(f"Token probabilities under {weighting}", fontsize=10)
    axes.legend(loc="upper left", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
