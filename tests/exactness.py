"""One gradient, however a step is cut up: every weighting × geometry × ranks, and the largest relative difference.

    python tests/exactness.py [--quick]          (make exactness)
    python tests/exactness.py --only fsdp2       (the geometries with this word alone, beside the one they are held to)

The same 25 rows of very unequal length, in steps of 8 and a last one of 1, are trained on in all these ways and
compared with one micro-batch a step on one rank: gradients before and after clipping (relative L2, the worst of all
steps) and everything logged. It leaves with 1 if anything is out of bounds.

Bounds. Behind an entry of the gradient stand some 10⁴ roundings of u = 6e-8 each, whose signs differ with the order of
sums: they add up to about √10⁴·u = 6e-6, so the bound is 1e-5. A mean of micro-batch means is off by more than 1e-2.
What is logged comes from weights that have been moved by such gradients, and is a mean itself: twice that. In half
precision the yardstick is the plain computation (all logits, `.backward()` a micro-batch) in the same precision: where
it rounds once, ours may round twice, so its error against the float32 truth may be √2 times as large, and no more.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import sums, tiny_model, tiny_tokenizer, write_jsonl
from harness import fit
from ranks import start

from dft_lightning import FineTuner, NuminaMathDataModule
from dft_lightning.loading import ModelSource, load_model
from dft_lightning.sharding.tensors import whole
from dft_lightning.weighting import (
    ASFT,
    DFT,
    PSFT,
    Bounded,
    DataWeighted,
    Exempt,
    ImportanceWeighted,
    InfoSFT,
    Mixed,
    Raised,
    Renormalized,
    TokenStats,
    TokenWeighting,
    Uniform,
    WarmUp,
)
from dft_lightning.weighting.catalogue import entries
from dft_lightning.weighting.composition import nested

GRADIENT, LOGGED, HALF = 1e-5, 2e-5, 2**0.5
HALVES = ("bf16-mixed", "bf16-true")
CLIP = 0.05  # below every norm here, so that clipping always acts


@dataclass(frozen=True)
class Sentence(TokenWeighting):
    """A user's weighting of sequence scope."""

    scope = "sequence"

    def weights(self, tokens):
        return tokens.sequence_mean(tokens.logp).exp()


@dataclass(frozen=True)
class Median(TokenWeighting):
    """A user's weighting that looks at the whole step, and at a statistic of the distribution."""

    scope, needs = "step", frozenset({"entropy"})

    def weights(self, tokens):
        return tokens.p / tokens.p.median() * torch.exp(tokens.need("entropy") - tokens.need("entropy").max())


#: In half precision, too; `plain` computes these.
WEIGHTINGS: list[TokenWeighting] = [
    Uniform(),
    DFT(),
    DFT(0.1),
    ImportanceWeighted(),
    ImportanceWeighted(level="token"),
    Sentence(),
    Median(),
    Exempt(Mixed(Renormalized(DFT()), share=0.5, final_share=0.1)),
    DataWeighted(WarmUp(Raised(Bounded(DFT(), 0.1, 0.9), power=0.5), Sentence(), share=0.5, ramp=True)),
]
#: For fields without a default.
_CHOSEN: dict[str, dict[str, Any]] = {
    "MixCE": {"eta": 0.3},
    "Power": {"alpha": 2.0},
    "Thresholded": {"threshold": 0.011},
    "ProFit": {"threshold": 0.011},  # at the published 0.1 this model has no token left
    "PSFT": {"window": 2},
    "EntropyBonus": {"of": DFT()},
}
#: All others of the package as they are by default.
OTHERS: list[TokenWeighting] = [
    entry.cls(**_CHOSEN.get(entry.name, {}))
    for entry in entries()
    if entry.cls not in {type(part) for known in WEIGHTINGS for part in nested(known)}
]
OTHERS += [Renormalized(DFT())]
QUICK: list[TokenWeighting] = [DFT(), ImportanceWeighted(), Median(), WEIGHTINGS[-2]]
QUICK_OTHERS: list[TokenWeighting] = [ASFT(), PSFT(window=2), InfoSFT()]


@dataclass(frozen=True)
class Geometry:
    """A way to lay out the same steps."""

    name: str
    data: dict[str, Any] = field(hash=False)
    chunk_rows: int | None = None
    ranks: int = 1
    strategy: str = "ddp"
    """Without it, one rank runs in this process, and more by `ddp`."""

    @property
    def alone(self) -> bool:
        """Whether it runs in this process."""
        return self.ranks == 1 and self.strategy == "ddp"


def of_both(quick: bool) -> list[TokenWeighting]:
    """Those that are compared in float32."""
    return QUICK + QUICK_OTHERS if quick else WEIGHTINGS + OTHERS


