"""`dft demo`: a fit on practice problems, and a look at held-out ones before and after.

It takes the options of `dft fit`; its data module has to be `PracticeDataModule`, whose problems have known answers.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from dft_lightning.callbacks.looks.tally import Tally
from dft_lightning.cli import CommandLine, run
from dft_lightning.data import PracticeDataModule
from dft_lightning.errors import UserError, printable
from dft_lightning.evaluation.generation import generate
from dft_lightning.evaluation.grading import Accuracy, boxed_answer, exact_match
from dft_lightning.loading import ModelSource, load_model
from dft_lightning.models import WeightedLM
from dft_lightning.module import FineTuner
from dft_lightning.weighting import Uniform

_NEW_TOKENS = 96  # the longest practice solution has fewer


@dataclass(frozen=True)
class Look:
    """What a model makes of the held-out problems."""

    tally: Tally
    accuracy: Accuracy
    example: str


def look(name: str, module: FineTuner, data: PracticeDataModule) -> Look:
    """Score the held-out solutions, and answer the held-out problems greedily.

    Args:
        name: the model to look at: a name or a folder.
    """
    network = WeightedLM(load_model(ModelSource(name, torch.bfloat16))).eval()
    tokenizer: Any = module.tokenizer
    special = torch.tensor(tokenizer.all_special_ids)
    assert data.val_rows is not None
    tallies = []
    with torch.no_grad():
        for batch in data.scoring_loader(data.val_rows, "val"):
            tokens = network(batch, Uniform(), wanted=["entropy", "rank"])[1]
            tallies.append(Tally.of(tokens, special))
    prompts = [data.renderer.prompt(row["messages"]) for row in data.held_out]
    outputs = generate(network.base, tokenizer, prompts, max_new_tokens=_NEW_TOKENS, batch_size=48)
    golds = [cast(str, boxed_answer(row["solution"])) for row in data.held_out]
    return Look(sum(tallies[1:], tallies[0]), exact_match(outputs, golds), outputs[0])


class Demo(CommandLine):
    """A fit with a look before and a look after."""

    def before_instantiate_classes(self) -> None:
        """Start anew each time."""
        self.config.fit.overwrite = True
        super().before_instantiate_classes()

    def before_fit(self) -> None:
        """Look at the model as it comes."""
        super().before_fit()
        if not isinstance(self.datamodule, PracticeDataModule):
            raise UserError(
                f"dft demo needs data: PracticeDataModule, got {type(self.datamodule).__name__}; use dft fit"
            )
        self.datamodule.tokenizer = self.model.tokenizer
        self.datamodule.prepare_data()
        self.datamodule.setup("validate")
        print(f"\nBefore: scoring and answering {len(self.datamodule.held_out)} held-out problems …", flush=True)
        self.before = look(self.model.source.name, self.model, self.datamodule)
        self.began = time.perf_counter()

    def after_fit(self) -> None:
        """Look at what was exported, and compare."""
        seconds = time.perf_counter() - self.began
        export = self.run_dir / "export"
        print("\nAfter: the same with the exported model …", flush=True)
        after = look(str(export), self.model, cast(PracticeDataModule, self.datamodule))
        rows = cast(PracticeDataModule, self.datamodule).train_rows
        assert rows is not None
        self.result = (self.before, after)
        show(self.before, after, repr(self.model.weighting))
        epochs = self.trainer.current_epoch
        print(f"{rows.lengths.sum() * epochs / seconds:,.0f} tokens/s over the whole fit of {seconds:,.0f} s")
        print(f"A problem:  {cast(PracticeDataModule, self.datamodule).held_out[0]['problem']}")
        print(f"  before:   {_one_line(self.before.example)}")
        print(f"  after:    {_one_line(after.example)}")
        print(f"Exported model: {printable(export)}")
        print(f"Look inside:    {_program('tensorboard')} --logdir {printable(self.run_dir / 'tensorboard')}")


def show(before: Look, after: Look, weighting: str) -> None:
    """Print the two looks side by side."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Held-out problems, {weighting}", title_justify="left")
    table.add_column()
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, values in comparison(before, after).items():
        table.add_row(name, *values)
    console = Console()
    console.print()
    console.print(table)


def comparison(before: Look, after: Look) -> dict[str, tuple[str, str]]:
    """The rows of the table: name, before, after."""
    looks = (before, after)

    def row(form: str, values: Sequence[float]) -> tuple[str, str]:
        one, two = (form.format(value) for value in values)
        return one, two

    return {
        "NLL (nats a token)": row("{:.3f}", [one.tally.scalars()["nll"] for one in looks]),
        "mean p": row("{:.3f}", [one.tally.scalars()["p_mean"] for one in looks]),
        "tokens with p < 1e-4": row("{:.1f} %", [one.tally.shares()[0] for one in looks]),
        "tokens with p > .9": row("{:.1f} %", [one.tally.shares()[-1] for one in looks]),
        "P(stop) after the answer": row("{:.3f}", [one.tally.scalars().get("p_stop", float("nan")) for one in looks]),
        f"right in \\boxed{{}}, of {before.accuracy.total}": row("{}", [one.accuracy.right for one in looks]),
        "right only by last number": row("{}", [one.accuracy.right_by_last_number for one in looks]),
    }


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) < 200 else line[:200] + " …"


def _program(name: str) -> str:
    """A program of this environment, as one can type it."""
    import sys

    beside = Path(sys.executable).with_name(name)
    try:
        return str(beside.relative_to(Path.cwd()))
    except ValueError:
        return str(beside) if beside.exists() else name


def main(args: Sequence[str] | None = None) -> int:
    """Run the demo; 2 where the user's input cannot be used."""
    return run(Demo, ["fit", *(args or [])])
