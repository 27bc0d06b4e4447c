"""A kernel that applies the functions of the Triton kernels to values, to be imported where there is Triton."""

import triton
import triton.language as tl

from dft_lightning.logprob.kernel_triton import _expm1, _tanh_and_slope


@triton.jit
def apply(x, negative, tanh, slope, expm1, count: tl.constexpr):
    """tanh of x (count,) and its slope, and exp − 1 of values of at most 0."""
    at = tl.arange(0, count)
    value, derivative = _tanh_and_slope(tl.load(x + at))
    tl.store(tanh + at, value)
    tl.store(slope + at, derivative)
    tl.store(expm1 + at, _expm1(tl.load(negative + at)))