WHOLE = Geometry("(8, 1)", {"micro_batch_size": 8})
GEOMETRIES = [
    Geometry("(4, 2)", {"micro_batch_size": 4}),
    Geometry("(2, 4)", {"micro_batch_size": 2}),
    Geometry("(1, 8)", {"micro_batch_size": 1}),
    Geometry("(3, 3) in order", {"micro_batch_size": 3, "grouping": "plain"}),
    Geometry("packed (2 rows)", {"micro_batch_size": 2, "packing": True}),
    Geometry("packed (8 rows of 300)", {"micro_batch_size": 8, "packing": True, "pack_length": 300}),
    Geometry("padding-free", {"micro_batch_size": 2, "packing": "padding_free"}),
    Geometry("chunks of 1", {"micro_batch_size": 8}, chunk_rows=1),
    Geometry("chunks of 7", {"micro_batch_size": 4}, chunk_rows=7),
    Geometry("2 ranks × (4, 1)", {"micro_batch_size": 4}, ranks=2),
    Geometry("2 ranks × (1, 4)", {"micro_batch_size": 1}, ranks=2),
    Geometry("2 ranks, packed", {"micro_batch_size": 1, "packing": True}, ranks=2),
    Geometry("2 ranks, padding-free", {"micro_batch_size": 1, "packing": "padding_free"}, ranks=2),
    Geometry("1 rank × (4, 2), fsdp2", {"micro_batch_size": 4}, strategy="fsdp2"),
    Geometry("2 ranks × (2, 2), fsdp2", {"micro_batch_size": 2}, ranks=2, strategy="fsdp2"),
    Geometry("2 ranks, packed, fsdp2", {"micro_batch_size": 1, "packing": True}, ranks=2, strategy="fsdp2"),
    Geometry("4 ranks × (1, 2), fsdp2", {"micro_batch_size": 1}, ranks=4, strategy="fsdp2"),
]
HALF_ALONE = [WHOLE, *GEOMETRIES[2:7]]
IN_HALF = [shape for shape in GEOMETRIES if shape.name.startswith("2 ranks, packed")]


@dataclass(frozen=True)
class Scope:
    """How much of the table is made.

    Args:
        quick: a few weightings, and no four ranks, which take their time.
        word: that the geometries' names have.
    """

    quick: bool = False
    word: str = ""

    @property
    def geometries(self) -> list[Geometry]:
        """Those to compare."""
        return self._of(GEOMETRIES)

    @property
    def in_half(self) -> list[Geometry]:
        """Those to compare in half precision."""
        return self._of([*HALF_ALONE[:: 2 if self.quick else 1], *IN_HALF])

    def _of(self, shapes: list[Geometry]) -> list[Geometry]:
        return [shape for shape in shapes if self.word in shape.name and (shape.ranks <= 2 or not self.quick)]


class Watched(FineTuner):
    """Keeps the normalised gradient before it is clipped."""

    def configure_gradient_clipping(self, *args: Any, **options: Any) -> None:
        self.before = getattr(self, "before", [])
        given = [whole(p.grad.detach()).flatten().double() for p in self.network.parameters() if p.grad is not None]
        self.before.append(torch.cat(given))
        super().configure_gradient_clipping(*args, **options)


def reading(folder: Path, weighting: TokenWeighting) -> dict[str, Any]:
    """What the data module has to know: the column of weights only where there is a use for it."""
    return {"cache_dir": str(folder / "cache")} | ({"weight": "worth"} if "data_weight" in weighting.needs else {})


def outcome(folder: Path, weighting: TokenWeighting, shape: Geometry, **more: Any) -> dict[str, Any]:
    """Gradients before and after clipping of every step, and what was logged."""
    module, recorder, trainer = fit(
        folder / "model",
        folder / "rows.jsonl",
        weighting,
        module={"chunk_rows": shape.chunk_rows},
        data=shape.data | {"val_path": str(folder / "val.jsonl")} | reading(folder, weighting),
        kind=Watched,
        gradient_clip_val=CLIP,
        devices=shape.ranks,
        strategy="auto" if shape.alone else shape.strategy,
        **more,
    )
    logged = [{k: v for k, v in one.items() if "per_second" not in k} for one in recorder.logged]
    logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})
    return {"before": module.before, "after": recorder.gradients, "logged": logged}


def worst(ours: dict[str, Any], truth: dict[str, Any]) -> tuple[float, float, float]:
    """The largest relative difference of the gradients before and after clipping, and of what was logged."""
    gradients = [
        max(relative(mine, theirs) for mine, theirs in zip(ours[when], truth[when], strict=True))
        for when in ("before", "after")
    ]
    pairs = [
        (mine[name], theirs[name])
        for mine, theirs in zip(ours["logged"], truth["logged"], strict=True)
        for name in mine.keys() | theirs.keys()
    ]
    return *gradients, max(abs(mine - theirs) / max(abs(theirs), 1e-12) for mine, theirs in pairs)


def relative(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours - truth).norm() / truth.norm())


