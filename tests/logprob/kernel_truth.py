"""What the Triton row step is compared with: plain torch in float64, and how far float32 may be from it.

Shapes: R rows, V vocabulary.
"""

import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dft_lightning.logprob import LogitTransform, kernel
from dft_lightning.logprob.head import statistics
from dft_lightning.weighting import DFT, ImportanceWeighted, TokenStats, TokenWeighting, Uniform
from dft_lightning.weighting.base import checked_weights

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = ("entropy", "topk_entropy", "collision", "rank", "top_p")
BUILT_IN = [
    Uniform(),
    DFT(),
    DFT(floor=0.1),
    ImportanceWeighted(level="token"),
    ImportanceWeighted(level="token", temperature=0.5, clip=(0.1, 0.9)),
]
TRANSFORMS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 3.0},
    "wide softcap": {"softcap": 500.0},
    "all": {"bias": True, "scale": 1.7, "softcap": 5.0},
}
UNIT = 2.0**-24  # of float32 rounding
LEAST = 2.0**-126  # of what float32 holds in full


@dataclass(frozen=True)
class Mine(DFT):
    """A user's weighting derived from a built-in one."""

    def weights(self, tokens: TokenStats) -> Tensor:
        return 0.5 * tokens.p + 0.5


@dataclass
class Problem:
    """Raw products, what each token brings along, and how far float32 can be off."""

    logits: Tensor  # (R, V)
    target: Tensor  # (R,)
    factor: Tensor  # (R,)
    ref_logp: Tensor  # (R,)
    transform: LogitTransform
    block: int

    def wide(self) -> "Problem":
        """The same in float64."""
        bias = None if self.transform.bias is None else self.transform.bias.double()
        transform = replace(self.transform, bias=bias)
        wide = [tensor.double() for tensor in (self.logits, self.factor, self.ref_logp)]
        return Problem(wide[0], self.target, wide[1], wide[2], transform, self.block)

    def score(self, names=NAMES):
        return kernel.score(self.logits, self.target, self.transform, names, block=self.block)

    def fused_(self, weighting, names=NAMES, dtype=None, factor=True):
        return kernel.fused_(
            self.logits,
            self.target,
            weighting,
            self.factor if factor else None,
            self.ref_logp,
            self.transform,
            names,
            dtype or self.logits.dtype,
            block=self.block,
        )

    def gradient_(self, found, coefficient, dtype=None):
        dtype = dtype or self.logits.dtype
        known = (found["logp"], found["lse"], coefficient)
        return kernel.gradient_(self.logits, self.target, *known, self.transform, dtype, block=self.block)


