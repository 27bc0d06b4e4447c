"""What all ranks together have seen of the probe and the training tokens, and its way to TensorBoard.

Shapes: M supervised tokens of the probe, K of them with their distribution at the start.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from dft_lightning.callbacks.looks.change import extremes, pushes, table
from dft_lightning.callbacks.looks.heatmap import draw_solutions
from dft_lightning.callbacks.looks.pictures import draw, draw_calibration, draw_positions, draw_pushes, draw_weights
from dft_lightning.callbacks.looks.probe import Probe
from dft_lightning.callbacks.looks.tally import Tally, sums_by_position
from dft_lightning.callbacks.looks.writing import write

#: So many solutions have a heat map.
_SOLUTIONS = 3


@dataclass
class Start:
    """The first look at the probe, which later ones are compared with."""

    step: int
    rows: list[int]
    """Its rows' indices in their source."""
    probe: str
    """Fingerprint of their content."""
    shares: list[float]
    """Per cent of its tokens in each bin of p."""
    logp: Tensor
    """(M,) in nats."""

    @property
    def name(self) -> str:
        """As pictures call it."""
        return "before training" if self.step == 0 else f"step {self.step}"


@dataclass
class Seen:
    """One report's counts: of this rank, or `together` of all."""

    probe: Tally
    logp: Tensor
    """(M,) of the probe's tokens, in nats."""
    trained: Tally | None
    kl: Tensor | None
    """(2, K): see `InitialDistributions.found`."""

    def together(self, trainer: pl.Trainer) -> "Seen":
        """The sums over all ranks, on the CPU, by one message."""
        tallies = [self.probe] if self.trained is None else [self.probe, self.trained]
        parts = [part for tally in tallies for part in tally.tensors()]
        parts += [self.logp] if self.kl is None else [self.logp, self.kl]
        device = parts[0].device
        flat = torch.cat([part.to(device, torch.float64).flatten() for part in parts])
        whole = cast(Tensor, trainer.strategy.reduce(flat, reduce_op="sum")).cpu()
        split = torch.split(whole, [part.numel() for part in parts])
        summed = [values.view(part.shape) for values, part in zip(split, parts, strict=True)]
        count = len(self.probe.tensors())
        return Seen(
            probe=Tally(*summed[:count]),
            logp=summed[count * len(tallies)],
            trained=None if self.trained is None else Tally(*summed[count : 2 * count]),
            kl=None if self.kl is None else summed[-1],
        )

    @property
    def kl_initial(self) -> float | None:
        """Mean KL from the initial model over the tokens where it is known."""
        if self.kl is None or self.kl[1].sum() == 0:
            return None
        return float(self.kl[0].sum() / self.kl[1].sum())


@dataclass
class Report:
    """Writes what was seen after a step.

    Args:
        texts: of each id of the vocabulary.
        weighting: as it is printed.
    """

    writer: Any
    seen: Seen
    start: Start
    probe: Probe
    texts: Sequence[str]
    weighting: str
    step: int

    def numbers(self) -> None:
        """Scalars, histograms, and the table of pushed tokens."""
        write(self.writer, "probe", self.seen.probe, self.step)
        if self.seen.trained is not None:
            write(self.writer, "trained", self.seen.trained, self.step)
        if self.seen.kl_initial is not None:
            self.writer.add_scalar("probe/kl_initial", self.seen.kl_initial, self.step)
        if self.step != self.start.step:
            up, down = self._pushed()
            self.writer.add_text("probe/pushed_tokens", table(up, down, self.texts), self.step)

    def figure(self) -> None:
        """The distribution of p, then and now."""
        shares = self.seen.probe.shares()
        drawn = draw(self.start.shares, shares, self._now, self.weighting, self.start.name)
        self.writer.add_figure("probe/token_probabilities", drawn, self.step)

    def pictures(self) -> None:
        """All others."""
        tally, places = self.seen.probe, self.probe.positions()
        drawn = {
            "weights": draw_weights(tally, f"{self.weighting}, {self._now}"),
            "calibration": draw_calibration(tally.calibration, self._now.capitalize()),
            "positions": draw_positions(
                sums_by_position(places, self.start.logp), tally.by_position, self._now, self.start.name
            ),
            "solutions": self._solutions(),
        }
        up, down = self._pushed() if self.step != self.start.step else ([], [])
        if up or down:
            title = f"Tokens pushed most, from {self.start.name} to {self._now}"
            drawn["pushed_tokens"] = draw_pushes(up, down, self.texts, title)
        for name, figure in drawn.items():
            self.writer.add_figure(f"probe_pictures/{name}", figure, self.step)

    @property
    def _now(self) -> str:
        return f"step {self.step}"

    def _pushed(self) -> Any:
        return extremes(pushes(self.probe.targets(), self.start.logp, self.seen.logp))

    def _solutions(self) -> Any:
        """The first rows of the probe."""
        targets, solutions = self.probe.targets().tolist(), []
        for first, last in list(zip(self.probe.starts[:-1], self.probe.starts[1:], strict=True))[:_SOLUTIONS]:
            texts = [self.texts[target] for target in targets[first:last]]
            looks = [logp[first:last].exp().numpy() for logp in (self.start.logp, self.seen.logp)]
            solutions.append((texts, looks[0], looks[1]))
        return draw_solutions(solutions, self.start.name, self._now)
