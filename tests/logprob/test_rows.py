"""How rows are cut into blocks, and what the plain row step holds beside the logits."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dft_lightning.logprob import LogitTransform, ReferenceHead, weighted_nll
from dft_lightning.logprob.products import Factor, Precision
from dft_lightning.logprob.rows import PlainRows, block_rows, slices
from dft_lightning.logprob.targets import GPU_BLOCK_BYTES, TargetRows
from dft_lightning.weighting import DFT

FLOAT32 = Precision(torch.float32, torch.float32, torch.float32)
MIXED = Precision(torch.float32, torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [
        (0, 1, [(0, 0)]),
        (0, 4, [(0, 0)]),
        (1, 1, [(0, 1)]),
        (2, 1, [(0, 1), (1, 2)]),
        (4, 4, [(0, 4)]),
        (5, 4, [(0, 4), (4, 5)]),
        (9, 4, [(0, 4), (4, 8), (8, 9)]),
    ],
)
def test_slices_cover_all_rows_once(count, size, expected):
    assert [(each.start, each.stop) for each in slices(count, size)] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [1, 320, 49_152, 151_936])
def test_a_block_takes_at_most_three_mib(vocabulary, dtype):
    rows = block_rows(vocabulary, dtype)
    assert rows * vocabulary * dtype.itemsize <= 3 * 2**20 < (rows + 1) * vocabulary * dtype.itemsize
    assert block_rows(10**9, dtype) == 1


def plain_rows(rows, precision, device="cpu", together=False, gradient=None, vocabulary=320):
    logits = torch.empty(rows, vocabulary, dtype=precision.logits, device=device)
    return PlainRows(SimpleNamespace(precision=precision), None, logits, gradient, None, together)


@pytest.mark.parametrize("rows", [5, 2457, 2458, 5000])
def test_narrow_logits_are_widened_block_by_block_unless_all_are_weighed_together(rows):
    """A block has 3 MiB / (320 · 4 bytes) = 2457 rows."""
    assert len(plain_rows(rows, MIXED).work) == min(rows, 2457)
    assert len(plain_rows(rows, MIXED, together=True).work) == rows


def test_wide_logits_are_worked_on_where_they_are():
    made = plain_rows(5, FLOAT32, gradient=torch.float32)
    assert made.work is made.logits
    assert made.out is made.logits


def test_a_gradient_in_another_dtype_has_a_place_of_its_own():
    made = plain_rows(5, FLOAT32, gradient=torch.bfloat16)
    assert (made.out.dtype, made.out.shape) == (torch.bfloat16, made.logits.shape)


@pytest.mark.parametrize("rows", [0, 1, 2, 5000])
def test_another_device_takes_a_chunk_as_one_block(rows):
    """Tensors without content stand for a GPU."""
    assert plain_rows(rows, FLOAT32, device="meta").size == max(rows, 1)


@pytest.mark.parametrize("vocabulary", [320, 151_936, 10**9])
def test_targets_on_another_device_take_blocks_of_64_mib(vocabulary):
    assert GPU_BLOCK_BYTES == 64 * 2**20
    logits = torch.empty(4, vocabulary, device="meta")
    made = TargetRows(SimpleNamespace(precision=FLOAT32), None, logits, None, None, None)
    assert made.size == max(1, 64 * 2**20 // (4 * vocabulary))


def test_the_models_own_head_is_not_held_twice_for_the_reference():
    own, other = torch.rand(7, 3), torch.rand(7, 3)
    factor = Factor.of(own, MIXED)
    assert ReferenceHead(torch.rand(2, 3), own).rounded(own, factor, MIXED) is factor
    made = ReferenceHead(torch.rand(2, 3), other).rounded(own, factor, MIXED)
    assert torch.equal(made.forward, other.bfloat16())


class Copies(TorchDispatchMode):
    """Counts copies of tensors of a shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.clone.default:
            self.count += tuple(args[0].shape) == self.shape
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("wanted", [(), ("entropy",)])
@pytest.mark.parametrize("differentiate", [False, True])
def test_logits_are_copied_only_for_statistics_or_the_slope_of_a_soft_cap(softcap, wanted, differentiate):
    hidden = torch.randn(6, 5, requires_grad=differentiate)
    with Copies((6, 11)) as copies:
        loss, _ = weighted_nll(
            hidden, torch.randn(11, 5), torch.arange(6), DFT(), transform=LogitTransform(softcap=softcap), wanted=wanted
        )
    assert loss.requires_grad is differentiate
    assert copies.count == bool(wanted or (softcap and differentiate))
