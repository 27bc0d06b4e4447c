"""A diagnosis in the terminal."""

from typing import TYPE_CHECKING

from dft_lightning.callbacks.token_probabilities import P_LABELS
from dft_lightning.insight.diagnosis import HIGH, LOW, Diagnosis, Extreme
from dft_lightning.insight.flow import Groups
from dft_lightning.insight.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_BAR = 30


def show(found: Diagnosis, console: "Console") -> None:
    """Print everything, the verdict last."""
    _facts(found, console)
    _histogram(found, console)
    _extremes(found, console)
    _steps(found, console)
    for groups in found.groups:
        _shares(found, groups, console)
    _stop(found, console)
    _verdict(found, console)


def _table(title: str, *columns: str) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(_plain(column), justify="left" if number == 0 else "right")
    return table


def _plain(text: str) -> "Text":
    """Text that is not read as rich's markup."""
    from rich.text import Text

    return Text(printable(text))


def _facts(found: Diagnosis, console: "Console") -> None:
    table = _table("Before any training", "", "")
    table.show_header = False
    table.columns[1].justify = "left"
    for name, value in found.facts.items():
        table.add_row(_plain(name), _plain(value))
    console.print(table)


def _histogram(found: Diagnosis, console: "Console") -> None:
    table = _table("Probability that the model gives the tokens", "p", "tokens", "share", "")
    table.columns[3].justify = "left"
    most = max(max(found.p), 1)
    for label, count in zip(P_LABELS, found.p, strict=True):
        bar = "█" * round(_BAR * count / most)
        table.add_row(label, f"{count:,}", f"{count / found.tokens:.1%}", bar or ("▏" if count else ""))
    console.print(table)
    signs = found.signs
    console.print(
        f"mean −log p {signs.nll:.3f} nats, mean entropy {signs.entropy:.3f} nats, p from 0.1 to 0.9: {signs.open:.1%}",
        highlight=False,
    )


def _extremes(found: Diagnosis, console: "Console") -> None:
    for name, extreme in ((f"p < {LOW}", found.low), (f"p > {HIGH}", found.high)):
        console.print(_plain(f"{name}: {extreme.share:.1%} of the tokens; most frequent: {_most(extreme)}"))


def _most(extreme: Extreme) -> str:
    return ", ".join(f"{token.text!r} {token.share:.1%}" for token in extreme.tokens) or "none"


def _steps(found: Diagnosis, console: "Console") -> None:
    columns = ["weighting", "mean weight", "effective sample", "|gradient| / SFT's", "cosine with SFT's"]
    table = _table(f"A step under each weighting (gradients over {found.gradient_rows} rows)", *columns)
    for name, flow in found.flows.items():
        ratio = cosine = "–"
        if flow.direction is not None:
            ratio, cosine = number(flow.direction.ratio), number(flow.direction.cosine)
        table.add_row(_plain(name), f"{flow.mean:.3f}", f"{flow.effective:.1%}", ratio, cosine)
    console.print(table)


def number(value: float | None) -> str:
    """With three decimals; a dash where there is none."""
    return "–" if value is None else f"{value:.3f}"


def _shares(found: Diagnosis, groups: Groups, console: "Console") -> None:
    table = _table(f"Per cent of the gradient by {groups.title}", groups.title, "tokens", *found.flows)
    columns = [found.token_shares(groups), *(flow.shares[groups.title] for flow in found.flows.values())]
    for label, *shares in zip(groups.labels, *columns, strict=True):
        table.add_row(_plain(label), *(f"{100 * share:.1f}" for share in shares))
    console.print(table)


def _stop(found: Diagnosis, console: "Console") -> None:
    stop = found.stop
    if stop.mean is not None:
        quantiles = ", ".join(f"{share:.0%}: {value:.2g}" for share, value in stop.quantiles.items())
        said = f"P(stop token), {stop.count} in {stop.turns} turns: mean {stop.mean:.3g}; quantiles {quantiles}"
        console.print(said, highlight=False)
    if stop.warning:
        console.print(_plain(f"Warning: {stop.warning}"), style="bold red")


def _verdict(found: Diagnosis, console: "Console") -> None:
    verdict = found.verdict
    table = _table(f"Verdict: {verdict.kind}; DFT: {verdict.leaning}", "sign", "here", "line", "speaks for DFT")
    for one in verdict.evidence:
        speaks = {"for": "yes", "against": "no", "neither": "–"}[one.speaks]
        table.add_row(one.what, one.value, one.line, speaks)
    console.print(table)
    console.print(verdict.said, highlight=False, style="bold")
    console.print(verdict.limits, highlight=False)
