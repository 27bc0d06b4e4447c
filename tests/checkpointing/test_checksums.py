"""A changed byte of a checkpoint is found, in either form, and a run resumes from the one before."""

import os
import random

import pytest
import torch
import torch.distributed as dist
from test_run_checkpoints import BOTH, Killed, assert_same, checkpoint, dies, fail

from dft_lightning.checkpointing import RunCheckpoints, checksums, folder, place, read, reading, skeleton
from dft_lightning.checkpointing.reading import newest_whole
from dft_lightning.errors import UserError

#: Some of 20 in `make test`, all of them in `make test-all`.
SEEDS = [*range(4), *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(4, 20))]


@pytest.fixture(autouse=True)
def group():
    """A process that talks to itself: folders are written by ranks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    reading.DAMAGED.clear()


def files_of(path):
    return sorted(path.iterdir()) if path.is_dir() else [path]


def changed(path, edit):
    """Edit a file's bytes in place, later than it was written."""
    content, then = bytearray(path.read_bytes()), path.stat().st_mtime_ns
    path.write_bytes(edit(content) or content)
    os.utime(path, ns=(then + 10**9, then + 10**9))


def flip(path, seed):
    """One bit, at any of all places of all files."""
    chosen = random.Random(seed)
    file = chosen.choice(files_of(path))
    place = chosen.randrange(file.stat().st_size)
    changed(file, lambda content: content.__setitem__(place, content[place] ^ (1 << chosen.randrange(8))))


def without_checksums(path):
    """As an earlier version wrote it."""
    for file in files_of(path):
        changed(file, lambda content: content[: -checksums._LENGTH])
        assert not checksums.is_sealed(file)


@BOTH
@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt", "stopped.ckpt"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_changed_bit_is_found_wherever_it_is(sharded, name, seed, tmp_path):
    path = tmp_path / name
    RunCheckpoints(sharded).save_checkpoint(checkpoint(), path)
    assert_same(read(path), checkpoint())
    flip(path, seed)
    for reader in (read, skeleton, newest_whole):
        with pytest.raises(UserError, match=r"cannot read checkpoint .*\.ckpt"):
            reader(path)


@BOTH
def test_every_file_has_a_checksum_and_others_read_it_all_the_same(sharded, tmp_path):
    path = tmp_path / "last.ckpt"
    RunCheckpoints(sharded).save_checkpoint(checkpoint(), path)
    assert all(checksums.is_sealed(file) for file in files_of(path))
    found = torch.load(path / folder.REST if sharded else path, weights_only=True)
    assert found["global_step"] == 12


@BOTH
def test_one_of_an_earlier_version_is_read(sharded, tmp_path):
    path = tmp_path / "last.ckpt"
    RunCheckpoints(sharded).save_checkpoint(checkpoint(), path)
    without_checksums(path)
    assert_same(read(path), checkpoint())
    assert newest_whole(path) == path


def test_changed_values_in_a_file_of_an_earlier_version_are_found_too(tmp_path):
    """A zip file has checksums of its own, which `torch.load` does not look at where it maps the file."""
    path = tmp_path / "last.ckpt"
    RunCheckpoints().save_checkpoint(checkpoint(7.0), path)
    without_checksums(path)
    at = path.read_bytes().index(torch.full((3,), 7.0).numpy().tobytes())
    changed(path, lambda content: content.__setitem__(at, content[at] ^ 1))
    with pytest.raises(UserError, match="has not the checksum"):
        read(path)


def test_a_part_that_has_lost_its_checksum_is_found(tmp_path):
    path = tmp_path / "last.ckpt"
    RunCheckpoints(sharded=True).save_checkpoint(checkpoint(), path)
    (part,) = path.glob("*.distcp")
    changed(part, lambda content: content[: -checksums._LENGTH])
    with pytest.raises(UserError, match=r"distcp has lost its checksum"):
        skeleton(path)


def test_what_is_written_is_compared_with_what_was_in_memory(tmp_path, monkeypatch):
    io, path, save = RunCheckpoints(), tmp_path / "last.ckpt", torch.save
    io.save_checkpoint(checkpoint(), path)

    def damaging(content, target):
        save(content, target)
        at = target.read_bytes().index(torch.full((3,), 7.0).numpy().tobytes())
        changed(target, lambda written: written.__setitem__(at, written[at] ^ 1))

    monkeypatch.setattr(torch, "save", damaging)
    with pytest.raises(UserError, match="the one before it is still there"):
        io.save_checkpoint(checkpoint(7.0), path)
    assert_same(read(path), checkpoint())


