"""A checkpoint on disk is whole or not there, in either form, and one that is damaged is never taken for whole."""

import pickle
import threading

import pytest
import torch
import torch.distributed as dist

from dft_lightning.checkpointing import RunCheckpoints, folder, place, read, skeleton
from dft_lightning.checkpointing import io as writing
from dft_lightning.checkpointing.reading import newest_whole
from dft_lightning.errors import UserError


@pytest.fixture(autouse=True)
def group():
    """A process that talks to itself: folders are written by ranks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def checkpoint(value=1.0):
    """A tied weight, a buffer of another dtype, an optimizer with a number among its state, and what else there is."""
    tied = torch.full((3, 4), value)
    state = {"embed": tied, "counts": torch.arange(5), "head": tied}
    moments = {0: {"step": torch.tensor(7.0), "exp_avg": tied * 2, "name": "x"}, 3: {}}
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-3, "params": [0, 3]}]}
    return {"state_dict": state, "optimizer_states": [optimizer], "global_step": 12, "loops": {"a": [1, 2]}}


def assert_same(ours, theirs):
    assert type(ours) is type(theirs) or isinstance(ours, torch.Tensor)
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_same(ours[key], value)
    elif isinstance(theirs, list):
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other)
    else:
        assert ours == theirs


BOTH = pytest.mark.parametrize("sharded", [False, True], ids=["file", "folder"])
FORMS = [(sharded, asynchronous) for sharded in (False, True) for asynchronous in (False, True)]


@pytest.fixture(params=FORMS, ids=["file", "file meanwhile", "folder", "folder meanwhile"])
def io(request):
    return RunCheckpoints(*request.param)


class TestWriting:
    def test_what_is_read_is_what_was_written(self, io, tmp_path):
        io.save_checkpoint(checkpoint(), tmp_path / "run" / "last.ckpt")
        io.wait()
        found = io.load_checkpoint(tmp_path / "run" / "last.ckpt")
        assert_same(found, checkpoint())
        assert found["state_dict"]["embed"] is found["state_dict"]["head"] or not io.sharded
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["last.ckpt"]

    def test_one_takes_the_others_place_whatever_its_form(self, io, tmp_path):
        for number, other in enumerate([io, RunCheckpoints(not io.sharded), io]):
            other.save_checkpoint(checkpoint(float(number)), tmp_path / "last.ckpt")
            other.wait()
            assert_same(read(tmp_path / "last.ckpt"), checkpoint(float(number)))
            assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]

    @BOTH
    def test_what_is_written_meanwhile_is_the_state_it_had(self, sharded, tmp_path, monkeypatch):
        go = threading.Event()
        finish = place.finish
        monkeypatch.setattr(place, "finish", lambda path, keep=0: go.wait(20) and finish(path, keep))
        io, state = RunCheckpoints(sharded, asynchronous=True), checkpoint()
        io.save_checkpoint(state, tmp_path / "last.ckpt")
        state["state_dict"]["embed"].zero_()
        state["loops"]["a"].append(3)
        state["optimizer_states"][0]["param_groups"][0]["lr"] = 0.0
        assert not (tmp_path / "last.ckpt").exists()
        go.set()
        io.wait()
        assert_same(read(tmp_path / "last.ckpt"), checkpoint())

    def test_an_error_names_the_checkpoint_and_leaves_the_one_before(self, io, tmp_path, monkeypatch):
        io.save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
        io.wait()
        monkeypatch.setattr(place, "on_disk", fail)
        with pytest.raises(UserError, match="no space left"):
            saved(io, checkpoint(2.0), tmp_path / "last.ckpt")
        assert_same(read(newest_whole(tmp_path / "last.ckpt")), checkpoint())

    @BOTH
    def test_an_error_meanwhile_is_raised_where_the_next_begins(self, sharded, tmp_path, monkeypatch):
        io = RunCheckpoints(sharded, asynchronous=True)
        with monkeypatch.context() as patched:
            patched.setattr(place, "finish", fail)
            io.save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
            while not io._under_way[1].done():
                pass
        with pytest.raises(UserError, match=r"last\.ckpt could not be written \(.*no space left"):
            io.save_checkpoint(checkpoint(), tmp_path / "last.ckpt")

    def test_the_one_before_stays_until_the_folder_is_found_whole(self, tmp_path, monkeypatch):
        io = RunCheckpoints(sharded=True)
        io.save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
        save = writing.save

        def cut(*args, **options):
            save(*args, **options)
            (part,) = options["checkpoint_id"].glob("*.distcp")
            part.write_bytes(part.read_bytes()[:-100])

        monkeypatch.setattr(writing, "save", cut)
        with pytest.raises(UserError, match="bytes of"):
            io.save_checkpoint(checkpoint(2.0), tmp_path / "last.ckpt")
        assert_same(read(tmp_path / "last.ckpt"), checkpoint())

    def test_an_error_of_ranks_is_one_line_too(self, tmp_path, monkeypatch):
        """PyTorch's own is no `Exception`."""
        monkeypatch.setattr("torch.distributed.checkpoint.filesystem.os.fsync", fail)
        io = RunCheckpoints(sharded=True)
        monkeypatch.setattr(place, "on_disk", lambda path: None)
        with pytest.raises(UserError, match="no space left"):
            io.save_checkpoint(checkpoint(), tmp_path / "last.ckpt")

    def test_a_folder_that_cannot_be_made_is_one_line(self, tmp_path):
        """As on a disk that is full, on all ranks alike."""
        (tmp_path / "checkpoints").write_text("in the way")
        with pytest.raises(UserError, match=r"last\.ckpt could not be written"):
            RunCheckpoints(sharded=True).save_checkpoint(checkpoint(), tmp_path / "checkpoints" / "last.ckpt")

    def test_a_file_that_is_not_whole_takes_no_place(self, tmp_path, monkeypatch):
        io = RunCheckpoints()
        io.save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
        monkeypatch.setattr(torch, "save", lambda state, path: path.write_bytes(b"half"))
        with pytest.raises(UserError, match="damaged"):
            io.save_checkpoint(checkpoint(2.0), tmp_path / "last.ckpt")
        assert_same(read(tmp_path / "last.ckpt"), checkpoint())


