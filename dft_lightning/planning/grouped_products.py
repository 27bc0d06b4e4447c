"""Products of experts' weights in shapes: torch's own fake kernel refuses dtypes that its real kernels take.

Shapes: S rows of E groups, K and N columns.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class GroupedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes the result of each grouped product, without the product; for use around fake tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator, or make a tensor of the result's shape."""
        given = dict(kwargs or {})
        if str(func) != "aten._grouped_mm.default":
            return func(*args, **given)
        left, right, *rest = args
        ends = rest[0] if rest else given.get("offs")
        return left.new_empty(_shape(left, right, ends), dtype=given.get("out_dtype") or left.dtype)


def _shape(left: Tensor, right: Tensor, ends: Tensor | None) -> torch.Size:
    """(S, K) × (E, K, N) → (S, N); of two matrices the columns of one are grouped: (K, S) × (S, N) → (E, K, N)."""
    if left.dim() == right.dim() == 2:
        assert ends is not None
        return torch.Size((len(ends), left.shape[0], right.shape[1]))
    groups = left.shape[:1] if left.dim() == right.dim() == 3 else ()
    return torch.Size((*groups, left.shape[-2], right.shape[-1]))
