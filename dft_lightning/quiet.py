"""Lines of libraries that a user of `dft` can do nothing about are left out, each by its logger and its words."""

import logging
import re
import warnings

from dft_lightning.progress_lines import use_lines

#: Warnings by the beginning of their text.
_WARNINGS = (
    "LightningCLI's args parameter",
    ".*LeafSpec",
    ".*GPU available but not used",
    ".*does not have many workers",
    ".*sync_dist=True.*",  # what is logged is the same on all ranks already
    ".*your dataloader is not resumable.*",  # our data module is
    r"You called `self\.log\('(val|test)/.*no logger configured",  # the table shows it
    "Total length of `list` across ranks is zero",  # no validation rows are asked for
    "You are using a custom batch sampler `StepSampler`",  # it returns every row
    r"torch\.distributed\.nn\.functional\.all_gather is deprecated",  # called by Lightning
    "`is_gradient_checkpointing` is deprecated",  # asked for by peft
)
_START = r".*litlogger|.*estimate number of|TPU available: False|GPU available: False, used: False|-{20,}\ndistribut"
#: Records by their logger and the beginning of their text.
_RECORDS = {
    "lightning.pytorch.utilities.rank_zero": _START,  # devices and ranks are in the run's summary
    "lightning.fabric.utilities.rank_zero": _START,
    "lightning.fabric.utilities.seed": ".*Seed set to",  # all seeds are in the summary
    "lightning.fabric.utilities.distributed": "Initializing distributed",  # one line per rank
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # peft imports it in every run
}


def quieten() -> None:
    """Leave these lines out, for the rest of the process; progress bars become lines in log files."""
    use_lines()
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message)
    for name, pattern in _RECORDS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Without) for each in logger.filters):
            logger.addFilter(_Without(pattern))


class _Without(logging.Filter):
    """Drops the records whose text begins like this."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return self.pattern.match(record.getMessage()) is None
