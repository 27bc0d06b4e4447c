"""How far the model has moved from the initial one, over the whole vocabulary: KL on some tokens of the probe.

The difference of the given tokens' log p is no KL, so the distributions themselves are kept: those of the initial model
at some tokens (128 by default), spread evenly over the probe, in full and in float32, in a file a row beside the event
files. For a vocabulary of 152k that is 78 MB on disk and, being mapped, hardly anything in memory; the initial hidden
states would take a copy of the initial head beside them, which alone is 1.2 GB for a model of 1.5B in float32. Being of
a row each, the files serve a run that goes on, also on another number of ranks; ranks need to share the folder, as they
do for checkpoints.

Shapes: K kept tokens, R of them in a row, H hidden size, V vocabulary.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dft_lightning.callbacks.looks.probe import Probe
from dft_lightning.disk import writing
from dft_lightning.logprob.head import LogitTransform, log_distribution

if TYPE_CHECKING:
    from dft_lightning.data.batch import Batch
    from dft_lightning.models import WeightedLM


class InitialDistributions:
    """KL(initial‖now) = Σ_v p₀(v)·(log p₀(v) − log p(v)) in nats, of K tokens.

    Args:
        folder: where they are kept.
        probe: whose tokens they are.
        count: K.
    """

    def __init__(self, folder: Path, probe: Probe, count: int) -> None:
        self.folder, self.probe = folder, probe
        self.chosen = torch.from_numpy(
            np.unique(np.linspace(0, len(probe) - 1, min(count, len(probe))).astype(np.int64))
        )
        self._found, self._said = self._nothing(), False

    def _nothing(self) -> Tensor:
        return torch.zeros(2, len(self.chosen), dtype=torch.float64)

    @contextmanager
    def watching(self, network: "WeightedLM", record: bool) -> Iterator[None]:
        """What the network scores within is compared, or with `record` kept first."""
        self._found = self._nothing()

        def see(batch: "Batch", hidden: Tensor, head: Tensor, transform: LogitTransform) -> None:
            self._see(batch, hidden, lambda rows: log_distribution(rows, head, transform), record)

        network.observer = see
        try:
            yield
        finally:
            network.observer = None

    def found(self) -> Tensor:
        """(2, K): this rank's KL of each kept token, and whether it knows it; both add up over ranks."""
        return self._found

    def _see(self, batch: "Batch", hidden: Tensor, distribution: Callable[[Tensor], Tensor], record: bool) -> None:
        """Of a batch scored twice, first by the reference, the second look counts."""
        places, sequence = self.probe.places(batch).cpu(), batch.sequence.cpu()
        kept = torch.isin(places, self.chosen)
        for number, row in enumerate(batch.row.tolist()):
            tokens = torch.nonzero((sequence == number) & kept).flatten()
            if not len(tokens):
                continue
            now = distribution(hidden[tokens.to(hidden.device)])
            path = self.folder / f"initial-{row}.npy"
            if record:
                _write(path, now)
            before = _read(path, tuple(now.shape))
            if before is None:
                self._say_once(path)
            else:
                at = torch.searchsorted(self.chosen, places[tokens])
                self._found[0, at] = divergence(before.to(now), now).double().cpu()
                self._found[1, at] = 1.0

    def _say_once(self, path: Path) -> None:
        if not self._said:
            self._said = True
            rank_zero_warn(f"probe/kl_initial leaves out tokens: {path} is missing, or of another probe")


def divergence(before: Tensor, now: Tensor) -> Tensor:
    """KL (R,) from log-probabilities (R, V), summed in float64; what had probability 0 counts nothing."""
    terms = before.exp() * (before - now)
    return torch.where(before > -torch.inf, terms, 0.0).sum(1, dtype=torch.float64)


def _write(path: Path, logp: Tensor) -> None:
    """Beside, then renamed: what is there is whole."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with writing(path, "--run_dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            np.save(file, logp.float().cpu().numpy())
        os.replace(unfinished, path)


def _read(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """What was kept (R, V); None where it is gone, damaged, or of other tokens."""
    try:
        known = np.load(path, mmap_mode="c", allow_pickle=False) if path.exists() else None
    except (OSError, ValueError, EOFError):  # pickled objects are a ValueError, too
        return None
    return None if known is None or known.shape != shape else torch.from_numpy(known)
