"""torch's kernel for varlen attention takes other options from version to version: each gives the same attention.

The kernel itself needs a GPU. In its place is plain attention behind the signature that each version has.
"""

import inspect

import pytest
import torch

from dft_lightning import varlen

BORDERS = torch.tensor([0, 5, 6, 21], dtype=torch.int32)


def _plain(q, k, v, borders, scale, window, shares_heads):
    assert shares_heads or q.shape[1] == k.shape[1], "this version's heads are not shared"
    return varlen._one_by_one(q, k, v, borders, scale, 0.0, window)


def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    return _plain(query, key, value, cu_seq_q, None, None, shares_heads=False)


def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    left, right = window_size
    assert right == 0
    return _plain(query, key, value, cu_seq_q, scale, None if left < 0 else left + 1, shares_heads=False)


def of_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    left, right = window_size
    assert right == 0
    return _plain(query, key, value, cu_seq_q, scale, None if left < 0 else left + 1, shares_heads=enable_gqa)


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("kernel", [of_2_10, of_2_11, of_2_12])
def test_each_version_computes_the_same(monkeypatch, kernel, scaling):
    """Values and gradients; a scale that goes into the queries is rounded there, 4 units of which are allowed for."""
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(varlen, "_OPTIONS_OF_KERNEL", frozenset(inspect.signature(kernel).parameters))
    torch.manual_seed(0)
    shapes, found = [(21, 4, 8), (21, 2, 8), (21, 2, 8)], []
    values = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    for window in [None] if kernel is of_2_10 else [None, 4]:
        for call in (lambda *x: varlen._by_kernel(*x, BORDERS, 15, scaling, window),  # noqa: B023
                     lambda *x: varlen._one_by_one(*x, BORDERS, scaling, 0.0, window)):  # noqa: B023  # fmt: skip
            given = [x.clone().requires_grad_() for x in values]
            out = call(*given)
            out.backward(torch.ones_like(out).cumsum(0))
            found.append([out, *(x.grad for x in given)])
        for ours, truth in zip(*found[-2:], strict=True):
            assert (ours - truth).abs().max() <= 4 * torch.finfo(torch.float64).eps * 21 * truth.abs().max()


def test_the_installed_version_is_one_of_them():
    """A new signature has to be looked at."""
    known = varlen._OPTIONS_OF_KERNEL
    assert {"scale", "window_size"} <= known or "is_causal" in known
