"""What a device of a sharded run holds and moves, against torch's own sharding and numbers by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_model

from dft_lightning.planning.rehearsal import MicroBatch, Setting, rehearse
from dft_lightning.planning.scaling import (
    MASTERS,
    PURE,
    Mesh,
    Weights,
    activations,
    gathered,
    held,
    memory,
    rows_held,
    weights_of,
)
from dft_lightning.planning.traffic import moved, moved_between_copies

UNEVEN = {"intermediate_size": 50, "num_hidden_layers": 3}


def ranks(count, copies, folder):
    """The figures of each rank of a real sharded pass."""
    script = Path(__file__).with_name("sharded.py")
    commands = [[sys.executable, str(script), str(rank), str(count), str(copies), str(folder)] for rank in range(count)]
    running = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for command in commands]
    assert [process.wait(timeout=300) for process in running] == [0] * count
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


@pytest.mark.parametrize(
    ("count", "copies"),
    [
        (1, 1),
        (2, 1),
        pytest.param(4, 1, marks=pytest.mark.slow),
        pytest.param(4, 2, marks=pytest.mark.slow),
    ],
)
def test_torch_shards_and_moves_as_much(tmp_path, count, copies):
    """Bytes of each rank's shards, and of all collectives of a forward and backward pass, exactly."""
    weights, mesh = weights_of(tiny_config(**UNEVEN)), Mesh(count // copies, copies)
    found = ranks(count, copies, tmp_path)
    for rank, real in enumerate(found):
        share = weights.layers * held(weights.layer, mesh.shards, rank % mesh.shards)
        share += held(weights.rest, mesh.shards, rank % mesh.shards)
        assert real["held"] == real["gradients"] == 4 * share
        if mesh.shards == 1:
            assert real["bytes"] == {}
            continue
        layer, rest = gathered(weights.layer, mesh.shards), gathered(weights.rest, mesh.shards)
        assert real["bytes"]["allgather"] == 2 * (2 * weights.layers * layer + rest)
        assert real["bytes"]["reduce_scatter"] == 4 * (weights.layers * layer + rest)
        own = (mesh.shards - 1) / mesh.shards
        brought = own * (real["bytes"]["allgather"] + real["bytes"]["reduce_scatter"])
        brought += 2 * (copies - 1) / copies * real["bytes"].get("allreduce", 0)
        traffic = moved(weights, mesh, MASTERS)
        assert traffic.total == pytest.approx(brought, rel=1e-12)
        assert traffic.calls == sum(real["calls"].values()) + real["calls"].get("allreduce", 0)  # twice around


def test_weights_are_the_models_own():
    weights = weights_of(tiny_config())
    assert weights.total == sum(p.numel() for p in tiny_model().parameters())
    tied = weights_of(tiny_config(tie_word_embeddings=True))
    assert weights.total - tied.total == 320 * 32
    with pytest.raises(ValueError, match="2 kinds"):
        weights_of(_uneven_config())


def _uneven_config():
    """A model whose layers have several shapes."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(**(tiny_config().to_dict() | {"model_type": "qwen3_moe", "mlp_only_layers": [0]}))


@pytest.mark.parametrize(("rows", "shards"), [(8, 4), (7, 4), (5, 4), (3, 4), (1, 1)])
def test_rows_are_shared_as_torch_chunks_them(rows, shards):
    chunks = [len(chunk) for chunk in torch.zeros(rows).chunk(shards)]
    assert [rows_held(rows, shards, rank) for rank in range(shards)] == chunks + [0] * (shards - len(chunks))


class TestMemory:
    weights = Weights(layer=((8, 4), (4,)), rest=((16, 4),), layers=3)

    def test_by_hand(self):
        """36 numbers a layer and 64 beside; on four devices 9 and 16 of them."""
        need = memory(self.weights, Mesh(4), MASTERS, activations=1000, beside=10)
        assert need.states == (3 * 9 + 16) * 16
        amid, end = 64 * 4 + 2 * 36 * 4 + 36 * 4, 64 * 8
        assert need.whole == max(amid, end) == amid
        assert need.total == need.states + need.whole + 1010

    def test_at_the_end_the_embeddings_gradient_counts(self):
        wide = Weights(self.weights.layer, ((160, 4),), 3)
        assert memory(wide, Mesh(4), MASTERS, 0).whole == 640 * 8

    def test_half_of_it_in_bfloat16(self):
        assert 2 * memory(self.weights, Mesh(4), PURE, 0).states == memory(self.weights, Mesh(4), MASTERS, 0).states

    def test_copies_save_nothing(self):
        assert memory(self.weights, Mesh(4, 8), MASTERS, 0) == memory(self.weights, Mesh(4), MASTERS, 0)


@pytest.mark.parametrize("kind", ["none", "full"])
def test_activations_of_many_layers_follow_from_few(kind):
    setting = Setting(torch.bfloat16, "bf16-true", "varlen", kind, cuda=True, chunk_rows=64, accumulates=True)
    shape = MicroBatch.full(2, 64)
    config = tiny_config(num_hidden_layers=9)
    assert activations(config, shape, setting) == pytest.approx(rehearse(config, None, shape, setting).peak, rel=1e-3)


def test_copies_within_a_node_meet_by_nvlink():
    """Two shards, four copies in one node: nothing goes out. In eight copies of eight, everything does."""
    weights = TestMemory.weights
    inside = moved_between_copies(weights.layer, Mesh(2, 4), MASTERS)
    assert (inside.far, inside.near) == (0, 2 * 18 * 4 * 3 / 4)
    outside = moved_between_copies(weights.layer, Mesh(4, 8, node=4), MASTERS)
    assert (outside.near, outside.far) == (0, 2 * 9 * 4 * 7 / 8)
