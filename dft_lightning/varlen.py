"""Attention for packed rows by the lengths of their documents: `--model.attn_implementation varlen`.

No mask is ever made, and no document is multiplied with another: on a GPU by torch's own kernel for sequences of
varying length (half precision, no further package), else document by document.

Shapes: A attention heads, K key-value heads, T positions of all rows together, E width of a head.
"""

import inspect
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from dft_lightning.errors import UserError

NAME = "varlen"
#: Options of torch's kernel in the installed version: 2.10 has is_causal alone, 2.11 scale and window_size in its
#: place, 2.12 enable_gqa as well.
_OPTIONS_OF_KERNEL = frozenset(inspect.signature(varlen_attn).parameters)


def register() -> None:
    """Make the name known to transformers; a second time changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document: (1, T, A, E) from query (1, A, T, E), key and value (1, K, T, E).

    Without borders each row (B of them) is a document. The arguments are those that transformers hands over.
    """
    asked = mask is not None or softcap is not None or query.shape[2] != key.shape[2] or hasattr(module, "sinks")
    if asked or not _is_told(module, sliding_window):
        raise UserError(
            "attention 'varlen' reads whole documents, without mask, soft-cap, sinks and cache, or a sliding window of "
            f"them, and {type(module).__name__} asks for one of these"
        )
    if torch.is_autocast_enabled(query.device.type):  # rotary positions leave query and key in float32 there
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    rows, _heads, width, _size = query.shape
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q = torch.arange(0, rows * width + 1, width, dtype=torch.int32, device=query.device)
        max_length_q = width
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (T, A, E), (T, K, E)
    window = None if sliding_window is None or sliding_window >= max_length_q else sliding_window
    possible = window is None or "window_size" in _OPTIONS_OF_KERNEL
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout and possible:
        out = _by_kernel(q, k, v, cu_seq_lens_q, max_length_q, scaling, window)
    else:
        whole = torch.compiler.is_compiling() and not dropout and query.device.type == "cpu"
        call = _opaque if whole else _one_by_one
        out = call(q, k, v, cu_seq_lens_q, scaling, dropout, window)
    return out.view(rows, width, *out.shape[1:]), None


def _is_told(module: Any, window: int | None) -> bool:
    """Whether all that limits what the layer sees is in its arguments; Llama 4 has chunks that its masks alone know."""
    kinds, index = getattr(getattr(module, "config", None), "layer_types", None), getattr(module, "layer_idx", None)
    if not kinds or index is None or index >= len(kinds):
        return True
    kind = str(kinds[index])
    return "chunk" not in kind and (window is not None or "sliding" not in kind)


def _by_kernel(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scaling: float | None, window: int | None
) -> Tensor:
    """(T, A, E) by torch's kernel, which every version has to be told in its own way."""
    options: dict[str, Any] = {"is_causal": True}
    if "window_size" in _OPTIONS_OF_KERNEL:
        options = {"scale": scaling, "window_size": (-1 if window is None else window - 1, 0)}
    elif scaling is not None:
        q = q * (scaling * q.shape[-1] ** 0.5)  # the kernel divides by the root
    if "enable_gqa" in _OPTIONS_OF_KERNEL:
        options["enable_gqa"] = True
    elif q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = varlen_attn(q, k, v, borders, borders, longest, longest, **options)
    assert isinstance(out, Tensor)
    return out


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scaling: float | None, dropout: float, window: int | None
) -> Tensor:
    """(T, A, E), a call a document."""
    grouped = q.shape[1] != k.shape[1]
    parts = []
    for own in _slices(borders):
        query, key, value = (x[own].transpose(0, 1)[None] for x in (q, k, v))  # (1, A, t, E), (1, K, t, E)
        near = None
        if window is not None and own.stop - own.start > window:
            near = _near(own.stop - own.start, window, query.device)
        out = F.scaled_dot_product_attention(
            query, key, value, near, dropout, is_causal=near is None, scale=scaling, enable_gqa=grouped
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def _near(size: int, window: int, device: torch.device) -> Tensor:
    """Which keys a query sees, (t, t): itself and the window − 1 before it."""
    place = torch.arange(size, device=device)
    apart = place[:, None] - place
    return (apart >= 0) & (apart < window)


def _opaque(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scaling: float | None, _dropout: float, window: int | None
) -> Tensor:
    """`_one_by_one` on a CPU as one operator, for compiled code: that cannot depend on how many documents there are."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    out: Tensor = _attend(q, k, v, borders, scaling, window)[0]
    return out


@torch.library.custom_op("dft_lightning::attend", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scaling: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """(T, A, E), and the log-sum-exp (T, A) that the backward pass wants."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for own in _slices(borders):
        made, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(x[own].transpose(0, 1)[None] for x in (q, k, v)), **_options(own, q, scaling, window)
        )
        out[own], lse[own] = made[0].transpose(0, 1), total[0].T
    return out, lse


@torch.library.custom_op("dft_lightning::attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    borders: Tensor,
    scaling: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for own in _slices(borders):
        made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x[own].transpose(0, 1)[None] for x in (grad, q, k, v, out)),
            lse[own].T[None],
            **_options(own, q, scaling, window),
        )
        for gradient, part in zip((dq, dk, dv), made, strict=True):
            gradient[own] = part[0].transpose(0, 1)
    return dq, dk, dv


def _slices(borders: Tensor) -> Iterator[slice]:
    """The documents that are not empty."""
    return (slice(start, end) for start, end in pairwise(borders.tolist()) if start < end)


def _options(own: slice, q: Tensor, scaling: float | None, window: int | None) -> dict[str, Any]:
    size = own.stop - own.start
    far = None if window is None or size <= window else ~_near(size, window, q.device)
    mask = None if far is None else torch.zeros(size, size, dtype=q.dtype).masked_fill_(far, -torch.inf)
    return {"dropout_p": 0.0, "is_causal": mask is None, "attn_mask": mask, "scale": scaling}


@_attend.register_fake
def _attend_shapes(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


@_attend_backward.register_fake
def _attend_backward_shapes(
    _grad: Tensor, _out: Tensor, _lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scaling, ctx.window = inputs
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return (*_attend_backward(grad, *ctx.saved_tensors, ctx.scaling, ctx.window), None, None, None)


_attend.register_autograd(_differentiate, setup_context=_keep)