def saved(io, state, path):
    io.save_checkpoint(state, path)
    io.wait()


def fail(*_):
    raise OSError("no space left on this device")


class TestKilledWhileItWasPutInPlace:
    """What a process leaves that is killed after so many of the steps of `place.finish`."""

    @pytest.fixture
    def killed(self, tmp_path, monkeypatch):
        path = tmp_path / "last.ckpt"

        def leave(after, *forms):
            for number, sharded in enumerate(forms):
                if number == len(forms) - 1:
                    calls = iter(range(99))
                    for owner, name in ((place, "remove"), (place.os, "replace")):
                        monkeypatch.setattr(owner, name, dies(getattr(owner, name), calls, after))
                try:
                    RunCheckpoints(sharded).save_checkpoint(checkpoint(float(number)), path)
                except Killed:
                    monkeypatch.undo()
                    return path
            raise AssertionError(f"it takes fewer than {after} steps")

        return leave

    @pytest.mark.parametrize("forms", [(True, True), (False, True), (True, False)])
    @pytest.mark.parametrize("after", range(5))
    def test_there_is_always_a_whole_one(self, killed, forms, after):
        path = killed(after, *forms)
        found = read(newest_whole(path))
        value = float(found["state_dict"]["embed"][0, 0])
        assert_same(found, checkpoint(value))
        assert value == (1.0 if after == 4 else 0.0)  # clear, clear, set aside, put in place | remove the old
        RunCheckpoints(forms[-1]).save_checkpoint(checkpoint(5.0), path)
        assert_same(read(newest_whole(path)), checkpoint(5.0))
        assert [one.name for one in path.parent.iterdir()] == ["last.ckpt"]

    @pytest.mark.parametrize("after", range(2))
    def test_a_file_replaces_a_file_in_one_step(self, killed, after):
        path = killed(after, False, False)
        assert not place.before(path).exists()
        assert_same(read(path), checkpoint(0.0))