def problem(device, rows, vocabulary, block, name="plain", dtype=torch.float32, spread=4.0, padding=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    options = dict(TRANSFORMS[name])
    if options.pop("bias", False):
        options["bias"] = torch.randn(vocabulary, generator=generator).to(device)
    whole = torch.randn(rows, vocabulary + padding, generator=generator) * spread
    target = torch.randint(0, vocabulary, (rows,), generator=generator)
    factor = 0.5 + torch.rand(rows, generator=generator)
    ref_logp = -8 * torch.rand(rows, generator=generator)
    moved = [tensor.to(device) for tensor in (whole.to(dtype), target, factor, ref_logp)]
    return Problem(moved[0][:, :vocabulary], *moved[1:], LogitTransform(**options), block)


@dataclass
class Answer:
    """The row step in plain torch."""

    z: Tensor  # (R, V) logits
    slope: Tensor  # (R, V) derivative of the logits by the products
    found: dict[str, Tensor]
    coefficient: Tensor
    grad: Tensor  # (R, V)


def slope_of(given: Problem) -> Tensor:
    """(R, V). As 1 − tanh² it would keep no digit of a saturated logit's, even in float64."""
    transform = given.transform
    slope = torch.full_like(given.logits, transform.scale)
    if transform.softcap is not None:
        x = given.logits if transform.bias is None else given.logits + transform.bias
        slope /= (x * transform.scale / transform.softcap).cosh().square()
    return slope


def plain(given: Problem, weighting=None) -> Answer:
    """Straight from the definitions, in the precision of what is given."""
    z = given.transform.forward_(given.logits.clone())
    target_logit = z.gather(1, given.target[:, None])[:, 0]
    lse = z.logsumexp(1)
    found = {"logp": target_logit - lse, "lse": lse} | statistics(NAMES, z, lse, target_logit)
    tokens = TokenStats(logp=found["logp"], target=given.target, sequence=given.target, ref_logp=given.ref_logp)
    found["weight"] = checked_weights(weighting or Uniform(), tokens)
    coefficient = found["weight"] * given.factor
    onehot = torch.zeros_like(z).scatter_(1, given.target[:, None], 1.0)
    slope = slope_of(given)
    grad = coefficient[:, None] * ((z - lse[:, None]).exp() - onehot) * slope
    return Answer(z, slope, found, coefficient, grad)


class Bounds:
    """How far float32 may be from the truth.

    A logit takes at most `steps` roundings of its own size: the bias, the scale, and tanh with its quotients; without
    them it is exact. A sum of V terms takes one for each addition into a lane and each level of adding the lanes up;
    exp takes 2 and, as exp2 of a rounded product does, as many as its argument is large. Shifts of the logits shift
    log p by at most twice as much.
    """

    def __init__(self, given: Problem, truth: Answer) -> None:
        transform, found = given.transform, truth.found
        steps = (transform.bias is not None) + (transform.scale != 1.0) + 8 * (transform.softcap is not None)
        z, finite = truth.z, truth.z.isfinite()
        largest = given.logits.double().abs().where(given.logits.isfinite(), 0.0).amax(1) * abs(transform.scale)
        if transform.bias is not None:
            bias = transform.bias.double().abs()
            largest += bias.where(bias.isfinite(), 0.0).max() * abs(transform.scale)
        self.logit = steps * UNIT * largest  # (R,)
        depth = z - z.amax(1, keepdim=True)
        p = (z - found["lse"][:, None]).exp()
        expected_depth = (p * depth.abs().where(finite, 0.0)).sum(1)
        adds = -(-z.shape[1] // given.block) + given.block.bit_length() + 8
        log_total = found["lse"] - z.amax(1)
        self.total = UNIT * (adds + expected_depth)
        size = found["logp"].abs().where(found["logp"].isfinite(), 0.0)
        self.logp = 2 * self.logit + self.total + UNIT * (2 * size + log_total + 2)
        entropy = found["entropy"]
        self.entropy = 4 * entropy * self.logit + 2 * self.total * (1 + log_total + expected_depth) + 4 * UNIT
        self.collision = found["collision"] * 2 * (2 * self.logit + 2 * self.total + 8 * UNIT)
        self.top_p = found["top_p"] * (2 * self.logit + self.total + 4 * UNIT)
        self.depth = UNIT * depth.abs().where(finite, 0.0)
        self.p = p

    def grad(self, truth: Answer, dtype: torch.dtype, times: float = 1.0) -> Tensor:
        """(R, V). p − 1 at the target is off by as much as p is; the weight by `times` as much as log p is.

        A narrower dtype adds half a unit in its last place; a whole one in the interpreter, which cuts bfloat16 off
        where a GPU rounds it.
        """
        share = ((2 + times) * self.logp + 24 * UNIT)[:, None] + self.depth
        reach = truth.coefficient[:, None].abs() * self.p * truth.slope.abs()
        bound = share * (reach + truth.grad.abs()) + LEAST
        if dtype == torch.float32:
            return bound
        info, exponent = torch.finfo(dtype), torch.frexp(truth.grad).exponent
        place = (info.eps * torch.exp2(exponent.double() - 1)).clamp(min=info.smallest_normal * info.eps)
        return bound + place * (1.0 if INTERPRETED and dtype == torch.bfloat16 else 0.5)


def excess(got: Tensor, truth: Tensor, bound: Tensor) -> float:
    """The largest error as a share of its bound; 0 where both are the same, infinite where one is no number."""
    got = got.double()
    share = ((got - truth).abs() / bound).nan_to_num(torch.inf, torch.inf)
    return float(share.where(got != truth, 0.0).max()) if share.numel() else 0.0


def within(got: Tensor, truth: Tensor, bound: Tensor) -> None:
    """Equal where infinite, and not further off than the bound elsewhere."""
    share = excess(got, truth, bound)
    assert share <= 1.0, share


def score_errors(given: Problem, found: dict[str, Tensor], truth: Answer) -> dict[str, float]:
    """The error of each statistic as a share of its bound."""
    bounds, true = Bounds(given, truth), truth.found
    errors = {
        "logp": excess(found["logp"], true["logp"], bounds.logp),
        "lse": excess(found["lse"], true["lse"], bounds.logit + bounds.total + 2 * UNIT * true["lse"].abs()),
    }
    for name in sorted({"entropy", "collision", "top_p"} & found.keys()):
        errors[name] = excess(found[name], true[name], getattr(bounds, name))
    if "topk_entropy" in found:  # of 20 terms, in plain torch, which rounds the log-sum-exp
        entropy, rounded = true["topk_entropy"], UNIT * truth.z.amax(1).abs()
        bound = 20 * bounds.logit + 2 * (1 + entropy) * rounded + 100 * UNIT
        errors["topk_entropy"] = excess(found["topk_entropy"], entropy, bound)
    if "rank" in found:
        errors["rank"] = 0.0 if _rank_is_possible(found["rank"], given, truth, bounds) else torch.inf
    return errors


def _rank_is_possible(rank: Tensor, given: Problem, truth: Answer, bounds: Bounds) -> bool:
    """Between the ranks with every logit that is too close to tell below the target, and above it."""
    target = truth.z.gather(1, given.target[:, None])
    unsure = 2 * bounds.logit[:, None]
    lowest = (truth.z > target + unsure).sum(1)
    highest = (truth.z > target - unsure).sum(1) - (unsure > 0)[:, 0].long()
    return bool(((lowest <= rank) & (rank <= highest)).all())


def check_scores(given: Problem, found: dict[str, Tensor], truth: Answer) -> None:
    errors = score_errors(given, found, truth)
    assert max(errors.values()) <= 1.0, errors


def fused_errors(given: Problem, weighting: TokenWeighting, dtype: torch.dtype, names=NAMES) -> dict[str, float]:
    """The errors of the fused form on `given`, whose products it overwrites, as shares of their bounds."""
    truth = plain(given.wide(), weighting)
    before = replace(given, logits=given.logits.clone())
    found, grad = given.fused_(weighting, names, dtype)
    assert grad.dtype == dtype
    assert grad.data_ptr() == given.logits.data_ptr()
    assert found.keys() == {"logp", "lse", "weight", *names}
    bounds, true = Bounds(before, truth), truth.found["weight"]
    times = getattr(weighting, "temperature", 1.0)
    weight = excess(found["weight"], true, true * (times * bounds.logp + 16 * UNIT) + LEAST)
    gradient = excess(grad, truth.grad, bounds.grad(truth, dtype, times))
    return score_errors(before, found, truth) | {"weight": weight, "gradient": gradient}


def check_fused(given: Problem, weighting: TokenWeighting, dtype: torch.dtype, names=NAMES) -> None:
    """The fused form on `given`, whose products it overwrites."""
    errors = fused_errors(given, weighting, dtype, names)
    assert max(errors.values()) <= 1.0, errors
