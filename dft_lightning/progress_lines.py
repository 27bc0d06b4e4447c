"""Progress of long work in log files: where tqdm's output is no terminal, a plain line now and then in place of a bar.

Tokenisation, downloads, loading and writing of weights and the reference's pass all show their progress by tqdm,
each from within another library.
"""

import io
import time
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

#: Seconds before the first line, and between two.
EVERY_S = 10.0


def use_lines() -> None:
    """Have every tqdm bar of this process write lines where it cannot redraw one; ranks above 0 show none."""
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    if not hasattr(tqdm, "_draw"):
        tqdm._draw, tqdm._end = tqdm.display, tqdm.close
        tqdm.display, tqdm.close = _display, _close


def _display(bar: Any, *args: Any, **kwargs: Any) -> Any:
    if _is_terminal(bar) and _is_first_rank():
        return bar._draw(*args, **kwargs)
    began = getattr(bar, "start_t", None)  # not set yet while the bar is made
    now = time.time()
    if began is not None and _is_first_rank() and now - max(began, getattr(bar, "_last_line", 0.0)) >= EVERY_S:
        bar._last_line = now
        _write(bar)
    return True


def _close(bar: Any) -> None:
    """The last line, of work that has shown one before."""
    if not bar.disable and not (_is_terminal(bar) and _is_first_rank()):
        if hasattr(bar, "_last_line"):
            _write(bar)
        bar.fp = io.StringIO()  # takes what ends a bar in a terminal
    bar._end()


def _write(bar: Any) -> None:
    bar.fp.write(f"{line(bar.format_dict)}\n")
    getattr(bar.fp, "flush", bool)()


def _is_terminal(bar: Any) -> bool:
    return bool(getattr(bar.fp, "isatty", bool)())


def _is_first_rank() -> bool:
    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0


def line(state: dict[str, Any]) -> str:
    """Such as "Tokenizing: 1,200 of 40,000 examples (3 %), 230 per second, 2.8 min left".

    Args:
        state: tqdm's `format_dict`.
    """
    done, total, elapsed = state["n"], state["total"], state["elapsed"]
    name = (state["prefix"] or "Progress").removesuffix(": ")
    unit = "" if state["unit"] == "it" else f" {state['unit'].strip()}"
    rate = state["rate"] or (done / elapsed if elapsed else 0)
    parts = [f"{name}: {done:,}" + (f" of {total:,}{unit} ({done / total:.0%})" if total else unit)]
    if rate:
        parts.append(f"{rate:,.3g} per second" if rate < 100 else f"{rate:,.0f} per second")
        if total:
            parts.append(f"{max(0, total - done) / rate / 60:.1f} min left")
    return ", ".join(parts)
