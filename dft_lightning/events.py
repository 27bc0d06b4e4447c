"""What a run says while it goes: TensorBoard's event files, and lines on the terminal."""

import logging
import warnings
from collections.abc import Callable, Mapping
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
    log_hyperparams = _named(TensorBoardLogger.log_hyperparams)  # type: ignore[assignment]
    save = _named(TensorBoardLogger.save)
    finalize = _named(TensorBoardLogger.finalize)


def _escape(record: logging.LogRecord) -> bool:
    if not isinstance(record.args, Mapping):
        record.args = tuple(printable(value) if isinstance(value, str) else value for value in record.args or ())
    record.msg, record.args = lines_of(record.getMessage()), ()
    return True


def escape_logs() -> None:
    """Show names of files, columns and models in messages and warnings as escapes where a terminal would obey them."""
    for name in ("lightning.pytorch", "lightning.fabric", "dft_lightning"):
        for handler in logging.getLogger(name).handlers or [logging.lastResort]:
            if handler is not None and _escape not in handler.filters:
                handler.addFilter(_escape)
    usual = warnings.formatwarning
    if getattr(usual, "_escapes", False):
        return

    def escaped(message: Any, *args: Any, **options: Any) -> str:
        return usual(lines_of(str(message)), *args, **options)  # type: ignore[arg-type]

    escaped._escapes = True  # type: ignore[attr-defined]
    warnings.formatwarning = escaped  # type: ignore[assignment]
