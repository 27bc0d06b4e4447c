"""Ranks that are started again agree on a name that no earlier start has used, whatever that has left in the store."""

import importlib
import json
import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from dft_lightning.cli import main
from dft_lightning.rendezvous import agreed_name


def names(store, ranks: int, late: int | None = None) -> list[str]:
    """What each rank takes for the name; one of them comes when the others have looked around for a while."""
    found: dict[int, str] = {}

    def meet(rank: int) -> None:
        time.sleep(0.3 if rank == late else 0.0)
        found[rank] = agreed_name(store, rank, ranks, 20.0)

    threads = [threading.Thread(target=meet, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    return [found[rank] for rank in range(ranks)]


@pytest.mark.parametrize("late", [0, 1, 2, None])
def test_each_start_has_one_name_of_its_own(late):
    store, known = HashStore(), set()
    for _ in range(4):
        (name,) = set(names(store, 3, late))
        assert name not in known
        known.add(name)


@pytest.mark.parametrize("late", [0, 1])
def test_an_earlier_start_that_went_no_further_is_passed_over(late):
    """Of which one rank was killed before it came, after it came, or after it was invited."""
    store = HashStore()
    store.set("dft/here/0", "killed")
    names(store, 2, late)
    store.set("dft/here/1", "killed")
    store.set("dft/invitation", json.dumps({"name": "earlier", "words": ["killed", "killed"]}))
    store.set("dft/earlier/0", "")
    store.set("dft/earlier/1", "")
    store.set("dft/earlier", "all")
    (name,) = set(names(store, 2, late))
    assert name != "earlier"


@pytest.fixture
def handlers(monkeypatch):
    """How process groups are made, by a store of this process."""
    store, found = HashStore(), importlib.import_module("torch.distributed.rendezvous")._rendezvous_handlers
    monkeypatch.setitem(found, "env", lambda url, **options: iter([(store, 0, 1)]))
    return store, found


def test_under_torchrun_what_ranks_tell_each_other_is_filed_under_that_name(handlers, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for command in ("nothing", "neither"):  # in each start of a process, and once only
        with pytest.raises(SystemExit):
            main(["fit", command])
    kept, found = handlers
    kept.set("where", "there")
    for _ in range(2):
        ((store, rank, ranks),) = found["env"]("env://", timeout=timedelta(seconds=20))
        assert (rank, ranks) == (0, 1)
        assert not store.check(["where"])
        store.set("where", "here")
    assert kept.get("where") == b"there"


def test_elsewhere_nothing_is_changed(handlers, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(SystemExit):
        main(["fit", "nothing"])
    ((store, _, _),) = handlers[1]["env"]("env://", timeout=timedelta(seconds=20))
    assert store is handlers[0]


def test_a_rank_that_does_not_come_is_not_waited_for_without_end():
    store = HashStore()
    store.set_timeout(timedelta(seconds=5))
    with pytest.raises(TimeoutError, match=r"rank 0: the 2 ranks of this start have not met within 0\.3 s"):
        agreed_name(store, 0, 2, 0.3)
    store.set("dft/here/1", "of an earlier start")
    with pytest.raises(TimeoutError):
        agreed_name(store, 0, 2, 0.3)
