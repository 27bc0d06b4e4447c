"""How many rows a chunk has, in which dtype factors are held, and the products themselves."""

import pytest
import torch

from dft_lightning.logprob import products
from dft_lightning.logprob.products import Factor, Precision, allowed_bytes, default_rows, product_

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MIB, GIB = 2**20, 2**30


def test_what_a_chunk_may_take():
    assert [allowed_bytes("cpu", kept=kept) for kept in (False, True)] == [200 * MIB, 512 * MIB]
    assert [allowed_bytes("cuda", kept=kept) for kept in (False, True)] == [2 * GIB, 4 * GIB]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("vocabulary", [1, 320, 49_152, 151_936, 262_144])
def test_a_chunk_on_the_cpu_is_as_large_as_allowed_in_steps_of_16_rows(vocabulary, size, kept):
    rows, allowed = default_rows(CPU, vocabulary, size=size, kept=kept), (512 if kept else 200) * MIB
    assert rows % 16 == 0
    assert rows * size * vocabulary <= allowed < (rows + 16) * size * vocabulary


def test_a_chunk_has_16_rows_even_where_they_are_too_large():
    assert default_rows(CPU, 10**9) == 16


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    ("unused", "allowed"),
    [
        (80 * GIB, None),  # there is room: as much as is ever taken
        (3 * GIB, GIB),  # with one GiB that is reserved and not allocated, a quarter of what is there
        (0, GIB // 4),
    ],
)
def test_a_chunk_on_a_gpu_takes_a_quarter_of_what_is_unused(unused, allowed, kept, monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 7 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 6 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (unused, 80 * GIB))
    allowed = allowed or (4 if kept else 2) * GIB
    rows = default_rows.__wrapped__(GPU, 50_000, kept=kept)
    assert rows % 128 == 0
    assert rows * 4 * 50_000 <= allowed < (rows + 128) * 4 * 50_000
    assert default_rows.__wrapped__(GPU, 10**9, kept=kept) == 128


def test_only_float16_gradients_are_lifted():
    lifts = {dtype: Precision(torch.float32, dtype, torch.float32).lift for dtype in (torch.float16, torch.bfloat16)}
    assert lifts == {torch.float16: 256.0, torch.bfloat16: 1.0}
    assert Precision(torch.float64, torch.float64, torch.float64).lift == 1.0


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("product", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("narrow", [False, True])
def test_in_what_the_factors_are_held(product, narrow, native, monkeypatch):
    """Always rounded to the products' precision; wide where logits are, except behind native bfloat16 products."""
    monkeypatch.setattr(products, "only_native_bfloat16", lambda: native)
    given = torch.rand(3, 5)
    factor = Factor.of(given, Precision(torch.float32, product, product if narrow else torch.float32))
    wide = product if narrow else torch.float32
    assert factor.forward.dtype == wide
    assert factor.backward.dtype == (product if native and product == torch.bfloat16 else wide)
    for held in (factor.forward, factor.backward):
        assert torch.equal(held.float(), given.to(product).float())


@pytest.mark.parametrize(
    ("fast", "tiles", "only"), [(True, False, True), (True, True, False), (False, False, False), (False, True, False)]
)
def test_bfloat16_is_native_only_where_it_is_fast_without_tiles(fast, tiles, only, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles, raising=False)
    assert products.only_native_bfloat16.__wrapped__() is only


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add", [False, True])
def test_a_product_replaces_or_adds(dtype, add):
    """Small integers, whose products are exact in each dtype."""
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=dtype), torch.tensor([[5.0], [6.0]], dtype=dtype)
    out = torch.tensor([[10.0], [20.0]])
    product_(out, a, b, add=add)
    assert out.tolist() == ([[27.0], [59.0]] if add else [[17.0], [39.0]])
