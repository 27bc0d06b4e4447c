"""The row step of the loss head on a GPU: statistics, weight and gradient of a chunk's logits, in their own memory.

Each call is one Triton kernel with one program a row; none waits for the GPU. `fused_` does all in one for the
weightings in `_FORMS`. For any other, such as a user's, `score` and `gradient_` leave room for Python in between.

Shapes: R rows of a chunk, V vocabulary.
"""

import os
from collections.abc import Callable, Collection, Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dft_lightning.logprob.head import LogitTransform, statistics
from dft_lightning.weighting.base import DISTRIBUTION_STATISTICS, TokenWeighting
from dft_lightning.weighting.likelihood import DFT, Uniform
from dft_lightning.weighting.reference import ImportanceWeighted

#: Logits that a program looks at at a time, and how many of them a thread holds: few, so that many fit on the GPU.
BLOCK, _A_THREAD = 4096, 8
#: Bytes of the float32 copies from which the top-k entropy is computed.
_COPY_BYTES = 64 * 2**20

Form = tuple[str, tuple[float, float, float]]
"""A branch of the kernel's `_weight`, and its numbers: (first, low, high)."""


def _ratio(weighting: ImportanceWeighted) -> Form | None:
    return ("ratio", (weighting.temperature, *weighting.bounds)) if weighting.level == "token" else None


#: Which branch of the kernel computes a weighting. A subclass may define other weights, so it is not looked up here.
_FORMS: dict[type[TokenWeighting], Callable[[Any], Form | None]] = {
    Uniform: lambda _: ("uniform", (0.0, 0.0, 0.0)),
    DFT: lambda weighting: ("floored", (0.0, weighting.floor, 0.0)),
    ImportanceWeighted: _ratio,
}


def _form(weighting: TokenWeighting) -> Form | None:
    find = _FORMS.get(type(weighting))
    return find(weighting) if find is not None else None


def fuses(weighting: TokenWeighting) -> bool:
    """Whether `fused_` can compute this weighting."""
    return _form(weighting) is not None


def unsuitable(device: torch.device) -> str | None:
    """Why these functions cannot be used for tensors on a device; None where they can.

    They need an NVIDIA GPU of compute capability 8.0 and a working Triton, or tensors on the CPU and Triton's
    interpreter. The answer is found once, by a first try, since Triton may also lack a C compiler or fit no driver.
    """
    return _unsuitable(device, os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "on", "yes", "y"})


@cache
def _unsuitable(device: torch.device, interpreted: bool) -> str | None:
    if device.type != ("cpu" if interpreted else "cuda"):
        return f"the tensors are on {device.type}" + (" and TRITON_INTERPRET is set" if interpreted else "")
    if device.type == "cuda" and torch.version.hip is not None:
        return "the kernel has not been tried on AMD GPUs"
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}; the kernel needs 8.0"
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        score(torch.zeros(1, 1, device=device), torch.zeros(1, dtype=torch.long, device=device), LogitTransform(), ())
    except torch.OutOfMemoryError:  # says nothing of triton
        raise
    except Exception as reason:  # whatever Triton, its compiler or the driver come up with: the plain path still works
        return f"a first try of triton failed: {type(reason).__name__}: {reason}"
    return None


@cache
def _functions() -> Any:
    """The Triton functions, whose import needs triton."""
    from dft_lightning.logprob import kernel_triton

    return kernel_triton


def score(
    logits: Tensor, target: Tensor, transform: LogitTransform, names: Collection[str], *, block: int = BLOCK
) -> dict[str, Tensor]:
    """Statistics of each row, all in one reading but "topk_entropy", which plain torch finds in copies of some rows.

    Args:
        logits: (R, V) raw products, float32, bfloat16 or float16; rows may lie further apart than V. Left unchanged.
        target: (R,) ids; one outside [0, V) gets log p = −∞.
        names: which of "entropy", "topk_entropy", "collision", "rank" and "top_p" are wanted.
        block: logits that a program looks at at a time, a power of two.

    Returns:
        "logp" and "lse", (R,) float32, and those in `names`; "rank" is int64.
    """
    found = _outputs(logits, transform, names)
    _launch("score", logits, target, transform, block, **_pointers(found))
    return found


def gradient_(
    logits: Tensor,
    target: Tensor,
    logp: Tensor,
    lse: Tensor,
    coefficient: Tensor,
    transform: LogitTransform,
    dtype: torch.dtype,
    *,
    block: int = BLOCK,
) -> Tensor:
    """Overwrite raw products (R, V) with the gradient by them of −Σ coefficient·log p.

    Args:
        logp: (R,) float32, and `lse`, as `score` returned them.
        coefficient: (R,) weight times normaliser's factor.
        dtype: of the gradient; no wider than the logits.

    Returns:
        (R, V) in `dtype`, over the same memory: rows lie as far apart as the logits', in bytes.
    """
    out = _over(logits, dtype)
    known = {"logp": _vector(logp), "lse": _vector(lse), "coefficient": _vector(coefficient)}
    _launch("gradient", logits, target, transform, block, out=out, out_stride=out.stride(0), **known)
    return out


