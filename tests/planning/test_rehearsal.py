"""What a rehearsal in shapes counts, against the same model run for real."""

from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_config, tiny_model
from torch import Tensor

from dft_lightning.data.batch import Batch
from dft_lightning.logprob import weighted_nll
from dft_lightning.models import LoRA, WeightedLM, add_lora
from dft_lightning.planning.live_bytes import LiveBytes, nbytes
from dft_lightning.planning.rehearsal import MicroBatch, Setting, _LossHead, rehearse
from dft_lightning.recomputation import recompute
from dft_lightning.weighting import DFT, Uniform

SHAPES = {
    "padded": MicroBatch(((16,), (9,)), 20),
    "packed": MicroBatch(((10, 6), (16,)), 20, packed=True, width=18),
}


def setting(**changes):
    usual = {
        "dtype": torch.float32,
        "precision": "32-true",
        "attention": "sdpa",
        "recomputation": "none",
        "cuda": False,
        "chunk_rows": 8,
        "accumulates": True,
    }
    return Setting(**(usual | changes))


def real(family, shape, how, lora=None):
    """The model, and a batch with so many supervised positions."""
    model = tiny_model(family, dtype=how.dtype)
    model.set_attn_implementation(how.attention)
    network = WeightedLM(model if lora is None else add_lora(model, lora)).train()
    recompute(network.base.get_decoder(), how.recomputation)
    batch = shape.batch()
    count = shape.supervised
    values = vars(batch) | {
        "supervised": torch.arange(count),
        "target": torch.arange(count),
        "sequence": torch.zeros(count, dtype=torch.long),
        "position": torch.arange(count),
        "counts": [count],
    }
    return network, Batch(**values)


def run(network, batch, how):
    """Most bytes that a real forward and backward pass holds beside weights, gradients and batch."""
    parameters = list(network.parameters())
    if how.accumulates:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    given = [value for value in vars(batch).values() if isinstance(value, Tensor)]
    before = [*parameters, *network.buffers(), *given, *(p.grad for p in parameters if p.grad is not None)]
    casting = torch.autocast("cpu", how.autocast) if how.autocast else nullcontext()
    with LiveBytes(before) as live:
        with casting:
            loss, tokens = network(batch, Uniform(), chunk_rows=how.chunk_rows)
        del tokens
        loss.backward()
    return live.peak


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "sdpa"), ("llama", "eager"), ("qwen2", "sdpa"), ("qwen3", "eager"), ("gemma2", "eager")],
)
def test_the_peak_is_that_of_a_real_run(family, attention, shape, kind, precision):
    """Statistics of the tokens are not rehearsed: some vectors (N,), at most 100 bytes a token here."""
    how = setting(attention=attention, recomputation=kind, precision=precision)
    network, batch = real(family, SHAPES[shape], how)
    found = rehearse(tiny_config(family), None, SHAPES[shape], how)
    assert found.peak == pytest.approx(run(network, batch, how), abs=100 * len(batch.target))
    assert found.gradients == nbytes(network.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_what_is_saved_is_what_autograd_saves(family):
    """By hooks on a real run: unique storages, without parameters, buffers and the batch."""
    how = setting(attention="eager")
    network, batch = real(family, SHAPES["padded"], how)
    given = [*network.parameters(), *network.buffers(), *(v for v in vars(batch).values() if isinstance(v, Tensor))]
    known, saved = {tensor.untyped_storage().data_ptr() for tensor in given}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = tensor, storage.nbytes()  # held, so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = network.hidden(batch)
    expected = sum(size for _, size in saved.values()) + states.untyped_storage().nbytes()
    found = rehearse(tiny_config(family), None, SHAPES["padded"], how)
    # beside it: the supervised states, counted above, and the small index that chose them
    assert found.saved == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("lora", [LoRA(rank=2), LoRA(rank=2, dora=True), LoRA(rank=2, dora=True, dropout=0.1)])
def test_adapters_alone(lora):
    """DoRA's passes hold whole weights and updates for a moment, and its magnitudes have gradients."""
    how = setting(precision="bf16-mixed")
    network, batch = real("llama", SHAPES["padded"], how, lora)
    found = rehearse(tiny_config(), lora, SHAPES["padded"], how)
    assert found.peak == pytest.approx(run(network, batch, how), abs=100 * len(batch.target))
    assert found.gradients == nbytes(p for p in network.parameters() if p.requires_grad)


def test_the_first_micro_batch_makes_the_gradients():
    """They come as the activations go."""
    how = setting(accumulates=False)
    network, batch = real("llama", SHAPES["padded"], how)
    found = rehearse(tiny_config(), None, SHAPES["padded"], how)
    assert found.peak == pytest.approx(run(network, batch, how), abs=100 * len(batch.target))
    assert found.peak > rehearse(tiny_config(), None, SHAPES["padded"], setting()).peak


def test_recomputation_saves_memory_in_its_order():
    shape = MicroBatch.full(4, 64)
    kinds = [
        rehearse(tiny_config(num_hidden_layers=6), None, shape, setting(recomputation=kind))
        for kind in ("none", "selective", "full")
    ]
    none, selective, full = (found.saved for found in kinds)
    assert none > 1.3 * selective > 1.3 * 1.3 * full
    layer_inputs = 6 * 4 * 64 * 32 * 4
    assert layer_inputs < full < 2.5 * layer_inputs  # what is shared by all layers, and the result, come on top


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_loss_heads_stand_in_holds_what_the_loss_holds(dtype, frozen):
    hidden = torch.randn(512, 64, dtype=dtype, requires_grad=True)
    weight = torch.randn(2000, 64, dtype=dtype, requires_grad=not frozen)
    target = torch.zeros(512, dtype=torch.long)
    with LiveBytes([hidden, weight, target]) as live:
        weighted_nll(hidden, weight, target, DFT(), chunk_rows=64)[0].backward()
    hidden.grad = weight.grad = None
    with LiveBytes([hidden, weight]) as stand_in:
        _LossHead.apply(hidden, weight, setting(chunk_rows=64), False).backward()
    assert stand_in.peak == pytest.approx(live.peak, abs=100 * 512)


def test_on_a_gpu_the_head_holds_a_chunk_and_one_more_product():
    how = {"dtype": torch.bfloat16, "precision": "bf16-true", "chunk_rows": 16}
    gpu, cpu = (
        rehearse(tiny_config(), None, MicroBatch.full(1, 33), setting(cuda=cuda, **how)) for cuda in (True, False)
    )
    rows, vocabulary, width = 16, 320, 32
    accumulators = 4 * (32 * width + vocabulary * width)
    chunk = rows * vocabulary * 4
    assert gpu.head == pytest.approx(accumulators + chunk + 4 * vocabulary * width, rel=0.1)
    assert cpu.head != gpu.head
    assert gpu.saved == cpu.saved


def test_nothing_is_computed():
    """A model of 7 billion parameters is rehearsed as fast as a small one."""
    config = tiny_config(hidden_size=16384, intermediate_size=65536, num_attention_heads=128, num_key_value_heads=8)
    found = rehearse(config, None, MicroBatch.full(1, 4096), setting(recomputation="full"))
    assert found.gradients > 4 * 7e9
