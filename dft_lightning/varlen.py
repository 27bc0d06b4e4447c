"""Attention for packed rows by the lengths of their documents: `--model.attn_implementation varlen`.

No mask is ever made, and no document is multiplied with another: on a GPU by torch's own kernel for sequences of
varying length (half precision, no further package), else document by document.

Shapes: A attention heads, K key-value heads, T positions of all rows together, E width of a head.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dft_lightning.errors import UserError

NAME = "varlen"


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
    if mask is not None or softcap is not None or query.shape[2] != key.shape[2] or hasattr(module, "sinks"):
        raise UserError(
            "attention 'varlen' reads whole documents, without mask, soft-cap, sinks and cache: set "
            "--model.attn_implementation to another (sdpa, eager)"
        )
    rows, _heads, width, _size = query.shape
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q = torch.arange(0, rows * width + 1, width, dtype=torch.int32, device=query.device)
        max_length_q = width
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (T, A, E), (T, K, E)
    window = None if sliding_window is None or sliding_window >= max_length_q else sliding_window
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        from torch.nn.attention.varlen import varlen_attn

        span = (-1 if window is None else window - 1, 0)
        longest, borders = max_length_q, cu_seq_lens_q
        out = varlen_attn(q, k, v, borders, borders, longest, longest, scale=scaling, window_size=span, enable_gqa=True)
        assert isinstance(out, Tensor)
    else:
        out = _one_by_one(q, k, v, cu_seq_lens_q, scaling, dropout, window)
    return out.view(rows, width, *out.shape[1:]), None


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scaling: float | None, dropout: float, window: int | None
) -> Tensor:
    """(T, A, E), a call a document."""
    grouped = q.shape[1] != k.shape[1]
    parts = []
    for start, end in pairwise(borders.tolist()):
        query, key, value = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))  # (1, A, t, E), (1, K, t, E)
        near = None
        if window is not None and end - start > window:
            place = torch.arange(end - start, device=query.device)
            apart = place[:, None] - place
            near = (apart >= 0) & (apart < window)
        out = F.scaled_dot_product_attention(
            query, key, value, near, dropout, is_causal=near is None, scale=scaling, enable_gqa=grouped
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)
