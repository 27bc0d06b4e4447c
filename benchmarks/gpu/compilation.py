"""A fit with compiled layers: nothing is compiled after the first step, no graph breaks, and the loss is the same.

The first loss may differ from that of the plain layers by one unit of rounding of bfloat16, relative: a token's NLL is
a difference of logits, which a fused kernel rounds at other places, and errors of tokens have either sign. A later loss
comes from weights that were rounded once more with each step, hence one unit per step; in float32 the sums behind a
logit count too, which are 64 units (see `tolerance` in `benchmarks/step_vs_peers.py`).
"""

from collections.abc import Iterator
from pathlib import Path

from step_vs_peers import tolerance

from gpu import models
from gpu.fits import fit, losses
from gpu.part import Measurement, Setting, attempt

STEPS = 6


def run(setting: Setting) -> Iterator[Measurement]:
    """Mixed and true precision, on a CPU float32 too."""
    model = models.save(setting.folder / "model", models.TINY if setting.dry else models.SMALL)
    for precision in ["32-true"] if setting.dry else ["bf16-mixed", "bf16-true"]:
        yield from attempt(precision, compiled, setting, model, precision)


def compiled(setting: Setting, model: Path, precision: str) -> Iterator[Measurement]:
    """Against the same fit with plain layers."""
    how = ["--trainer.precision", precision, "--model.attn_implementation", "varlen"]
    plain = losses(fit(setting, model, f"plain {precision}", STEPS, *how))
    record = fit(setting, model, f"compiled {precision}", STEPS, *how, "--model.compile", "true")
    first, last = record["steps"][0]["graphs"], record["steps"][-1]["graphs"]
    yield Measurement(f"{precision}: graphs compiled before the second step", float(first["graphs"]), 1.0, ">=")
    yield Measurement(
        f"{precision}: graphs compiled after the first step", float(last["graphs"] - first["graphs"]), 0.0
    )
    yield Measurement(f"{precision}: graph breaks", float(last["breaks"]), 0.0)
    dtype = "float32" if precision == "32-true" else "bfloat16"
    for step in (1, 2):
        apart = abs(losses(record)[step - 1] - plain[step - 1]) / abs(plain[step - 1])
        yield Measurement(f"{precision}: loss of step {step}, compiled and plain, apart", apart, tolerance(dtype, step))
