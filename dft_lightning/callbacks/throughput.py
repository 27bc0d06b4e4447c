"""How fast the training is, how much of the device's speed it uses, and what it waits for."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from dft_lightning.callbacks.stopwatch import Stopwatch, settle
from dft_lightning.errors import UserError
from dft_lightning.planning.flops import ModelFlops, NotCountedError, model_flops
from dft_lightning.planning.peaks import find_device, product_of
from dft_lightning.precision import computed_in

if TYPE_CHECKING:
    from dft_lightning.data.batch import Batch
    from dft_lightning.module import FineTuner


@dataclass
class _Work:
    """What was done since the last report on this rank; counted on the host, so that no step waits for the device."""

    tokens: int = 0
    supervised: int = 0
    sequences: int = 0
    flops: int = 0

    def add(self, batch: "Batch", flops: ModelFlops | None) -> None:
        """Count a micro-batch."""
        self.tokens += batch.tokens
        self.supervised += len(batch.target)
        self.sequences += len(batch)
        self.flops += 0 if flops is None else flops.of(batch.lengths, len(batch.target))


@dataclass(frozen=True)
class Speed:
    """The work of all ranks in some time.

    Args:
        seconds: of training; validation, checkpoints and reports on the probe are left out.
        waited: seconds of these in which the loop waited for a batch, a mean over the ranks.
        memory: peak bytes since the start on the rank that has most, by name.
        spread: least, mean and most over the ranks, by the name under which it is logged; nothing on one rank.
    """

    tokens: float
    supervised: float
    sequences: float
    flops: float
    seconds: float
    waited: float
    ranks: int
    memory: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)

    def metrics(self, peak: float | None) -> dict[str, float]:
        """What is logged; `mfu` where there is a peak (FLOP/s a device) and the operations are known."""
        values = {
            "tokens_per_second": self.tokens / self.seconds,
            "supervised_tokens_per_second": self.supervised / self.seconds,
            "sequences_per_second": self.sequences / self.seconds,
            "loader_wait_share": self.waited / self.seconds,
            **{f"{name}_gib": size / 2**30 for name, size in self.memory.items()},
            **self.spread,
        }
        if peak is not None and self.flops:
            values["mfu"] = self.flops / self.seconds / (self.ranks * peak)
        return values


class Throughput(Callback):
    """Logs tokens, supervised tokens and sequences a second over all ranks, `mfu`, peak memory and waiting for batches.

    Each value is of all steps since the last one logged, without validation, checkpoints and reports on the probe.
    Model-FLOP utilisation is what the model needs by definition, over time and the devices' peak:

        mfu = Σ_steps (6·P·tokens + 6·H·V·supervised tokens + 12·A·E·layers·pairs) / (seconds · devices · peak)

    P numbers in the decoder's linear layers, H·V in the head; a frozen one costs 4, not 6. A heads of width E attend to
    Σ t(t+1)/2 pairs of query and key in documents of t tokens (fewer in a sliding window). Padding, recomputation and
    passes without gradient count as no work. The peak is the maker's dense one for the precision of the products.

    On several ranks, waiting is their mean and memory that of the one with most; beside, `_min`, `_mean` and `_max` of
    both are logged, by which a rank with a slow disk or with longer rows is seen.

    Args:
        peak_flops: FLOP/s of one device at its best, for `mfu`; by default from a table of GPUs by name. Where it is
            not known, `mfu` is left out.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        if peak_flops is not None and not peak_flops > 0:
            raise UserError(f"throughput.peak_flops is {peak_flops}; expected FLOP/s of a device, more than 0")
        self.peak_flops = peak_flops
        self.said = ""
        """What `mfu` means in this run, or why there is none."""
        self._flops: ModelFlops | None = None
        self._peak: float | None = None
        self._watched: pl.Trainer | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count what the model costs, and find the device's peak."""
        device = trainer.strategy.root_device
        network = cast("FineTuner", pl_module).network
        assert network is not None
        weights = computed_in(trainer) or next(network.parameters()).dtype
        self._peak, of_what = (self.peak_flops, "throughput.peak_flops")
        if self._peak is None:
            self._peak, of_what = _peak(device, str(trainer.precision), weights)
        try:
            self._flops = model_flops(network)
            self.said = _formula(self._flops, self._peak, of_what)
        except NotCountedError as reason:
            self._flops, self.said = None, f"mfu is left out: {reason}"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the clock ready; it runs from the first batch on."""
        self._work, self._reported = _Work(), trainer.global_step
        if self._watched is not trainer:
            self.watch = Stopwatch(settle=settle(trainer.strategy.root_device))
            self.watch.follow(trainer)
            self._watched = trainer
        self.watch.reset()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: "Batch", batch_idx: int
    ) -> None:
        """Count a micro-batch, and report after a step that is logged."""
        self._work.add(batch, self._flops)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set where Lightning starts
        done = trainer.global_step
        due = every and (done % every == 0 or done == cast("FineTuner", pl_module).total_steps)
        if not due or done == self._reported:
            return
        self._reported = done
        metrics = self._speed(trainer).metrics(self._peak)
        for name, value in metrics.items():
            bar = name in ("tokens_per_second", "mfu")
            held = torch.tensor(value)  # on the host: a number would go to the device, and be waited for there
            pl_module.log(f"throughput/{name}", held, prog_bar=bar, logger=False)  # equal on all ranks
        for logger in trainer.loggers:
            logger.log_metrics({f"throughput/{name}": value for name, value in metrics.items()}, done)

    def _speed(self, trainer: pl.Trainer) -> Speed:
        """Of all ranks since the last report: one message."""
        device = trainer.strategy.root_device
        memory = _peak_memory(device)
        mine = [*vars(self._work).values(), *self.watch.lap(), *memory.values()]
        self._work = _Work()
        place = device if trainer.world_size > 1 else torch.device("cpu")
        every = trainer.strategy.all_gather(torch.tensor(mine, dtype=torch.float64, device=place))
        ranks = every.reshape(-1, len(mine)).cpu()
        tokens, supervised, sequences, flops = ranks[:, :4].sum(0).tolist()
        seconds, waited = ranks[:, 4:6].mean(0).tolist()
        most = dict(zip(memory, ranks[:, 6:].amax(0).tolist(), strict=True))
        spread = _spread(ranks, list(memory))
        return Speed(tokens, supervised, sequences, flops, seconds, waited, len(ranks), most, spread)


@contextmanager
def not_training(trainer: pl.Trainer) -> Iterator[None]:
    """What happens within is no part of the training's speed."""
    with ExitStack() as stack:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput) and callback._watched is trainer:
                stack.enter_context(callback.watch.pause())
        yield


