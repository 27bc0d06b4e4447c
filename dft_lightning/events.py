"""What a run says while it goes: TensorBoard's event files, and lines on the terminal."""

import logging
import os
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from dft_lightning.disk import writing
from dft_lightning.errors import lines_of, printable


def _named(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: TensorBoardLogger, *args: Any, **options: Any) -> Any:
        with writing(self.log_dir, "--run_dir"):
            return method(self, *args, **options)

    return call


class EventLogger(TensorBoardLogger):
    """TensorBoard's logger; a disk that takes no more events is one line."""

    log_metrics = _named(TensorBoardLogger.log_metrics)
    log_hyperparams = _named(TensorBoardLogger.log_hyperparams)
    save = _named(TensorBoardLogger.save)
    finalize = _named(TensorBoardLogger.finalize)


#: Whose messages have one line each, so that a line break in them is that of a name: ours, and those with a path.
_PACKAGE, _WITH_PATHS = os.path.dirname(__file__), "checkpoint_connector.py"


def _shown(text: str, file: str) -> str:
    return printable(text) if file.startswith(_PACKAGE) or file.endswith(_WITH_PATHS) else lines_of(text)


def _escape(record: logging.LogRecord) -> bool:
    record.msg, record.args = _shown(record.getMessage(), record.pathname), ()
    return True


def escape_logs() -> None:
    """Show names of files, columns and models in messages and warnings as escapes where a terminal would obey them."""
    for name in ("lightning.pytorch", "lightning.fabric", "dft_lightning"):
        for handler in [*logging.getLogger(name).handlers, logging.lastResort]:
            if handler is not None and _escape not in handler.filters:
                handler.addFilter(_escape)
    usual = warnings.formatwarning
    if getattr(usual, "_escapes", False):
        return

    def escaped(message: Any, category: type[Warning], filename: str, *args: Any, **options: Any) -> str:
        return usual(_shown(str(message), filename), category, filename, *args, **options)

    escaped._escapes = True  # type: ignore[attr-defined]
    warnings.formatwarning = escaped
