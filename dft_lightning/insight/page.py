"""A diagnosis as one HTML file that needs nothing else: no network, no script."""

from html import escape

from dft_lightning.callbacks.token_probabilities import ENTROPY_EDGES, P_LABELS
from dft_lightning.insight.charts import bars, lines, stacks, strip
from dft_lightning.insight.diagnosis import HIGH, LOW, Diagnosis, Extreme
from dft_lightning.insight.flow import Groups
from dft_lightning.insight.stop import LOST, WEAK
from dft_lightning.insight.terminal import number
from dft_lightning.insight.text import printable
from dft_lightning.insight.verdict import FIGURE_2

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2129; background: #f5f6f8; margin: 0; }
main { max-width: 820px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 24px; margin: 8px 0 4px; } h2 { font-size: 18px; margin: 0 0 8px; }
section { background: #fff; border: 1px solid #e2e5ea; border-radius: 8px; padding: 16px 20px; margin: 16px 0; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: right; padding: 3px 8px; border-bottom: 1px solid #eceef2; vertical-align: top; }
th { font-weight: 600; color: #4a505c; } th:first-child, td:first-child, td.text, th.text { text-align: left; }
td:first-child { overflow-wrap: anywhere; min-width: 8em; }
svg { width: 100%; height: auto; display: block; } svg text { font: 11px system-ui, sans-serif; fill: #4a505c; }
svg text.value { font-size: 10px; } svg text.inside { fill: #fff; } svg .grid { stroke: #e2e5ea; fill: none; }
.legend { margin: 4px 0 10px; font-size: 13px; }
.key { margin-right: 14px; white-space: nowrap; display: inline-block; }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px; }
.verdict { border-left: 6px solid #8a8f98; } .helps { border-left-color: #009e73; }
.hurts { border-left-color: #d55e00; } .unclear { border-left-color: #e69f00; }
.warning { background: #fff3ea; border: 1px solid #f0b27f; border-radius: 6px; padding: 8px 12px; }
.note { color: #5b616d; font-size: 13px; }
code { background: #eef0f4; border-radius: 3px; padding: 0 4px; white-space: pre-wrap; }
.wide { overflow-x: auto; } .scroll { columns: 2; } @media (max-width: 640px) { .scroll { columns: 1; } }
"""

_LEANING = {"helps": "the kind of data that DFT helps with", "unclear": "unclear", "hurts": "DFT is likely to hurt"}


def page(found: Diagnosis) -> str:
    """The whole file."""
    parts = [_verdict(found), _stop(found), _p(found), _entropy(found), _extremes(found), _steps(found)]
    parts += [_flow(found, groups) for groups in found.groups]
    head = f"<h1>Before any training</h1>{_facts(found)}"
    return document("dft diagnose", f"<main>{head}{''.join(parts)}</main>", STYLE)


def document(title: str, body: str, style: str) -> str:
    """An HTML file around a body that is escaped already."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{safe(title)}</title><style>{style}</style></head>\n<body>{body}</body></html>\n"
    )


def safe(text: str) -> str:
    """Text of any origin, for a place between tags or in a quoted attribute."""
    return escape(printable(text), quote=True)


def _section(title: str, inside: str, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{safe(title)}</h2>{inside}</section>\n'


def _table(head: list[str], rows: list[list[str]], classes: dict[int, str] | None = None) -> str:
    """Cells are escaped; `classes` gives columns a style by their place."""
    style = classes or {}

    def cells(tag: str, texts: list[str]) -> str:
        marked = (f' class="{style[place]}"' if place in style else "" for place in range(len(texts)))
        return "".join(f"<{tag}{mark}>{safe(text)}</{tag}>" for mark, text in zip(marked, texts, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells("th", head)}</tr>{body}</table></div>'


def _facts(found: Diagnosis) -> str:
    facts = "<br>".join(f"{safe(name)}: <b>{safe(value)}</b>" for name, value in found.facts.items())
    return f'<p class="note">{facts}</p>'


def _verdict(found: Diagnosis) -> str:
    verdict = found.verdict
    rows = []
    for one in verdict.evidence:
        speaks = {"for": "yes", "against": "no", "neither": "–"}[one.speaks]
        rows.append([one.what, one.value, one.line, speaks, one.why])
    table = _table(["sign", "here", "line", "speaks for DFT", "why"], rows, {4: "text"})
    said = f"<p><b>{safe(verdict.said)}</b></p>{table}<p class='note'>{safe(verdict.limits)}</p>"
    return _section(f"{verdict.kind.capitalize()}: {_LEANING[verdict.leaning]}", said, f"verdict {verdict.leaning}")


def _stop(found: Diagnosis) -> str:
    stop = found.stop
    inside = ""
    if stop.mean is not None:
        inside += strip(stop.values, {LOST: "hardly learnt by DFT", WEAK: "slowly"})
        quantiles = [f"{value:.2g}" for value in stop.quantiles.values()]
        head = ["stop tokens", "turns", "mean p", *(f"{share:.0%} quantile" for share in stop.quantiles)]
        inside += _table(head, [[str(stop.count), str(stop.turns), f"{stop.mean:.3g}", *quantiles]])
    if stop.warning:
        inside += f'<p class="warning"><b>Warning.</b> {safe(stop.warning)}</p>'
    return _section("P(stop token): can it be learnt to stop?", inside)


def _p(found: Diagnosis) -> str:
    shares = [count / max(found.tokens, 1) for count in found.p]
    paper = [share / 100 for share in FIGURE_2]
    note = (
        '<p class="note">Per cent of the supervised tokens. Red marks: the base model of the DFT paper on its maths '
        "data (arXiv 2508.05629, figure 2), where DFT helped.</p>"
    )
    return _section("Probability that the model gives the tokens", bars(P_LABELS, shares, "p", paper) + note)


def _entropy(found: Diagnosis) -> str:
    labels = [f"{low:g}" for low in ENTROPY_EDGES[:-1]]
    signs = found.signs
    note = (
        f'<p class="note">Nats, from the value at the bar on; mean {signs.entropy:.3f}. Mean −log p of the tokens '
        f"given: {signs.nll:.3f}, that is {signs.excess:+.3f} beyond the entropy.</p>"
    )
    shares = [count / max(found.tokens, 1) for count in found.entropy]
    return _section("Entropy of the model's own distribution", bars(labels, shares, "entropy, nats") + note)


def _extremes(found: Diagnosis) -> str:
    parts = ((f"p < {LOW}", found.low), (f"p > {HIGH}", found.high))
    return _section("Tokens at the extremes", "".join(_extreme(name, extreme) for name, extreme in parts))


def _extreme(name: str, extreme: Extreme) -> str:
    tokens = "".join(
        f"<li><code>{safe(repr(token.text)[1:-1])}</code> {token.share:.1%} of them ({token.count} times, "
        f"mean p {token.p:.2g})</li>"
        for token in extreme.tokens
    )
    head = f"<p><b>{safe(name)}: {extreme.share:.1%} of the tokens.</b> Most frequent:</p>"
    return f"{head}<ul class='scroll'>{tokens or '<li>none</li>'}</ul>"


def _steps(found: Diagnosis) -> str:
    rows = []
    for name, flow in found.flows.items():
        one = flow.direction
        ratio, cosine = ("–", "–") if one is None else (number(one.ratio), number(one.cosine))
        rows.append([name, f"{flow.mean:.3f}", f"{flow.effective:.1%}", ratio, cosine])
    head = ["weighting", "mean weight", "effective sample size", "|gradient| / SFT's", "cosine with SFT's"]
    note = (
        f'<p class="note">The last two: real backward passes over {found.gradient_rows} rows as one optimizer step, '
        "normalised as the run normalises, by all trained parameters, before clipping. With plain gradient descent, a "
        "learning rate divided by the ratio makes steps as long as SFT's; Adam divides the size of the gradient out by "
        "itself, so there the ratio tells how often clipping acts, not which learning rate to take. Effective sample "
        "size: (Σw)²/(N·Σw²), the share of the tokens that truly count.</p>"
    )
    return _section("A step under each weighting", _table(head, rows) + note)


def _flow(found: Diagnosis, groups: Groups) -> str:
    series = {"tokens": found.token_shares(groups)}
    series |= {name: flow.shares[groups.title] for name, flow in found.flows.items()}
    labels = [printable(label) for label in groups.labels]
    drawn = lines(labels, series, groups.title) if groups.ordered else stacks(labels, series)
    rows = [[name, *(f"{100 * share:.1f}" for share in shares)] for name, shares in series.items()]
    note = (
        '<p class="note">Per cent. Mass of a token: |w| times the norm of the gradient of −log p by the logits, '
        "√((1−p)² + Σ_{v≠y} p_v²).</p>"
    )
    return _section(f"Where the gradient goes, by {groups.title}", drawn + _table(["", *labels], rows) + note)