def test_a_file_is_read_once_for_its_checksum(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    RunCheckpoints().save_checkpoint(checkpoint(), path)
    checksums._VERIFIED.clear()
    reads, crc32 = [], checksums._crc32
    monkeypatch.setattr(checksums, "_crc32", lambda *given: reads.append(given) or crc32(*given))
    for _ in range(3):
        skeleton(path)
    assert len(reads) == 1


def value(path):
    return float(read(path)["state_dict"]["embed"][0, 0])


class TestPrevious:
    @BOTH
    @pytest.mark.parametrize("keep", range(4))
    def test_as_many_stay_as_are_asked_for(self, sharded, keep, tmp_path):
        path = tmp_path / "last.ckpt"
        for number in range(6):
            RunCheckpoints(sharded, keep_previous=keep).save_checkpoint(checkpoint(float(number)), path)
        kept = [path, *(place.before(path, number + 1) for number in range(keep))]
        assert sorted(tmp_path.iterdir()) == sorted(kept)
        assert [value(each) for each in kept] == [5.0 - number for number in range(keep + 1)]
        RunCheckpoints(sharded).save_checkpoint(checkpoint(), path)
        assert [*tmp_path.iterdir()] == [path]

    def test_of_the_last_alone(self, tmp_path):
        for _ in range(2):
            RunCheckpoints(keep_previous=1).save_checkpoint(checkpoint(), tmp_path / "best.ckpt")
        assert [*tmp_path.iterdir()] == [tmp_path / "best.ckpt"]

    @BOTH
    @pytest.mark.parametrize("seed", range(3))
    def test_is_taken_where_the_last_is_damaged_and_survives_the_next(self, sharded, seed, tmp_path):
        """The damaged one does not take its place: then none would be left."""
        path, io = tmp_path / "last.ckpt", RunCheckpoints(sharded, keep_previous=1)
        for number in range(2):
            io.save_checkpoint(checkpoint(float(number)), path)
        flip(path, seed)
        with pytest.raises(UserError, match=r"the previous one is .*\.last\.ckpt\.before"):
            read(path)
        with pytest.warns(UserWarning, match=r"Taking the one before it, .*\.last\.ckpt\.before"):
            found = newest_whole(path)
        assert value(found) == 0.0
        io.save_checkpoint(checkpoint(2.0), path)
        assert [value(path), value(place.before(path))] == [2.0, 0.0]

    def test_an_older_one_is_taken_where_the_previous_one_is_damaged_too(self, tmp_path):
        path = tmp_path / "last.ckpt"
        for number in range(3):
            RunCheckpoints(keep_previous=2).save_checkpoint(checkpoint(float(number)), path)
        flip(path, 0)
        flip(place.before(path), 1)
        with pytest.warns(UserWarning, match="Taking the one before it"):
            assert value(newest_whole(path)) == 0.0

    @BOTH
    @pytest.mark.parametrize("after", range(4))
    @pytest.mark.parametrize("damaged", [False, True])
    def test_there_is_a_valid_one_whenever_it_is_killed(self, sharded, after, damaged, tmp_path, monkeypatch):
        path, io = tmp_path / "last.ckpt", RunCheckpoints(sharded, keep_previous=1)
        for number in range(2):
            io.save_checkpoint(checkpoint(float(number)), path)
        if damaged:
            flip(path, 0)
            with pytest.warns(UserWarning, match="Taking"):
                newest_whole(path)
        with monkeypatch.context() as patched:
            calls = iter(range(99))
            for owner, name in ((place, "remove"), (place.os, "replace"), (place.os, "link")):
                patched.setattr(owner, name, dies(getattr(owner, name), calls, after))
            with pytest.raises(Killed):
                io.save_checkpoint(checkpoint(2.0), path)
        assert value(newest_whole(path)) in (0.0 if damaged else 1.0, 2.0)
        io.save_checkpoint(checkpoint(3.0), path)
        assert value(path) == 3.0
        assert value(place.before(path)) in (0.0, 1.0, 2.0)

    def test_without_links_it_is_moved(self, tmp_path, monkeypatch):
        monkeypatch.setattr(place.os, "link", fail)
        path = tmp_path / "last.ckpt"
        for number in range(2):
            RunCheckpoints(keep_previous=1).save_checkpoint(checkpoint(float(number)), path)
        assert [value(path), value(place.before(path))] == [1.0, 0.0]
