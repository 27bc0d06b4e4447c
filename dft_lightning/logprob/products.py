"""The matrix products of the loss head: in which precision, and how many rows at a time.

Shapes: R rows of a chunk, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

#: Bytes that the logits of one chunk may take, and those of a chunk that spares a second pass.
_CHUNK_BYTES = {"cpu": 200 * 2**20, "cuda": 2 * 2**30}
_KEPT_BYTES = {"cpu": 512 * 2**20, "cuda": 4 * 2**30}


@dataclass(frozen=True)
class Precision:
    """In what is computed.

    Args:
        compute: statistics, weights and sums: float32 or wider.
        product: the factors of the products.
        logits: the logits between product and statistics; `compute`, or the narrower `product`.
    """

    compute: torch.dtype
    product: torch.dtype
    logits: torch.dtype

    @property
    def lift(self) -> float:
        """By what the gradient by the logits is multiplied while it is in `product`.

        Without it, a float16 gradient of a token that weighs 1/1000 would mostly underflow.
        """
        return 2.0**8 if self.product == torch.float16 else 1.0


def allowed_bytes(device: str, *, kept: bool) -> int:
    """What the logits of a chunk may take where there is memory enough; `kept` as for `default_rows`."""
    return (_KEPT_BYTES if kept else _CHUNK_BYTES)["cpu" if device == "cpu" else "cuda"]


@cache
def default_rows(device: torch.device, vocabulary: int, *, size: int = 4, kept: bool = False) -> int:
    """How many rows' logits to hold at a time; found out once, so that a run does not hang on the moment's memory.

    Args:
        size: bytes of a logit.
        kept: how many at most where that spares a second pass.
    """
    allowed = allowed_bytes(device.type, kept=kept)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        allowed = min(allowed, (torch.cuda.mem_get_info(device)[0] + unused) // 4)
    rows = allowed // (size * vocabulary)
    step = 16 if device.type == "cpu" else 128
    return max(step, rows // step * step)


@dataclass
class Factor:
    """A factor of the products, rounded to their dtype, as each product wants it held."""

    forward: Tensor
    backward: Tensor

    @staticmethod
    def of(tensor: Tensor, precision: Precision) -> "Factor":
        """On a GPU, or with logits as narrow as the factors, in the products' dtype.

        A CPU's bfloat16 products return bfloat16: where the logits are to be float32, the factors are held in float32,
        and oneDNN multiplies them as bfloat16 where the processor has tiles for that (see `fast_products`). Without
        tiles that is no faster than float32; then the gradients, which end in bfloat16, use bfloat16 products.
        """
        rounded = tensor.to(precision.product)
        if tensor.device.type != "cpu" or precision.logits == precision.product:
            return Factor(rounded, rounded)
        wide = rounded.to(precision.compute)
        return Factor(wide, rounded if precision.product == torch.bfloat16 and only_native_bfloat16() else wide)


@cache
def only_native_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 fast, but not in tiles."""
    fast, tiles = (getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("avx512_bf16", "amx_tile"))
    return bool(fast()) and not tiles()


def product_(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """a @ b, or that added, into `out`, accumulated in its precision."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=float(add), out=out)
        return
    made = torch.mm(a, b) if a.device.type == "cpu" else torch.mm(a, b, out_dtype=out.dtype)
    if add:
        out += made
    else:
        out.copy_(made)


@contextmanager
def fast_products(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """On the CPU, multiply float32 tensors as bfloat16, at its speed, where the products are to be in bfloat16.

    oneDNN rounds its inputs to bfloat16, sums in float32 and returns float32.
    """
    backend = torch.backends.mkldnn.matmul if hasattr(torch.backends.mkldnn, "matmul") else None
    if device.type != "cpu" or dtype != torch.bfloat16 or backend is None:
        yield
        return
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before
