"""Whether DFT can learn to stop: the probability that the model gives the tokens that end a turn."""

from dataclasses import dataclass

import torch

from dft_lightning.insight.sample import Sample

#: Below this DFT's floor acts, at the height that its authors advise where tokens get ignored.
WEAK = 0.1
#: Below this a stop token is pushed a hundred times more weakly than by SFT.
LOST = 0.01
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_CURE = (
    "--model.weighting DFT --model.weighting.floor 0.1 (DFT's own floor, for all tokens), or the modifier "
    "--model.weighting Exempt --model.weighting.of DFT, under which stop tokens keep weight 1"
)


@dataclass(frozen=True)
class Stop:
    """P(stop token), where the data has a turn end.

    Args:
        count: stop tokens in the sample.
        turns: turns that are learnt; one without a stop token was cut off by max_length.
        mean: of p; None where there are none.
        quantiles: of p, by share; empty where there are none.
        values: p of each, ascending.
        warning: "" where there is nothing to fear.
    """

    count: int
    turns: int
    mean: float | None
    quantiles: dict[float, float]
    values: list[float]
    warning: str


def stop_of(sample: Sample) -> Stop:
    """Of the sample's stop tokens."""
    p = sample.tokens.p.double()[sample.tokens.need("stop")].sort().values
    turns = len(sample.turns)
    if not len(p):
        return Stop(0, turns, None, {}, [], _none(turns))
    quantiles = {share: float(torch.quantile(p, share)) for share in _QUANTILES}
    return Stop(len(p), turns, float(p.mean()), quantiles, p.tolist(), _warning(quantiles[0.5]))


def _none(turns: int) -> str:
    return (
        f"none of {turns} turns ends with a special token within data.max_length: the model will not learn to stop "
        "from these rows. Raise data.max_length, or look at the rows by dft inspect"
    )


def _warning(middle: float) -> str:
    """By the median: what half of the stop tokens are below."""
    if middle >= WEAK:
        return ""
    times = 1 / max(middle, 1e-12)
    meaning = "DFT learns to stop slowly" if middle >= LOST else "DFT will hardly learn to stop in an ordinary run"
    return (
        f"P(stop) is {middle:.2g} in the median: under DFT the expected update is p times SFT's, here about "
        f"{times:,.0f} times smaller, so {meaning}, and generation may go on without end. The cure: {_CURE}"
    )
