"""log-probabilities of a run's tokens under its frozen initial model: computed once, cached on disk, read by collators.

A cache folder is keyed by the content of the initial weights, the precision, and the tokens and masks of the rows, so
one that no longer fits is never found. It covers the rows that a run uses, no others.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from dft_lightning.adapter_names import of_adapter, without_adapter
from dft_lightning.disk import writing
from dft_lightning.embedded import cache_dir
from dft_lightning.errors import UserError
from dft_lightning.models import WeightedLM
from dft_lightning.precision import precision_of
from dft_lightning.sharding.initial import initial_network
from dft_lightning.sharding.tensors import whole

if TYPE_CHECKING:
    from dft_lightning.data.batch import Batch
    from dft_lightning.data.datamodule import ChatDataModule
    from dft_lightning.data.store import TokenizedRows
    from dft_lightning.scoring import WeightedModule


class RowValues:
    """One array a row, memory-mapped from a folder with `rows.npy`, `starts.npy` and `values.npy`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.rows, self.starts = (np.load(folder / name, allow_pickle=False) for name in ("rows.npy", "starts.npy"))
            self.values = np.load(folder / "values.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:  # pickled objects are a ValueError, too
            raise UserError(
                f"cannot read the cached reference log-probabilities in {folder} ({error}): remove that folder, and "
                "the same command computes them"
            ) from error
        if len(self.starts) != len(self.rows) + 1 or self.starts[-1] != len(self.values):
            raise UserError(
                f"the cached reference log-probabilities in {folder} do not belong together: remove that folder, and "
                "the same command computes them"
            )

    def __getitem__(self, row: int) -> np.ndarray:
        at = int(np.searchsorted(self.rows, row))
        if at == len(self.rows) or self.rows[at] != row:
            raise KeyError(f"row {row} is not in the reference cache {self.folder}")
        return np.asarray(self.values[self.starts[at] : self.starts[at + 1]])

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> tuple[Any, ...]:  # a loader's worker maps the file itself
        return RowValues, (self.folder,)

    @staticmethod
    def write(folder: Path, parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        """From (rows, lengths, values) of each rank, in any order."""
        rows, lengths, values = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        order = np.argsort(rows, kind="stable")
        starts = np.concatenate([[0], np.cumsum(lengths)])
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "rows.npy", rows[order])
        np.save(folder / "starts.npy", np.concatenate([[0], np.cumsum(lengths[order])]))
        np.save(
            folder / "values.npy", np.concatenate([values[:0], *(values[starts[i] : starts[i + 1]] for i in order)])
        )


def prepare_reference(module: "WeightedModule", data: "ChatDataModule", stages: Iterable[str]) -> None:
    """Give the data module the cached log-probabilities of what this run uses of `stages`, computed where missing.

    Where the live model is no longer the initial one, that is loaded beside it.

    Raises:
        UserError: the data are not those of a `ChatDataModule`, whose rows a cache is keyed by.
    """
    if not hasattr(data, "rows_used"):
        raise UserError(
            f"{type(module.weighting).__name__} compares with the initial model, whose log-probabilities are cached by "
            "row: train with a ChatDataModule, or set model.reference to copy"
        )
    network = module.network
    assert network is not None
    if not module.is_initial:
        rank_zero_info("Loading the initial model beside the present one, for the reference log-probabilities")
        network = initial_network(module, frozen=True)
    weights = fingerprint(network, adapter=module.adapter == "continue")
    module.set_reference(weights)
    for stage in stages:
        rows = data.rows_used(stage)
        if rows is not None:
            data.reference[stage] = _cached(module, data, network, weights, rows)


def initial_copy(module: "WeightedModule") -> WeightedLM:
    """The initial model once more, frozen: for a reference whose distributions over the vocabulary are wanted."""
    rank_zero_info("Loading the initial model a second time, frozen, as the reference")
    network = initial_network(module, frozen=True)
    module.set_reference(fingerprint(network, adapter=module.adapter == "continue"))
    return network


def fingerprint(network: WeightedLM, *, adapter: bool = False) -> str:
    """sha256 over all weights of a model, whatever its name and files are called.

    Not over those of a new adapter, which are random at the start and change nothing there; of weights in 4 bits not
    over their scales' second scale, in which another number of threads rounds otherwise.

    Args:
        adapter: include the adapter's, which are those of a trained one.
    """
    state = network.model.state_dict(prefix="model.")
    return _sha256({name: tensor for name, tensor in state.items() if adapter or not of_adapter(name)})


def fingerprint_of_base(model: nn.Module) -> str:
    """The same whether adapters are around the layers of a transformers model or not."""
    state = model.state_dict().items()
    return _sha256({without_adapter(name): tensor for name, tensor in state if not of_adapter(name)})


def _sha256(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in state.items():
        if ".weight." in name and not of_adapter(name):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        full = whole(tensor.detach()).cpu().contiguous()
        digest.update(full.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _cached(
    module: "WeightedModule", data: "ChatDataModule", network: WeightedLM, weights: str, rows: "TokenizedRows"
) -> RowValues:
    trainer = module.trainer
    facts = {
        "version": 2,
        "weights": weights,
        "precision": precision_of(trainer),
        "rows": rows.content_hash(np.arange(len(rows))),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    folder = Path(data.options.cache_dir or cache_dir()) / "reference" / key
    if trainer.strategy.broadcast(folder.exists()):
        rank_zero_info(f"Reference log-probabilities of {len(rows)} rows: cached in {folder}")
        return RowValues(folder)
    rank_zero_info(f"Reference log-probabilities of {len(rows)} rows: computed once, cached in {folder}")
    own = trainer.strategy.broadcast(uuid.uuid4().hex[:8])  # another run may make it, too
    made = folder.with_name(f".{key}.{own}")
    part = made / f"rank-{trainer.global_rank}.npz"
    with writing(folder, "--data.cache_dir"), _removed_on_error(made):
        made.mkdir(parents=True, exist_ok=True)
        found = _scores(module, network, data.scoring_loader(rows, "reference"))
        np.savez(part, rows=found[0], lengths=found[1], values=found[2])
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        _put(made, folder, trainer.world_size)
    trainer.strategy.barrier()
    return RowValues(folder)


def _put(made: Path, folder: Path, ranks: int) -> None:
    """Make one folder out of the parts of all ranks."""
    with writing(folder, "--data.cache_dir"), _removed_on_error(made):
        loaded = [np.load(made / f"rank-{rank}.npz") for rank in range(ranks)]
        RowValues.write(made / "whole", [(part["rows"], part["lengths"], part["values"]) for part in loaded])
        with suppress(OSError):  # another run has made it meanwhile
            (made / "whole").rename(folder)
        shutil.rmtree(made)


@contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    """What is not complete is removed: it may be what fills the disk."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _scores(module: "WeightedModule", network: WeightedLM, loader: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows, lengths, values) of this rank's share of the rows."""
    rows, lengths, values = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.float16)]
    for batch in _progress(loader, "Reference", module.trainer.is_global_zero):
        with module.trainer.precision_plugin.forward_context():
            logp = network.logp(batch.to(module.device), chunk_rows=module.chunk_rows)
        rows.append(batch.row.numpy())
        lengths.append(np.bincount(batch.sequence.numpy(), minlength=len(batch)))
        values.append(logp.cpu().numpy())
    return np.concatenate(rows), np.concatenate(lengths), np.concatenate(values)


def _progress(loader: Any, title: str, show: bool) -> "Iterable[Batch]":
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    bar: Callable[..., Iterable[Batch]] = tqdm
    return bar(loader, desc=title, disable=not show)