class Killed(BaseException):
    pass


def dies(call, calls, after):
    def called(*args, **options):
        if next(calls) >= after:
            raise Killed
        return call(*args, **options)

    return called


class TestReading:
    @pytest.fixture
    def path(self, tmp_path):
        RunCheckpoints(sharded=True).save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
        return tmp_path / "last.ckpt"

    def test_the_skeleton_of_a_folder_has_shapes_and_all_else(self, path):
        found = skeleton(path)
        assert found["global_step"] == 12
        assert found["state_dict"]["embed"].device.type == "meta"
        assert found["state_dict"]["embed"] is found["state_dict"]["head"]
        assert found["optimizer_states"][0]["state"][0]["exp_avg"].shape == (3, 4)

    def test_the_weights_alone(self, path):
        found = read(path, weights_only=True)
        assert "optimizer_states" not in found
        assert_same(found["state_dict"], checkpoint()["state_dict"])

    def test_a_tensor_that_has_two_names_is_there_once(self, path):
        parts = sum(part.stat().st_size for part in path.glob("*.distcp"))
        assert parts < 5 * 2**12  # four tensors, of which each takes a block of a zip file

    @pytest.mark.parametrize("name", [folder.REST, folder.INDEX, "__0_0.distcp"])
    @pytest.mark.parametrize("how", ["cut", "gone", "empty"])
    def test_a_damaged_folder_is_not_read(self, path, name, how):
        part = path / name
        if how == "gone":
            part.unlink()
        else:
            part.write_bytes(part.read_bytes()[: part.stat().st_size // 2 if how == "cut" else 0])
        with pytest.raises(UserError, match=r"cannot read checkpoint .*last\.ckpt"):
            skeleton(path)
        with pytest.raises(UserError, match="give another ckpt_path, or start anew with --overwrite true"):
            newest_whole(path)

    def test_a_part_that_is_cut_off_is_found_without_checksums_too(self, path):
        """As folders of earlier versions have none: by the lengths that the index names."""
        for part in path.iterdir():
            written = part.read_bytes()
            part.write_bytes(written[: written.rindex(b"\ndft-lightning crc32")])
        assert skeleton(path)
        part = path / "__0_0.distcp"
        written = part.read_bytes()
        part.write_bytes(written[: written.index(b"PK\5\6") + 22])  # the first of its tensors, a valid file of its own
        with pytest.raises(UserError, match=r"cannot read checkpoint .*last\.ckpt"):
            skeleton(path)

    def test_the_one_before_is_taken_where_the_last_is_damaged_and_this_is_said(self, path):
        path.rename(place.before(path))
        path.write_bytes(b"half")
        with pytest.warns(UserWarning, match=r"cannot read checkpoint .*Taking the one before it"):
            assert newest_whole(path) == place.before(path)

    def test_nothing(self, tmp_path):
        assert newest_whole(tmp_path / "last.ckpt") is None

    @pytest.mark.parametrize("content", [torch.ones(3), {"weights": torch.ones(3)}])
    def test_a_file_of_something_else(self, tmp_path, content):
        torch.save(content, tmp_path / "some.pt")
        with pytest.raises(UserError, match="no checkpoint"):
            read(tmp_path / "some.pt")

    def test_an_index_that_would_run_code_is_refused(self, path, tmp_path):
        class Harm:
            def __reduce__(self):
                return (tmp_path / "done").touch, ()

        (path / folder.INDEX).write_bytes(pickle.dumps(Harm()))
        with pytest.raises(UserError, match="does harm"):
            skeleton(path)
        assert not (tmp_path / "done").exists()
