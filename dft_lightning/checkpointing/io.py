"""Writes checkpoints of the trainer: beside and renamed, in either form, and meanwhile or at once."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from dft_lightning.checkpointing import checksums, folder, place
from dft_lightning.checkpointing.reading import DAMAGED, read, skeleton
from dft_lightning.disk import disk_error
from dft_lightning.errors import UserError


class RunCheckpoints(CheckpointIO):
    """Lightning's way to a checkpoint on disk: it is always whole, and reading it knows both forms.

    In the background, memory on the host holds a copy of what is written (of a folder, each rank's parts). One is
    written at a time; an error in the writing of one is raised where the next would begin, or at the end.

    Args:
        sharded: a folder, to which all ranks write. They all have to call then; for a file, the first alone.
        asynchronous: copy, and write while the training goes on.
        keep_previous: how many previous ones of each name in `kept_names` stay on disk.
    """

    kept_names = ("last.ckpt",)

    def __init__(self, sharded: bool = False, asynchronous: bool = False, keep_previous: int = 0) -> None:
        self.sharded, self.asynchronous, self.keep_previous = sharded, asynchronous, keep_previous
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._under_way: tuple[Path, Future[Any]] | None = None
        self._group: dist.ProcessGroup | None = None
        self._goes_on = True

    def prepare(self, strategy: Any, goes_on: bool) -> None:
        """Before the first call: what ranks of a folder speak over, so that it is known to work; all have to call.

        Args:
            strategy: the trainer's.
            goes_on: whether what is read is trained on; else the optimizers' state is left on disk.
        """
        self._goes_on = goes_on
        if self.sharded and goes_on and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=strategy._timeout)
            dist.barrier(group=self._group)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write it, or begin to.

        Raises:
            UserError: it could not be written, or the one before it could not.
        """
        self.wait()
        final = Path(path)
        with _naming(final):
            if self.sharded:
                self._save_folder(checkpoint, final)
            elif self._thread is None:
                _write_file(checkpoint, final, self._kept(final))
            else:
                written = self._thread.submit(_write_file, copied(checkpoint), final, self._kept(final))
                self._under_way = final, written

    def _kept(self, final: Path) -> int:
        return self.keep_previous if final.name in self.kept_names else 0

    def _save_folder(self, checkpoint: dict[str, Any], final: Path) -> None:
        tensors, first = folder.tensors_of(checkpoint), dist.get_rank() == 0
        new = place.unfinished(final)
        options: dict[str, Any] = {"checkpoint_id": new, "process_group": self._gloo()}
        options["storage_writer"] = folder.Writer(new)
        failure = [_begun(folder.without_tensors(checkpoint), final) if first else ""]
        dist.broadcast_object_list(failure, src=0, group=self._gloo())  # the folder is there, or none goes on
        if failure[0]:
            raise OSError(failure[0])
        if self._thread is None:
            save(tensors, **options)
            if first:
                _put(final, self._kept(final))
            return
        written: Any = async_save(tensors, **options)
        put = self._thread.submit(_once_written, written, final, self._kept(final)) if first else written
        self._under_way = final, put

    def _gloo(self) -> dist.ProcessGroup:
        """One of its own, on the host: what ranks say meanwhile goes past what the training says."""
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        return self._group

    def wait(self) -> None:
        """Until what is under way is written.

        Raises:
            UserError: it could not be.
        """
        if self._under_way is None:
            return
        (path, future), self._under_way = self._under_way, None
        with _naming(path):
            future.result()

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Whole, on the host; without the optimizers where nothing is trained."""
        return read(Path(path), weights_only=not self._goes_on)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Of either form."""
        self.wait()
        place.remove(Path(path))

    def teardown(self) -> None:
        """Nothing is left half written by a run that ends."""
        self.wait()


def copied(value: Any) -> Any:
    """A state of which no later step of the training changes anything; its tensors are on the host."""
    known: dict[int, Tensor] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in known:
                known[id(value)] = value.detach().to("cpu", copy=True)
            return known[id(value)]
        if isinstance(value, dict):
            return {key: walk(inner) for key, inner in value.items()}
        if type(value) in (list, tuple):
            return type(value)(walk(inner) for inner in value)
        return value

    return walk(value)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn what goes wrong into one line."""
    try:
        yield
    except UserError:
        raise
    except (Exception, CheckpointException) as error:  # file system, torch and its distributed part share no class
        with suppress(OSError):  # it may be what fills the disk
            place.remove(place.unfinished(path))
        kept = "the one before it is still there" if path.exists() else "there is none before it"
        raise UserError(
            f"the checkpoint {path} could not be written ({_reason(error)}): {kept}. Make room or mend the disk, and "
            "start the same command again"
        ) from error


def _reason(error: BaseException) -> str:
    """What the disk said, where that is at the bottom of it: torch speaks of unexpected positions in a file."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    found = next((one for one in chain if isinstance(one, OSError)), None) or disk_error(chain[0]) or chain[0]
    return " ".join(str(found).split())[:300]


def _begun(rest: dict[str, Any], final: Path) -> str:
    """Make the folder; what went wrong, for the ranks that wait for it."""
    try:
        place.begin(final).mkdir()
        _write_sealed(rest, place.unfinished(final) / folder.REST)
    except (OSError, RuntimeError) as error:
        return _reason(error) or type(error).__name__
    return ""


def _write_file(checkpoint: dict[str, Any], final: Path, keep: int) -> None:
    _write_sealed(checkpoint, place.begin(final))
    _put(final, keep)


def _once_written(written: Any, final: Path, keep: int) -> None:
    written.result()
    _put(final, keep)


def _put(final: Path, keep: int) -> None:
    """The one before it goes, or becomes the previous one, only after this one is found valid.

    Each file's bytes were compared with those in memory, or read for their checksum, by the rank that wrote it.
    """
    new = place.unfinished(final)
    if new.is_dir():
        checksums.seal(new / folder.INDEX)
    skeleton(new, verify=False)
    if final.resolve() in DAMAGED:  # a valid previous one stays in place of this one
        DAMAGED.discard(final.resolve())
        place.remove(final)
    place.finish(final, keep)


def _write_sealed(content: dict[str, Any], path: Path) -> None:
    torch.save(content, path)
    checksums.seal(path)
