"""`dft diagnose`: what the base model makes of the data, and where each weighting's gradient would go."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from dft_lightning.cli import InsteadOfTraining, run
from dft_lightning.data import ChatDataModule
from dft_lightning.errors import UserError, printable
from dft_lightning.insight.choice import chosen, refuse_data
from dft_lightning.insight.diagnosis import as_json, diagnose
from dft_lightning.insight.files import writable, write
from dft_lightning.insight.page import page
from dft_lightning.insight.subject import Subject
from dft_lightning.insight.terminal import show


class DiagnoseCommand(InsteadOfTraining):
    """Reads the options of `dft fit`, and looks at model and data in place of training."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Our own options, beside those of a fit."""
        super().add_arguments_to_parser(parser)
        parser.set_defaults({"model.weighting": {"class_path": "dft_lightning.weighting.Uniform"}})
        parser.add_argument("--sample_rows", type=int, default=64, help="Training rows of the one pass, spread evenly.")
        gradient_rows = "Of these, rows of the step whose gradients are compared; 0 leaves that out."
        parser.add_argument("--gradient_rows", type=int, default=8, help=gradient_rows)
        weightings = (
            "What to compare, by name or '{class_path: …, init_args: …}'; by default the configured one, Uniform, DFT "
            "and DFT with floor 0.1."
        )
        parser.add_argument("--weightings", type=Any, nargs="+", help=weightings)
        output = "HTML file to write, beside which goes the same as JSON; by default diagnosis.html in run_dir."
        parser.add_argument("--output", type=str | None, help=output)

    def _run_subcommand(self, subcommand: str) -> None:
        from rich.console import Console

        config = self.config[subcommand]
        _refuse(config)
        subject = Subject.of(self.model, cast(ChatDataModule, self.datamodule), config.trainer)
        weightings = chosen(config.weightings, self.model.weighting)
        target = Path(config.output) if config.output else self.run_dir / "diagnosis.html"
        writable(target)
        _refuse_other(target.with_suffix(".json"))
        if not config.output:
            self.claim.take(self.run_dir)
        assert len(subject.rows)  # they are read here
        refuse_data(weightings.values(), self.model.weighting, subject.data)
        console = Console()
        found = diagnose(
            subject,
            weightings,
            sample_rows=config.sample_rows,
            gradient_rows=config.gradient_rows,
            say=lambda text: console.print(text, highlight=False),
        )
        write(target.with_suffix(".json"), json.dumps(as_json(found), indent=1))
        write(target, page(found))
        show(found, console)
        names = f"{target} and {target.with_suffix('.json').name}"
        console.print(f"Written to {printable(names)}", highlight=False, markup=False)


def _refuse(config: Any) -> None:
    """Options that make no sense, before anything is read."""
    for name, least in (("sample_rows", 1), ("gradient_rows", 0)):
        if config[name] < least:
            raise UserError(f"--{name} is {config[name]}; expected {least} or more")
    if config.output and Path(config.output).suffix == ".json":
        raise UserError(f"--output {config.output!r} names the page; the JSON goes beside it: expected a name in .html")


def _refuse_other(path: Path) -> None:
    """The JSON next to the page has a name that the user did not give: another file of that name stays."""
    if not path.exists():
        return
    try:
        is_ours = {"facts", "verdict", "weightings"} <= json.loads(path.read_text(encoding="utf-8")).keys()
    except (OSError, ValueError, AttributeError):
        is_ours = False
    if not is_ours:
        raise UserError(f"{path} is not a diagnosis, and would be replaced: name another page by --output, or move it")


def main(args: Sequence[str] | None = None) -> int:
    """Look, print and write; 2 where the user's input cannot be used."""
    return run(DiagnoseCommand, ["fit", *(args or [])])
