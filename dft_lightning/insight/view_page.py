"""Rows as one HTML file: colours by p, weight or mask, the numbers on hovering, no script and no network."""

from dft_lightning.insight.ansi import heading, visible
from dft_lightning.insight.page import document, safe
from dft_lightning.insight.view import Document, Line, Shown

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2129; background: #f5f6f8; margin: 0; padding: 20px; }
h1 { font-size: 22px; margin: 0 0 4px; } h2 { font-size: 14px; margin: 0 0 6px; color: #4a505c; }
.note { color: #5b616d; font-size: 13px; margin: 2px 0 10px; }
article { background: #fff; border: 1px solid #e2e5ea; border-radius: 8px; padding: 12px 16px; margin: 12px 0; }
article.packed { border: 2px solid #6a51a3; }
.document + .document { border-top: 2px dashed #6a51a3; margin-top: 14px; padding-top: 12px; }
.padding { color: #6a51a3; font-size: 13px; border-top: 2px dashed #6a51a3; margin: 14px 0 0; padding-top: 8px; }
pre { font: 14px/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
pre span { color: #8a8f98; }
pre span.s { color: #16181d; border-radius: 3px; box-shadow: inset 0 0 0 1px rgba(0,0,0,.07); }
pre span.stop { box-shadow: inset 0 0 0 2px #d55e00; }
pre span.stop::after { content: "■"; color: #d55e00; }
pre span:hover { outline: 2px solid #1d2129; }
input[name=by] { margin: 0 4px 0 14px; }
#by-mask:checked ~ main .s { background: #bfdcf5; }
#by-p:checked ~ main .s { background: hsl(calc(var(--p) * 120) 80% 80%); }
#by-weight:checked ~ main .s { background: rgba(0, 114, 178, calc(var(--w) * .75)); }
#by-p:checked ~ .scale.p, #by-weight:checked ~ .scale.w, #by-mask:checked ~ .scale.m { display: inline-block; }
.scale { display: none; margin-left: 22px; font-size: 13px; color: #5b616d; }
.scale i { display: inline-block; width: 120px; height: 11px; vertical-align: -1px; margin: 0 6px; border-radius: 2px; }
.scale.p i { background: linear-gradient(90deg, hsl(0 80% 80%), hsl(60 80% 80%), hsl(120 80% 80%)); }
.scale.w i { background: linear-gradient(90deg, #fff, rgba(0, 114, 178, .75)); }
.scale.m i { background: #bfdcf5; }
"""


def view_page(lines: list[Line], facts: dict[str, str], *, scored: bool) -> str:
    """The whole file.

    Args:
        facts: for its head.
        scored: whether tokens have scores; without, only the mask can be shown.
    """
    tokens = [token for line in lines for part in line.documents for token in part.tokens]
    most = max((token.score.weight for token in tokens if token.score), default=0.0)
    said = "<br>".join(f"{safe(name)}: <b>{safe(value)}</b>" for name, value in facts.items())
    body = f'<h1>Rows as the model sees them</h1><p class="note">{said}</p>{_switch(most, scored)}'
    body += f"<main>{''.join(_line(line, most) for line in lines)}</main>"
    return document("dft inspect", body, _STYLE)


def _switch(most: float, scored: bool) -> str:
    """What the colours show, chosen by radio buttons that the style sheet reads."""
    names = ["p", "weight", "mask"] if scored else ["mask"]
    buttons = [
        f'<input type="radio" name="by" id="by-{name}"{" checked" if name == names[0] else ""}>'
        f'<label for="by-{name}">colour by {name}</label>'
        for name in names
    ]
    scales = [
        '<span class="scale p">0<i></i>1</span>',
        f'<span class="scale w">0<i></i>{most:.3g}</span>',
        '<span class="scale m"><i></i>learnt; grey: not</span>',
    ]
    return "".join([*buttons, *scales])


def _line(line: Line, most: float) -> str:
    packed = ' class="packed"' if len(line.documents) > 1 else ""
    parts = [_document(part, place, len(line.documents), most) for place, part in enumerate(line.documents)]
    padding = f'<p class="padding">{line.padding} positions of padding</p>' if line.padding else ""
    return f"<article{packed}>{''.join(parts)}{padding}</article>\n"


def _document(part: Document, place: int, of: int, most: float) -> str:
    tokens = "".join(_token(token, most) for token in part.tokens)
    return f'<div class="document"><h2>{safe(heading(part, place, of))}</h2><pre>{tokens}</pre></div>'


def _token(token: Shown, most: float) -> str:
    kinds = " ".join(["s"] * token.learnt + ["stop"] * token.stop)
    score, style = token.score, ""
    if score is not None:
        share = score.weight / most if most > 0 else 0.0
        style = f' style="--p:{score.p:.3f};--w:{max(share, 0.0):.3f}"'
    kind = f' class="{kinds}"' if kinds else ""
    text = "\n".join(safe(part) for part in visible(token.text).split("\n"))
    return f'<span{kind}{style} title="{_tip(token)}">{text}</span>'


def _tip(token: Shown) -> str:
    """What hovering shows, a fact a line."""
    facts = [f"id {token.id}", repr(token.text)]
    if token.stop:
        facts.append("stop token")
    if not token.learnt:
        facts.append("not learnt")
    if token.score is not None:
        score = token.score
        facts += [f"p {score.p:.4g}", f"weight {score.weight:.4g}"]
        facts += [f"entropy {score.entropy:.3f} nats", f"rank {score.rank}"]
    return "&#10;".join(safe(fact) for fact in facts)
