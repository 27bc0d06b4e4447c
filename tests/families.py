"""What works with each family of language models: a table by experiment, for the documentation.

    python tests/families.py [FAMILY …] [--write docs/model-families.md]

Each cell is tried on a tiny random model in float32 on the CPU. It says what works, or how the command refuses what
does not; anything else (a traceback, a wrong number) begins with FAULT. Equality is what `close` says.
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
import traceback
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import sums, tiny_tokenizer, write_jsonl
from harness import fit
from tiny_families import FAMILIES, UnknownFamilyError, model_of

from dft_lightning.attention import inputs
from dft_lightning.callbacks.export import Export
from dft_lightning.callbacks.run_summary import RunSummary
from dft_lightning.callbacks.throughput import Throughput
from dft_lightning.data.batch import Collator
from dft_lightning.errors import UserError
from dft_lightning.loading import ModelSource, load_model
from dft_lightning.models import WeightedLM
from dft_lightning.recomputation import recompute
from dft_lightning.weighting import DFT

ATTENTIONS = ("eager", "sdpa", "varlen")
LENGTHS = (9, 1, 14, 6, 11)
MARK, FAULT, REFUSED = "works", "FAULT", "refused: "
LORA = {"rank": 2, "alpha": 64}
#: Units of rounding. Logits and gradients are sums of some hundred products, in layers one after the other, in another
#: order; a wrong mask, scale or weight is off by more than a hundredth.
CLOSE = 2**13 * torch.finfo(torch.float32).eps


@dataclass
class Row:
    """The cells of a family."""

    family: str
    fit: str = ""
    packing: str = ""
    lora: str = ""
    merge: str = ""
    export: str = ""
    plan: str = ""
    diagnose: str = ""
    recompute: str = ""
    remarks: list[str] = field(default_factory=list)

    def faults(self) -> list[str]:
        """The cells in which something went wrong."""
        return [f"{name}: {cell}" for name, cell in asdict(self).items() if str(cell).startswith(FAULT)]


class Subject:
    """A family's tiny model as a folder, and rows to train on."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder, self.model = family, folder, folder / "model"
        model = model_of(family)
        with torch.no_grad():  # so that a bias, a norm or a multiplier that is forgotten is seen
            generator = torch.Generator().manual_seed(1)
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            for module in model.modules():  # transformers begins with a padding token of zeros, as no trained model has
                if isinstance(module, torch.nn.Embedding):
                    module.weight[1] = module.weight[2]
        model.save_pretrained(self.model)
        tiny_tokenizer().save_pretrained(self.model)
        self.rows = write_jsonl(folder / "rows.jsonl", sums(16))

    def load(self, attention: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
        return load_model(ModelSource(str(self.model), dtype, attention))

    def fit(self, name: str, **options: Any) -> Any:
        """Two steps; the run, and its folder."""
        run = self.folder / name
        callbacks = [Export(merge_lora=True), Throughput(peak_flops=1e12), RunSummary()]
        sizes = {"micro_batch_size": 4, "max_length": 120} | options.pop("data", {})
        return fit(
            self.model, self.rows, DFT(), max_steps=2, callbacks=callbacks, default_root_dir=run, data=sizes, **options
        )


def documents() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {"row": number, "input_ids": rng.integers(2, 320, length), "supervised": np.arange(length) > 0}
        for number, length in enumerate(LENGTHS)
    ]


def close(found: torch.Tensor, truth: torch.Tensor) -> bool:
    """Up to rounding, as a relative L2 distance."""
    return bool((found - truth).norm() <= CLOSE * truth.norm())


def check(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def own_numbers(subject: Subject) -> None:
    """Loss and all gradients of padded rows against DFT's formula on the model's own logits."""
    model = subject.load()
    batch = Collator(1)([[row] for row in documents()])
    loss, _ = WeightedLM(model)(batch, DFT())
    loss.backward()
    ours = gradient(model)
    model.zero_grad()
    logits = model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)[batch.supervised]
    logp = logits.log_softmax(1).gather(1, batch.target[:, None])[:, 0]
    truth = -(logp.exp().detach() * logp).sum()
    truth.backward()
    check(close(loss, truth) and close(ours, gradient(model)), "loss or gradients differ from the model's own logits")


