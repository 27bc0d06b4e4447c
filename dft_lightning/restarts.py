"""Whether a launcher has started this run again by itself, with the very command it began with."""

import os
from pathlib import Path

from dft_lightning.environment import starts


def job() -> str | None:
    """The launcher's name for what it starts, and starts again; None without such a launcher."""
    for launcher, name in (("SLURM job", "SLURM_JOB_ID"), ("torchrun", "TORCHELASTIC_RUN_ID")):
        if found := os.environ.get(name):
            return f"{launcher} {found}"
    return None


def is_started_again(run_dir: Path) -> bool:
    """Whether the last start in the folder was by this job, which has been started again since.

    Then the run goes on, whatever the command says about a start: `--overwrite true` would begin it anew each time.
    """
    counts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    if not any(count.isdigit() and int(count) for count in counts) or job() is None:
        return False
    earlier = starts(run_dir)
    return bool(earlier) and earlier[-1].get("job") == job()
