"""The run's seed: what is drawn at random follows from it."""

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities import rank_zero_info

from dft_lightning.errors import UserError

_VARIABLE = "PL_GLOBAL_SEED"
_LIMIT = 2**32
#: Variables that a launcher sets for each process of several.
_LAUNCHED = ("LOCAL_RANK", "RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")


def run_seed() -> int:
    """That of `seed_everything`, which all processes of a run share; 0 where it was not called."""
    return int(os.environ.get(_VARIABLE, "0"))


def drawn(asked: bool | int) -> bool | int:
    """The seed that `--seed_everything` asks for: true draws one, which the processes of a run share.

    Raises:
        UserError: it is no seed, or each process of a launcher would draw another one.
    """
    if isinstance(asked, int) and not isinstance(asked, bool) and not 0 <= asked < _LIMIT:
        raise UserError(f"--seed_everything is {asked}; expected a number from 0 to {_LIMIT - 1}, true, or false")
    if asked is not True:
        return asked
    if not any(name in os.environ for name in _LAUNCHED):
        return secrets.randbelow(_LIMIT)
    if _VARIABLE not in os.environ:
        raise UserError(
            "--seed_everything true draws a seed, but each process that the launcher starts would draw another one: "
            "give a number"
        )
    return run_seed()  # that of the process which started this one


def resumed(asked: bool | int, now: bool | int, facts: Mapping[str, Any]) -> bool | int:
    """The seed of a run that resumes: where one was drawn, it is the checkpoint's.

    Args:
        asked: as given; now: the seed in force.
        facts: what the checkpoint keeps.
    """
    then = facts.get("settings", {}).get("seed")
    if asked is not True or then is None:
        return now
    rank_zero_info(f"seed_everything true: the seed is {then}, which was drawn when the run began")
    return int(seed_everything(then, workers=True, verbose=False))


def data_seed(asked: int | None, facts: Mapping[str, Any]) -> int | None:
    """The option `data.seed` of a run that resumes: earlier versions' default was 0, whatever the run's seed."""
    then = facts.get("identity", {}).get("data", {}).get("seed")
    if asked is not None or then is None or "data_seed" in facts:
        return asked
    rank_zero_info(f"data.seed is {then}, as in the checkpoint, which was written when that was the default")
    return int(then)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it torch draws on the host by this seed, whatever was drawn before; afterwards as if nothing had been."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also set the devices' generators
    try:
        yield
    finally:
        torch.set_rng_state(state)
