"""Fully sharded data parallelism (PyTorch's FSDP2) as a strategy of Lightning's trainer.

Every rank has its own micro-batches, as in data parallelism, and a part of each weight, gradient and optimizer state.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from dft_lightning.checkpointing import RunCheckpoints, skeleton
from dft_lightning.errors import UserError
from dft_lightning.models import WeightedLM
from dft_lightning.sharding.layers import reduce_each_time, shard
from dft_lightning.sharding.loading import load
from dft_lightning.sharding.restoring import fill_module, load_optimizer, take_over
from dft_lightning.sharding.tensors import gathered, state_of

if TYPE_CHECKING:
    from dft_lightning.scoring import WeightedModule

#: As Lightning has it: gradients that are scaled, as those of 16-mixed, it cannot check over all ranks.
_PRECISIONS = ("32-true", "bf16-true", "bf16-mixed", "16-true")


class FSDP2Strategy(ModelParallelStrategy):
    """Weights, gradients and optimizer states dealt over the ranks, a decoder layer at a time.

    A checkpoint is one file, as that of any other strategy, or a folder with a part of each rank
    (`Checkpoints.sharded`): a run goes on from either with any strategy, on any number of ranks.

    Args:
        shard: ranks that share one copy of the weights; by default all of them, or as many as `replicate` leaves.
        replicate: copies of the weights, e.g. one a node: gathering then stays within the node.
        compute: bfloat16 computes in it and reduces gradients in float32, while weights and optimizer states stay as
            they are held (float32 at trainer.precision 32-true).
        prefetch: layers that are gathered ahead of the one that computes; each takes memory.
        reduce: gradients are summed over the ranks after each micro_batch, so that no rank ever has them whole; or once
            a step, which moves less where a step has several micro-batches, and takes the memory of all gradients (in
            float32 where bfloat16 computes).
        process_group_backend: nccl, gloo, …; by default what goes with the device.
        timeout: after this time a collective that a rank does not take part in is an error.
    """

    def __init__(
        self,
        shard: int | None = None,
        replicate: int = 1,
        compute: Literal["as_held", "bfloat16"] = "as_held",
        prefetch: int = 1,
        reduce: Literal["micro_batch", "step"] = "micro_batch",
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=False, process_group_backend=process_group_backend, timeout=timeout
        )
        self.checkpoint_io = RunCheckpoints()
        self._folder: Path | None = None  # that is gone on from
        self.shard, self.replicate, self.prefetch, self.once_a_step = shard, replicate, prefetch, reduce == "step"
        self.compute = torch.bfloat16 if compute == "bfloat16" else None
        for name, value in (("shard", shard), ("replicate", replicate), ("prefetch", prefetch)):
            if value is not None and value < 1:
                raise UserError(f"trainer.strategy.{name} is {value}; expected 1 or more")

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        self._data_parallel_size, self._tensor_parallel_size = self.world_size, 1

    def sizes(self, ranks: int) -> tuple[int, int]:
        """How many copies of the weights a run of so many ranks has, and how many ranks share each."""
        shard = self.shard or ranks // self.replicate
        if shard * self.replicate != ranks:
            raise UserError(
                f"trainer.strategy.replicate is {self.replicate} and .shard is {self.shard or 'not set'}, but the run "
                f"has {ranks} ranks: expected copies times the ranks that share each to be that"
            )
        return self.replicate, shard

    @cached_property
    def mesh(self) -> DeviceMesh:
        """The ranks that weights are dealt over: all, or `replicate` times `shard` of them."""
        _, shard = self.sizes(self.world_size)
        kind = self.root_device.type
        if self.replicate == 1:
            return init_device_mesh(kind, (shard,), mesh_dim_names=("shard",))
        return init_device_mesh(kind, (self.replicate, shard), mesh_dim_names=("replicate", "shard"))

    def load_network(self, build: Callable[[bool], WeightedLM]) -> WeightedLM:
        """A network, dealt over the ranks; see `load`."""
        self.refuse_precision(str(self.precision_plugin.precision))
        return load(
            lambda empty: self._held(build(empty)),
            lambda network: shard(network, self.mesh, self.compute, self.prefetch),
            self.root_device,
        )

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around each micro-batch but the last of its step."""
        network = cast("WeightedModule", self.lightning_module).network
        reduce_each_time(network, not self.once_a_step)
        try:
            yield
        finally:
            reduce_each_time(network, True)

    def refuse_precision(self, precision: str) -> None:
        """Refuse a `trainer.precision` that is not known here, or says something else of what is computed in."""
        if precision not in _PRECISIONS:
            raise UserError(
                f"trainer.precision is {precision}; with trainer.strategy fsdp2 one of "
                f"{', '.join(_PRECISIONS)} was expected"
            )
        if self.compute is not None and "mixed" in precision:
            raise UserError(
                f"trainer.precision is {precision}, and trainer.strategy.compute too chooses what is computed in: set "
                "trainer.precision 32-true, to hold the weights in float32, or leave compute out"
            )

    def _held(self, network: WeightedLM) -> WeightedLM:
        """The network in the precision that it is held in: that of all parameters of a group has to be one."""
        return cast(WeightedLM, self.precision_plugin.convert_module(network))

    # -- checkpoints: restored before the strategy is set up, as by others ---------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """The weights are sharded in `configure_model` already."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """By `load_optimizer_state_dict`."""
        return True

    @property
    def _writes_parts(self) -> bool:
        """Whether a checkpoint has each rank's part in place of gathered tensors."""
        return isinstance(self.checkpoint_io, RunCheckpoints) and self.checkpoint_io.sharded

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's part, or whole on the first rank; all ranks have to ask."""
        assert self.lightning_module is not None
        return state_of(self.lightning_module, None if self._writes_parts else self.is_global_zero)

    def whole_state_dict(self) -> dict[str, Any]:
        """The module's state on the first rank, whatever form checkpoints have; all ranks have to ask."""
        assert self.lightning_module is not None
        return state_of(self.lightning_module, self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Likewise, with parameters numbered as the optimizer has them."""
        state: dict[str, Any] = getattr(optimizer, "_optimizer", optimizer).state_dict()
        return state if self._writes_parts else gathered(state, self.is_global_zero)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """By all ranks in parts, or by the first."""
        if self._writes_parts or self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    def teardown(self) -> None:
        """What is written meanwhile is finished, or its error raised."""
        super().teardown()
        self.checkpoint_io.teardown()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """A file is mapped into memory, so that ranks of a node share the pages they read; of a folder, its shapes."""
        self._folder = Path(checkpoint_path) if Path(checkpoint_path).is_dir() else None
        return skeleton(Path(checkpoint_path))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each rank takes its part."""
        assert self.lightning_module is not None
        if self._folder is None:
            take_over(self.lightning_module, checkpoint["state_dict"], strict)
        else:
            fill_module(self.lightning_module, checkpoint["state_dict"], self._folder)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each rank takes its part."""
        for number, (optimizer, state) in enumerate(zip(self.optimizers, checkpoint["optimizer_states"], strict=True)):
            load_optimizer(optimizer, state, number, self._folder)


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2: weights dealt over all ranks")