def _peak(device: torch.device, precision: str, weights: torch.dtype) -> tuple[float | None, str]:
    """FLOP/s of a device, and what they are of."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    known, product = find_device(name), product_of(precision, weights)
    peak = None if known is None or product is None else known.peak(product)
    return peak, f"{name}, {product or precision}"


def _formula(flops: ModelFlops, peak: float | None, of_what: str) -> str:
    if peak is None:
        return f"mfu is left out: no peak is known of {of_what}; set --throughput.peak_flops"
    attention = sum(3 * layers.a_pair for layers in flops.attention)
    return (
        f"mfu = ({flops.a_token:.4g}·tokens + {flops.a_supervised:.4g}·supervised tokens + {attention:.4g}·pairs that "
        f"attend) FLOPs, over seconds · {peak:.4g} FLOP/s a device ({of_what})"
    )


def _spread(ranks: torch.Tensor, memory: list[str]) -> dict[str, float]:
    """Least, mean and most over the ranks of waiting and of memory, from `ranks` (R, columns) as in `_speed`."""
    if len(ranks) == 1:
        return {}
    columns = {"loader_wait_share": ranks[:, 5] / ranks[:, 4]}
    columns |= {f"{name}_gib": ranks[:, 6 + place] / 2**30 for place, name in enumerate(memory)}
    found: dict[str, float] = {}
    for name, of in columns.items():
        found |= {f"{name}_min": float(of.min()), f"{name}_mean": float(of.mean()), f"{name}_max": float(of.max())}
    return found


def _peak_memory(device: torch.device) -> dict[str, float]:
    """Peak bytes since the process began, by name."""
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved(device)
        return {"peak_memory": torch.cuda.max_memory_allocated(device), "peak_reserved": reserved}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
