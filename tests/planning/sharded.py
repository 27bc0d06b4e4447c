"""What torch's `fully_shard` really holds and moves: run by some gloo ranks, each of which writes its figures.

python sharded.py RANK RANKS COPIES FOLDER
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import tiny_model


class Moved(TorchDispatchMode):
    """Bytes of the whole buffers that collectives go over, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        for kind, whole in (("allgather", 0), ("reduce_scatter", 1), ("allreduce", 0)):
            if name.startswith("c10d.") and kind in name:
                given = args[whole][0] if isinstance(args[whole], list | tuple) else args[whole]
                self.bytes[kind] += given.numel() * given.element_size()
                self.calls[kind] += 1
        return func(*args, **(kwargs or {}))


def sharded(copies: int, ranks: int) -> torch.nn.Module:
    """A tiny model in float32 with products in bfloat16, a group a layer."""
    shape, names = ((ranks,), ("shard",)) if copies == 1 else ((copies, ranks // copies), ("copy", "shard"))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = tiny_model(intermediate_size=50, num_hidden_layers=3)  # 50 rows: not the same on each of 4
    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", shape, mesh_dim_names=names), "mp_policy": policy}
    for layer in model.get_decoder().layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def main() -> None:
    rank, ranks, copies = map(int, sys.argv[1:4])
    folder = Path(sys.argv[4])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    model: Any = sharded(copies, ranks)
    locally: Any = [parameter.to_local() for parameter in model.parameters()]
    with Moved() as moved:
        model(input_ids=torch.arange(8)[None], use_cache=False).logits.float().square().sum().backward()
    held = [tensor.numel() * tensor.element_size() for tensor in locally]
    gradients = [parameter.grad.to_local().numel() * 4 for parameter in model.parameters()]
    found = {"held": sum(held), "gradients": sum(gradients), "bytes": moved.bytes, "calls": moved.calls}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