def fused_(
    logits: Tensor,
    target: Tensor,
    weighting: TokenWeighting,
    factor: Tensor | None,
    ref_logp: Tensor | None,
    transform: LogitTransform,
    names: Collection[str],
    dtype: torch.dtype,
    *,
    block: int = BLOCK,
) -> tuple[dict[str, Tensor], Tensor]:
    """`score`, the weights of a built-in weighting, and `gradient_`, in one kernel.

    Args:
        weighting: one that `fuses`.
        factor: (R,) n_t, the normaliser's factor a token; 1 if not given. It is no part of the reported weight.
        ref_logp: (R,) log-probability under the reference, where the weighting needs it.

    Returns:
        What `score` returns, with "weight" (R,) float32; and what `gradient_` returns.
    """
    form = _form(weighting)
    if form is None:
        raise ValueError(f"the kernel does not know {weighting!r}; expected one that `fuses`")
    if ref_logp is None and "ref_logp" in weighting.needs:
        raise ValueError(f"{weighting!r} needs ref_logp, which was not given")
    found = _outputs(logits, transform, names)
    out = _over(logits, dtype)
    weight = logits.new_empty(len(logits), dtype=torch.float32)
    first, low, high = (float(number) for number in form[1])
    arguments = {"first": first, "low": low, "high": high, "form": form[0], "weight": weight}
    brought = {"factor": _vector(factor), "ref_logp": _vector(ref_logp), "out": out, "out_stride": out.stride(0)}
    _launch("fused", logits, target, transform, block, **_pointers(found), **brought, **arguments)
    return found | {"weight": weight}, out


def _launch(name: str, logits: Tensor, target: Tensor, transform: LogitTransform, block: int, **arguments: Any) -> None:
    """Start a kernel on the logits' device, one program a row."""
    rows, vocabulary = logits.shape
    if not rows:
        return
    block = min(block, 1 << (vocabulary - 1).bit_length())
    function = getattr(_functions(), name)
    with torch.cuda.device(logits.device if logits.is_cuda else -1):
        function[(rows,)](
            logits=logits,
            stride=logits.stride(0),
            target=target.contiguous(),
            bias=None if transform.bias is None else transform.bias.detach().contiguous(),
            scale=float(transform.scale),
            softcap=None if transform.softcap is None else float(transform.softcap),
            vocabulary=vocabulary,
            block=block,
            num_warps=min(max(block // (32 * _A_THREAD), 1), 32),
            enable_fp_fusion=False,  # equal products are equal logits wherever they are computed: ties keep their rank
            **arguments,
        )


def _outputs(logits: Tensor, transform: LogitTransform, names: Collection[str]) -> dict[str, Tensor]:
    """Room for the statistics (R,) that a kernel finds; the top-k entropy is computed at once."""
    if unknown := set(names) - DISTRIBUTION_STATISTICS:
        raise ValueError(f"unknown statistics {sorted(unknown)}; expected some of {sorted(DISTRIBUTION_STATISTICS)}")
    if logits.dtype not in {torch.float32, torch.bfloat16, torch.float16}:
        raise ValueError(f"the kernel got {logits.dtype} logits; expected float32, bfloat16 or float16")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"the kernel got logits of strides {logits.stride()}; expected the second to be 1")
    found = {}
    for name in ("logp", "lse", *sorted(names)):
        found[name] = logits.new_empty(len(logits), dtype=torch.int64 if name == "rank" else torch.float32)
    if "topk_entropy" in names:
        for rows in _few(logits):
            found["topk_entropy"][rows] = _topk_entropy(logits[rows], transform)
    return found


def _few(logits: Tensor) -> Iterator[slice]:
    """Slices of rows whose float32 copies are small."""
    step = max(1, _COPY_BYTES // (4 * logits.shape[1]))
    for start in range(0, len(logits), step):
        yield slice(start, start + step)


def _topk_entropy(logits: Tensor, transform: LogitTransform) -> Tensor:
    z = transform.forward_(logits.to(torch.float32, copy=True))
    unused = z[:, 0]
    return statistics(("topk_entropy",), z, unused, unused)["topk_entropy"]


def _pointers(found: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Where a kernel puts what it finds; None for what is not wanted."""
    return {name: found.get(name) for name in ("logp", "lse", "entropy", "collision", "rank", "top_p")}


def _over(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of logits (R, V) as (R, V) of a dtype that is no wider."""
    if dtype.itemsize > logits.dtype.itemsize:
        raise ValueError(f"a {dtype} gradient does not fit in the memory of {logits.dtype} logits")
    return logits.view(dtype)[:, : logits.shape[1]]


def _vector(values: Tensor | None) -> Any:
    """Values (R,) as the kernels load them."""
    return None if values is None else values.detach().to(torch.float32).contiguous()
