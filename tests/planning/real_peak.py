"""Bytes of memory that a real forward and backward pass takes beside the model: `real_peak.py FOLDER ROWS WIDTH KIND`.

Resident memory as the kernel counts it, so with what operators take for themselves, and with the allocator's gaps.
"""

import sys
from pathlib import Path

import torch

from dft_lightning.data.batch import Batch
from dft_lightning.loading import ModelSource, load_model
from dft_lightning.models import WeightedLM
from dft_lightning.planning.rehearsal import MicroBatch
from dft_lightning.recomputation import recompute
from dft_lightning.weighting import Uniform


def supervised(shape: MicroBatch) -> Batch:
    """The batch, with so many supervised positions."""
    count = shape.supervised
    index = torch.arange(count)
    known = {"supervised": index, "target": index, "sequence": torch.zeros_like(index), "position": index}
    return Batch(**(vars(shape.batch()) | known | {"counts": [count]}))


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main(folder: str, rows: str, width: str, kind: str) -> None:
    torch.set_num_threads(1)
    network = WeightedLM(load_model(ModelSource(folder)))
    recompute(network.base.get_decoder(), kind)
    network(supervised(MicroBatch.full(1, 8)), Uniform())[0].backward()  # libraries set themselves up
    network.zero_grad(set_to_none=True)
    batch = supervised(MicroBatch.full(int(rows), int(width)))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    network(batch, Uniform())[0].backward()
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
