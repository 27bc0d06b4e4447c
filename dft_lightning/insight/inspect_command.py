"""`dft inspect`: rows as the model sees them, so that a wrong mask is seen in a second."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from dft_lightning.cli import InsteadOfTraining, run
from dft_lightning.data import ChatDataModule
from dft_lightning.data.packing import Packed
from dft_lightning.errors import UserError, printable
from dft_lightning.insight.ansi import By, render
from dft_lightning.insight.choice import refuse, refuse_data, weighting_of
from dft_lightning.insight.files import writable, write
from dft_lightning.insight.sample import Vocabulary
from dft_lightning.insight.subject import Subject
from dft_lightning.insight.view import batch_of, laid_out, lines, scores
from dft_lightning.insight.view_page import view_page
from dft_lightning.weighting.spec import label


class InspectCommand(InsteadOfTraining):
    """Reads the options of `dft fit`, and shows rows in place of training."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Our own options, beside those of a fit."""
        super().add_arguments_to_parser(parser)
        parser.set_defaults({"model.weighting": {"class_path": "dft_lightning.weighting.Uniform"}})
        parser.add_argument("--rows", type=int, nargs="+", help="Which training rows, from 0 on; by default the first.")
        parser.add_argument("--first", type=int, default=3, help="Without --rows: how many.")
        other = "Weights by this, by name or '{class_path: …, init_args: …}', in place of model.weighting."
        parser.add_argument("--weighting", type=Any, default=None, help=other)
        parser.add_argument("--no_model", action="store_true", help="Masks and borders only: no weights are loaded.")
        by = "What colours show in the terminal; by default p, without a model the mask."
        parser.add_argument("--by", type=By | None, default=None, help=by)
        colour = "Whether the terminal gets colours; auto: where it is one, and NO_COLOR is not set."
        parser.add_argument("--color", type=Literal["auto", "always", "never"], default="auto", help=colour)
        parser.add_argument("--output", type=str | None, help="HTML file to write; by default inspect.html in run_dir.")

    def _run_subcommand(self, subcommand: str) -> None:
        config = self.config[subcommand]
        if config.first < 1:
            raise UserError(f"--first is {config.first}; expected 1 or more")
        if config.no_model and config.by in ("p", "weight"):
            raise UserError(f"--by {config.by} needs the model: leave out --no_model, or colour by mask")
        subject = Subject.of(self.model, cast(ChatDataModule, self.datamodule), config.trainer)
        weighting = self.model.weighting if config.weighting is None else weighting_of(config.weighting, "weighting")
        if not config.no_model:
            refuse(weighting)
        target = Path(config.output) if config.output else self.run_dir / "inspect.html"
        writable(target)
        if not config.output:
            self.claim.take(self.run_dir)
        layout = laid_out(subject, config.rows, config.first)
        if not config.no_model:
            refuse_data([weighting], weighting, subject.data)
        batch = batch_of(subject, layout)
        found = None if config.no_model else scores(subject, batch, weighting)
        shown = lines(subject, layout, batch, Vocabulary.of(self.model.tokenizer), found)
        facts = _facts(subject, None if config.no_model else label(weighting))
        write(target, view_page(shown, facts, scored=found is not None))
        by: By = config.by or ("mask" if config.no_model else "p")
        print("\n".join(f"{name}: {printable(value)}" for name, value in facts.items()))
        print(render(shown, by, colour=_colour(config.color)))
        print(f"Written to {printable(target)}")


def _facts(subject: Subject, weighting: str | None) -> dict[str, str]:
    options, kind = subject.data.options, subject.data.layout
    facts = {"model": subject.module.source.name, "data": str(options.path or options.dataset)}
    if weighting is not None:
        facts["weights"] = f"{weighting}, before training, as if the rows shown were one optimizer step"
    if isinstance(kind, Packed):
        facts["packing"] = f"rows of {kind.capacity:,} positions"
    return facts


def _colour(asked: str) -> bool:
    return asked == "always" or (asked == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))


def main(args: Sequence[str] | None = None) -> int:
    """Show and write; 2 where the user's input cannot be used."""
    return run(InspectCommand, ["fit", *(args or [])])
