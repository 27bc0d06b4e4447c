"""A checkpoint as a folder, to which each rank writes the parts that it holds (PyTorch's distributed checkpoint).

`meta.pt` is the checkpoint as it would be in one file, with a tensor of its shape on the meta device for each of the
model's and the optimizer's; `.metadata`, written last, says in which file each of their parts is.
"""

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load

from dft_lightning.checkpointing import checksums
from dft_lightning.errors import UserError

REST, INDEX = "meta.pt", ".metadata"

#: The classes that an index consists of, by name: reading it imports no module and runs no other code.
_CLASSES_OF_AN_INDEX = {
    metadata: (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    filesystem: ("_StorageInfo",),
    torch.serialization: ("_get_layout",),
    torch: ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
}
_KNOWN = {
    (module.__name__, name): getattr(module, name)
    for module, names in _CLASSES_OF_AN_INDEX.items()
    for name in names
    if hasattr(module, name)
}


def tensors_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's and the optimizers' tensors by a name each; one that is in two places has the name of the first."""
    found: dict[int, tuple[str, Tensor]] = {}
    places = [("state_dict", checkpoint["state_dict"])]
    places += [(f"optimizer.{n}", one["state"]) for n, one in enumerate(checkpoint.get("optimizer_states", []))]
    for prefix, state in places:
        for name, tensor in _named(prefix, state):
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def replaced(checkpoint: Mapping[str, Any], others: Mapping[int, Any]) -> dict[str, Any]:
    """The same with other tensors for the model's and the optimizers', by their `id`."""

    def walk(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: walk(inner) for key, inner in value.items()}
        return others.get(id(value), value) if isinstance(value, Tensor) else value

    states = [{**one, "state": walk(one["state"])} for one in checkpoint.get("optimizer_states", [])]
    changed = {"state_dict": walk(checkpoint["state_dict"])}
    return {**checkpoint, **changed, **({"optimizer_states": states} if states else {})}


def without_tensors(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The same with shapes, on the meta device, in their places."""
    shapes = {
        id(tensor): torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for tensor in tensors_of(checkpoint).values()
    }
    return replaced(checkpoint, shapes)


def read_rest(path: Path, verify: bool = True) -> dict[str, Any]:
    """What `meta.pt` holds; an error where it, or any part that the index names, is damaged.

    Args:
        verify: compare all files with their checksums; else only lengths.
    """
    sealed = {name: checksums.is_sealed(path / name, verify) for name in (REST, INDEX)}
    found: dict[str, Any] = torch.load(path / REST, map_location=None, weights_only=True)
    sizes = _sizes(_Reader(path).read_metadata())
    for name, size in sizes.items():
        there = (path / name).stat().st_size
        if there < size:
            raise EOFError(f"{name} has {there} bytes of {size}")
    sealed |= {name: checksums.is_sealed(path / name, verify) for name in sizes}
    if any(sealed.values()) and not all(sealed.values()):
        without = ", ".join(sorted(name for name, has in sealed.items() if not has))
        raise ValueError(f"{without} has lost its checksum, which the other files have")
    return found


def fill(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read these tensors, of the names of `tensors_of`, into the memory they have; of sharded ones this rank's part."""
    with _quiet():
        load(dict(tensors), storage_reader=_Reader(path), no_dist=True)


def read_whole(path: Path, rest: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint with all its tensors, on the host.

    Args:
        rest: what `read_rest` gave, or a part of it.
    """
    shapes = tensors_of(rest)
    found = {name: torch.empty(shape.shape, dtype=shape.dtype) for name, shape in shapes.items()}
    fill(path, found)
    return replaced(rest, {id(shape): found[name] for name, shape in shapes.items()})


class Writer(FileSystemWriter):
    """Each rank adds checksums to the files that it writes."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        """What PyTorch writes, and at the end of each file its checksum."""
        written = super().write_data(plan, planner)
        for name in {each.storage_data.relative_path for each in written.wait()}:
            checksums.seal(Path(self.path) / name)
        return written


class _Reader(FileSystemReader):
    """Reads an index without running what a pickle may ask for."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / INDEX).open("rb") as file:
            index = cast(Metadata, _Unpickler(file).load())
        _check_index(index)
        meta = getattr(index, "storage_meta", None) or StorageMeta()
        index.storage_meta, meta.load_id = meta, self.load_id
        return index


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Refuse all that an index has no need of, before anything is imported."""
        if module.partition(".")[0] == "pathlib":
            return PurePosixPath  # where it was written, which nothing here asks for
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        raise UserError(f"{INDEX} asks for {module}.{name}, which no checkpoint has: it is damaged, or does harm")


def _check_index(index: Any) -> None:
    """Refuse an index with anything but tensors, which PyTorch would unpickle, or with files outside the folder.

    Raises:
        UserError: it has one of them, or is no index.
    """
    if not isinstance(index, Metadata):
        raise UserError(f"{INDEX} holds a {type(index).__name__}; expected the index of a checkpoint")
    for name, kind in index.state_dict_metadata.items():
        if not isinstance(kind, TensorStorageMetadata):
            raise UserError(
                f"{INDEX} has {name} as {type(kind).__name__}; expected a tensor: it is damaged, or does harm"
            )
    for part in index.storage_data.values():
        if Path(part.relative_path).name != part.relative_path:
            raise UserError(f"{INDEX} names the file {part.relative_path!r}; expected files of the folder itself")


def _named(prefix: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield prefix, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _named(f"{prefix}.{key}", inner)


def _sizes(index: Metadata) -> dict[str, int]:
    """How many bytes each file needs to have."""
    found: dict[str, int] = {}
    for part in index.storage_data.values():
        found[part.relative_path] = max(found.get(part.relative_path, 0), part.offset + part.length)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remark that ranks read on their own, which is what is wanted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to")
        yield