def gradient(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def logits(model: Any) -> torch.Tensor:
    ids = torch.from_numpy(documents()[2]["input_ids"])[None]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return found


def plainly(folder: Path) -> Any:
    """What transformers alone loads."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trained(subject: Subject, row: Row) -> None:
    """Two steps, and the exported folder."""
    own_numbers(subject)
    before = logits(subject.load())
    module, _, trainer = subject.fit("full")
    check(trainer.global_step == 2, "the steps were not done")
    after = logits(module.model)
    check(not torch.equal(after, before), "nothing was learnt")
    row.fit = MARK
    said = next(one.said for one in trainer.callbacks if isinstance(one, Throughput))
    if said.startswith("mfu is left out"):
        row.remarks.append(said.removeprefix("mfu is left out: ").replace(" are not known here", " not known: no mfu"))
    row.export = guarded(lambda: check(close(logits(plainly(subject.folder / "full" / "export")), after), "logits"))


def packs(subject: Subject, row: Row) -> None:
    """Packed rows give each document the logits that it has alone, wherever the check passes."""
    passed = []
    for attention in ATTENTIONS:
        with contextlib.suppress(UserError):
            model = subject.load(attention)
            WeightedLM(model).check_borders()
            check(keeps_apart(model, attention), f"{attention} passes the check, and lets documents see each other")
            check(agrees(subject, model), f"{attention} computes something else than the default")
            passed.append(attention)
    if passed:
        packed, plain = (
            subject.fit(name, module={"attn_implementation": passed[0]}, data={"packing": packing})[1].gradients[0]
            for name, packing in (("packed", True), ("padded", False))
        )
        check(close(packed, plain), "the gradients of packed rows are not those of padded ones")
        row.packing = ", ".join(passed)
        return
    try:
        subject.fit("packed", data={"packing": True})
    except UserError as error:
        check("data.packing" in str(error) and str(error).endswith("set --data.packing to false"), str(error))
        row.packing = "no implementation; refused"
        return
    raise AssertionError("a packed fit is not refused")


def keeps_apart(model: Any, attention: str) -> bool:
    rows = documents()
    batch = Collator(packed=True, width=50)([rows[:3], rows[3:]])
    with torch.no_grad():
        model.eval()
        packed = model(**inputs(batch, attention)).logits.flatten(0, 1)
        alone = [model(input_ids=torch.from_numpy(each["input_ids"])[None], use_cache=False).logits[0] for each in rows]
    starts = (0, 9, 10, 50, 56)
    pairs = zip(starts, alone, strict=True)
    return all(close(packed[start : start + len(truth)], truth) for start, truth in pairs)


def agrees(subject: Subject, model: Any) -> bool:
    return close(logits(model), logits(subject.load()))


def adapted(subject: Subject, row: Row) -> None:
    """All adapters are trained; the adapter's folder and the merged one are the trained model."""
    from peft import PeftModel

    module, recorder, _ = subject.fit("lora", module={"lora": LORA, "optimizer": lambda p: torch.optim.SGD(p, lr=1.0)})
    network = module.network
    assert network is not None
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    check({len(each) for each in recorder.gradients} == {trained}, "an adapter has no gradient")
    targets = network.model.lora_targets
    row.lora = MARK if not targets.left_out else f"all but {', '.join(map(short, targets.left_out))}"
    stacked = [short(name) for name in targets.adapted if "experts" in name.split(".")]
    row.lora += f"; experts too: {', '.join(stacked)}" if stacked else ""
    live, base = logits(module.model), logits(subject.load())
    check(not close(live, base), "the adapter has learnt nothing")
    run = subject.folder / "lora"
    row.merge = guarded(lambda: check(close(logits(plainly(run / "export-merged")), live), "merged logits differ"))
    again = PeftModel.from_pretrained(subject.load(), run / "export")
    check(close(logits(again), live), "the adapter's folder gives other logits")


def short(name: str) -> str:
    """The last parts of a name."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[-2:])


def recomputes(subject: Subject, row: Row) -> None:
    """Gradients are the same to the bit."""
    batch = Collator(1)([[each] for each in documents()])

    def found(kind: Any) -> torch.Tensor:
        network = WeightedLM(subject.load())
        network.check_recomputation(kind)
        recompute(network.decoder, kind)
        network(batch, DFT())[0].backward()
        return gradient(network)

    plain = found("none")
    check(torch.equal(plain, found("full")), "full: other gradients")
    said = guarded(lambda: check(torch.equal(plain, found("selective")), "selective: other gradients"))
    row.recompute = said if said in (MARK, "") or said.startswith(FAULT) else "full; selective refused"


def commands(subject: Subject, row: Row) -> None:
    """`dft plan` and `dft diagnose`."""
    data = ["--data", "NuminaMathDataModule", "--data.path", subject.rows, "--data.max_length", "120"]
    usual = ["--model.model_name", subject.model, "--model.weighting", "DFT", *data]
    usual += ["--data.global_batch_size", "8", "--data.micro_batch_size", "4", "--trainer.accelerator", "cpu"]
    row.plan = guarded(lambda: planned(usual))
    page = subject.folder / "diagnosis.html"
    row.diagnose = guarded(lambda: command("diagnose", *usual, "--output", page) and None)


def planned(usual: list[Any]) -> str:
    found = json.loads(command("plan", *usual, "--device", "cpu", "--json"))
    check(found["peak_memory"] > 0 and found["trained_parameters"] > 0, "the plan is empty")
    with_lora = json.loads(command("plan", *usual, "--model.lora.rank", "2", "--device", "cpu", "--json"))
    check(0 < with_lora["trained_parameters"] < found["trained_parameters"], "adapters are not planned")
    return MARK if found["flops_a_step"] else "works, memory alone"


def command(*args: Any) -> str:
    """What `dft` prints; a `UserError` where it refuses."""
    from dft_lightning.__main__ import main

    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            status = main([str(each) for each in args])
        except SystemExit as refused:
            status = refused.code
    if status:
        raise UserError(errors.getvalue().strip().splitlines()[-1])
    return out.getvalue()


def guarded(run: Any) -> str:
    """What the run says, or how it is refused, or that it went wrong."""
    try:
        return run() or MARK
    except UserError as error:
        return REFUSED + str(error).split(": ")[-1][:160]
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{FAULT} {type(error).__name__}: {' '.join(str(error).split())[:300]} ({place.filename}:{place.lineno})"


def examine(family: str, folder: Path) -> Row:
    """All cells of a family.

    Raises:
        UnknownFamilyError: the installed transformers does not have it.
    """
    row = Row(family)
    quiet = contextlib.redirect_stdout(io.StringIO())
    with warnings.catch_warnings(), quiet:
        warnings.simplefilter("ignore")
        subject = Subject(family, folder)
        parts = {"fit": trained, "packing": packs, "lora": adapted, "recompute": recomputes, "plan": commands}
        for name, part in parts.items():
            said = guarded(lambda part=part: part(subject, row))
            if said != MARK:
                setattr(row, name, said)
    return row


TITLES = {
    "family": "family",
    "fit": "fit",
    "packing": "packing with",
    "lora": "LoRA on all linear layers",
    "merge": "merge",
    "export": "export",
    "plan": "plan",
    "diagnose": "diagnose",
    "recompute": "activation checkpointing",
    "remarks": "remarks",
}


def line(row: Row) -> str:
    """A row of the table."""
    cells = asdict(row) | {"remarks": "; ".join(row.remarks)}
    return "| " + " | ".join(str(cells[name]).replace("|", "/") for name in TITLES) + " |"


def table(rows: list[Row]) -> str:
    return "\n".join(
        ["| " + " | ".join(TITLES.values()) + " |", "|" + "---|" * len(TITLES), *(line(row) for row in rows)]
    )


def versions() -> str:
    import peft
    import transformers

    return f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}"


def main() -> int:
    """Examine, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="*", default=[], help="all by default")
    parser.add_argument("--write", type=Path, help="replace the table in this page")
    options = parser.parse_args()
    rows, missing = [], []
    for family in options.families or FAMILIES:
        folder = Path(tempfile.mkdtemp())
        try:
            rows.append(examine(family, folder))
            print(line(rows[-1]), file=sys.stderr, flush=True)
        except UnknownFamilyError as unknown:
            missing.append(str(unknown))
        finally:
            shutil.rmtree(folder)
    if options.write:
        page = options.write.read_text()
        start, end = "<!-- table -->", "<!-- end of table -->"
        head, rest = page.split(start)[0], page.split(end)[1]
        made = "\n".join([f"Made with {versions()}.", "", table(rows), *(f"\n{each}." for each in missing)])
        options.write.write_text(f"{head}{start}\n\n{made}\n\n{end}{rest}")
    faults = [f"{row.family}: {fault}" for row in rows for fault in row.faults()]
    print("\n".join(faults) or "no faults")
    return 1 if faults else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