def plain(folder: Path, weighting: TokenWeighting, micro: int, precision: str) -> torch.Tensor:
    """The gradient of the first step by all logits and one backward a micro-batch; "exact" is float32."""
    data = NuminaMathDataModule(
        str(folder / "rows.jsonl"), global_batch_size=8, micro_batch_size=micro, max_length=200,
        **reading(folder, weighting),
    )  # fmt: skip
    data.tokenizer = FineTuner(str(folder / "model"), weighting).tokenizer
    data.prepare_data()
    data.setup("fit")
    batches = list(data.train_dataloader())[: -(-8 // micro)]
    dtype = torch.bfloat16 if "bf16-true" in precision else torch.float32
    model = load_model(ModelSource(str(folder / "model"), dtype))
    if precision == "exact bf16-true":
        model = model.float()

    def logp(batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            logits = model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)[batch.supervised]
        return logits.float().log_softmax(1), batch

    def stats(full: torch.Tensor, batch: Any) -> TokenStats:
        chosen = full.gather(1, batch.target[:, None])[:, 0].detach()
        entropy = -(full.exp() * full).sum(1).detach()
        return TokenStats(logp=chosen, target=batch.target, sequence=batch.row[batch.sequence], entropy=entropy,
                          position=batch.position, ref_logp=chosen, stop=batch.stop,
                          data_weight=batch.data_weight)  # fmt: skip

    with torch.no_grad():
        tokens = [stats(*logp(batch)) for batch in batches]
    weights = weighting.weights(TokenStats.concatenate(tokens)).split([len(one) for one in tokens])
    for batch, weight in zip(batches, weights, strict=True):
        full, _ = logp(batch)
        loss = -(weight * full.gather(1, batch.target[:, None])[:, 0]).sum() / sum(map(len, tokens))
        loss.backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


def half(folder: Path, weightings: list[TokenWeighting], scope: Scope) -> list[tuple[str, ...]]:
    """Rows of the table for the half precisions: error of ours over the error of the plain computation."""
    rows = []
    for precision in HALVES:
        for weighting in weightings:
            exact = plain(folder, weighting, 8, "exact bf16-true" if precision == "bf16-true" else "exact")
            allowed = max(relative(plain(folder, weighting, micro, precision), exact) for micro in (8, 2, 1))
            for shape in scope.in_half:
                if shape.alone:
                    found = outcome(folder, weighting, shape, precision=precision, max_steps=1)
                else:
                    found = torch.load(folder / f"{weighting!r} {shape.name} {precision}.pt")
                (ours,) = found["before"]
                ratio = relative(ours, exact) / allowed
                verdict = "ok" if ratio <= HALF else "OUT OF BOUNDS"
                rows.append((repr(weighting), f"{shape.name}, {precision}", f"{ratio:.2f} of plain", "", "", verdict))
    return rows


def prepare(folder: Path) -> None:
    """The tiny model and the rows that all runs share."""
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, rows in (("rows", sums(25)), ("val", sums(7, seed=5))):
        write_jsonl(folder / f"{name}.jsonl", [row | {"worth": number % 4} for number, row in enumerate(rows)])


def table(scope: Scope) -> list[tuple[str, ...]]:
    """Weighting, geometry, three differences and the verdict, a row each."""
    weightings, rows = of_both(scope.quick), []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        prepare(folder)
        truths = {repr(weighting): outcome(folder, weighting, WHOLE) for weighting in weightings}
        for count in sorted({shape.ranks for shape in scope.geometries if not shape.alone}):
            start(count, __file__, "rank", folder, "quick" * scope.quick, scope.word, seconds=3600.0)
        for weighting in weightings:
            for shape in scope.geometries:
                if shape.alone:
                    ours = outcome(folder, weighting, shape)
                else:
                    ours = torch.load(folder / f"{weighting!r} {shape.name}.pt")
                before, after, logged = worst(ours, truths[repr(weighting)])
                fine = before < GRADIENT and after < GRADIENT and logged < LOGGED
                verdict = "ok" if fine else "OUT OF BOUNDS"
                found = (f"{before:.1e}", f"{after:.1e}", f"{logged:.1e}")
                rows.append((repr(weighting), shape.name, *found, verdict))
        rows += half(folder, QUICK if scope.quick else WEIGHTINGS, scope)
    return rows


def rank(folder: Path, quick: str, word: str) -> None:
    """What each of the processes does, one after another."""
    count, scope = int(os.environ["WORLD_SIZE"]), Scope(bool(quick), word)
    full, narrow = (
        [shape for shape in shapes if shape.ranks == count and not shape.alone]
        for shapes in (scope.geometries, scope.in_half)
    )
    for weighting in of_both(scope.quick):
        exact = [(shape, {}, "") for shape in full]
        halves = [(shape, {"precision": p, "max_steps": 1}, f" {p}") for shape in narrow for p in HALVES]
        halves = [] if weighting in OTHERS + QUICK_OTHERS else halves
        for shape, more, suffix in exact + halves:
            found = outcome(folder, weighting, shape, **more)
            if os.environ["RANK"] == "0":
                torch.save(found, folder / f"{weighting!r} {shape.name}{suffix}.pt")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", metavar="WORD")
    options = parser.parse_args()
    rows = table(Scope(options.quick, options.only))
    head = ("weighting", "geometry", "gradient", "clipped", "logged", "")
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(6)]
    for row in [head, *rows]:
        print(" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    out = sum(row[-1] != "ok" for row in rows)
    print(f"{len(rows) - out} of {len(rows)} within bounds: gradients {GRADIENT:g}, logged {LOGGED:g} (relative)")
    return 1 if out else 0


if __name__ == "__main__":
    sys.exit(main())
