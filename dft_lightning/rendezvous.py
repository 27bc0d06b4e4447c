"""Ranks that torchrun has started again find each other, and nothing that ranks of an earlier start have left behind.

torchrun keeps one store over all its restarts (pytorch issue 135712). In it a rank may find where another one *was*
before it was killed, take that for where it is, and wait for it without end. So the ranks of each start agree on a name
that is new, and everything they tell each other is filed under it.
"""

import importlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from itertools import chain, repeat
from typing import Any

from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import PrefixStore, Store

_HERE, _INVITATION = "dft/here", "dft/invitation"
#: Seconds between two looks into the store; many ranks look into the same one.
_PAUSES = (0.01, 0.02, 0.05, 0.1, 0.2)


def meet_anew() -> None:
    """Have process groups be made under a name of this start, where torchrun keeps the store; once a process."""
    handlers: dict[str, Any] = importlib.import_module("torch.distributed.rendezvous")._rendezvous_handlers
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True) and handlers["env"] is not _of_this_start:
        _of_this_start.usual = handlers["env"]  # type: ignore[attr-defined]
        handlers["env"] = _of_this_start


def _of_this_start(
    url: str, timeout: timedelta = default_pg_timeout, **options: Any
) -> Iterator[tuple[Store, int, int]]:
    for store, rank, ranks in _of_this_start.usual(url, timeout=timeout, **options):  # type: ignore[attr-defined]
        yield PrefixStore(agreed_name(store, rank, ranks, timeout.total_seconds()), store), rank, ranks


def agreed_name(store: Store, rank: int, ranks: int, seconds: float) -> str:
    """A name that all ranks of this start know, and that none of an earlier one has used.

    Each rank says that it is here, by a word that only it can know. The first rank invites those it sees, again
    whenever one of them turns out to be of an earlier start; a rank accepts an invitation in which its own word is.
    When all have accepted, the first rank says so.

    Raises:
        TimeoutError: some rank has not come in time.
    """
    word, end = uuid.uuid4().hex, time.monotonic() + seconds
    store.set(f"{_HERE}/{rank}", word)
    invited: list[str] = []
    for pause in chain(_PAUSES, repeat(_PAUSES[-1])):
        if rank == 0:
            invited = _invite(store, ranks, invited)
        if (name := _accepted(store, rank, ranks, word)) is not None:
            return name
        if time.monotonic() > end:
            raise TimeoutError(f"rank {rank}: the {ranks} ranks of this start have not met within {seconds:g} s")
        time.sleep(pause)
    raise AssertionError("the pauses never end")


def _invite(store: Store, ranks: int, invited: list[str]) -> list[str]:
    """Invite the ranks that are here, unless just these are invited already; whose words are on the invitation."""
    places = [f"{_HERE}/{rank}" for rank in range(ranks)]
    if not store.check(places):
        return invited
    here = [word.decode() for word in store.multi_get(places)]
    if here != invited:
        store.set(_INVITATION, json.dumps({"name": uuid.uuid4().hex, "words": here}))
    return here


def _accepted(store: Store, rank: int, ranks: int, word: str) -> str | None:
    """The name, once all have accepted the same invitation; this rank accepts any that is for it."""
    if not store.check([_INVITATION]):
        return None
    invitation = json.loads(store.get(_INVITATION))
    name: str = invitation["name"]
    if invitation["words"][rank] != word:
        return None
    store.set(f"dft/{name}/{rank}", "")
    if rank == 0 and store.check([f"dft/{name}/{other}" for other in range(ranks)]):
        store.set(f"dft/{name}", "all")
    return name if store.check([f"dft/{name}"]) else None
