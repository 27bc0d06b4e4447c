# Triton's compiler reads these functions, whose arguments are pointers and blocks of numbers: no types for a checker.
# mypy: ignore-errors
"""The Triton functions behind `kernel`: one program a row, that goes over the vocabulary in ascending blocks.

Nothing here is looked up by value at compile time but the vocabulary, the block and the form of the weighting; an
argument that is None (no bias, no soft-cap, a statistic nobody asked for) costs no instruction.

A gradient may be narrower than the logits whose memory it takes: entry j of a bfloat16 row lies on entry j // 2 of the
float32 row. Going upwards, what is written never reaches what is still to be read, as long as a whole block has been
read before any of it is written: hence the barrier.

Shapes: a row is (V,) logits; everything else that is loaded or stored is one value a row.
"""

import triton
import triton.language as tl


@triton.jit
def _tanh_and_slope(x):
    """tanh(x) and its derivative, both to a few units of rounding, where 1 − tanh² would cancel."""
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    square = x * x
    series = 2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0))
    near = x * (1.0 + square * (-1.0 / 3.0 + square * series))
    tanh = tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0.0, -far, far))
    return tanh, 4.0 * decay / ((1.0 + decay) * (1.0 + decay))


@triton.jit
def _expm1(x):
    """exp(x) − 1 for x ≤ 0, without cancellation near 0."""
    series = 1.0 / 120.0 + x * (1.0 / 720.0 + x * (1.0 / 5040.0 + x * (1.0 / 40320.0)))
    near = x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * series))))
    return tl.where(x > -0.5, near, tl.exp(x) - 1.0)


@triton.jit
def _logits(row, at, valid, bias, scale, softcap):
    """The logits at some places of a row, −∞ where there is none, and the soft-cap's slope there."""
    x = tl.load(row + at, mask=valid, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + at, mask=valid, other=0.0).to(tl.float32)
    x *= scale
    if softcap is not None:
        tanh, slope = _tanh_and_slope(x / softcap)
        x = tanh * softcap
    else:
        slope = 1.0
    return tl.where(valid, x, float("-inf")), slope


@triton.jit
def _logit_of(row, target, bias, scale, softcap, vocabulary: tl.constexpr):
    """The target's logit; −∞ for a target outside the vocabulary, so that it shows instead of reading elsewhere."""
    logit, _slope = _logits(row, target, (target >= 0) & (target < vocabulary), bias, scale, softcap)
    return logit


@triton.jit
def _score_row(
    row, target_logit, bias, scale, softcap, entropy, collision, rank, vocabulary: tl.constexpr, block: tl.constexpr
):
    """In one reading: the largest logit, Σe, Σe·d, Σe² and the rank, where d = logit − largest and e = exp(d).

    Sums are kept a lane each, and rescaled when a larger logit turns up; the lanes are added at the end.
    """
    lanes = tl.arange(0, block)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((block,), tl.float32)
    tilted = tl.zeros((block,), tl.float32)
    squares = tl.zeros((block,), tl.float32)
    larger = tl.zeros((block,), tl.int32)
    for start in range(0, vocabulary, block):
        at = start + lanes
        z, _slope = _logits(row, at, at < vocabulary, bias, scale, softcap)
        highest = tl.maximum(top, tl.max(z, axis=0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        shrink = tl.exp(top - base)
        d = z - base
        e = tl.exp(d)
        if entropy is not None:
            shift = tl.where(top == float("-inf"), 0.0, top - base)
            tilted = shrink * (tilted + shift * total) + tl.where(d > float("-inf"), e * d, 0.0)
        if collision is not None:
            squares = shrink * shrink * squares + e * e
        if rank is not None:
            larger += (z > target_logit).to(tl.int32)
        total = shrink * total + e
        top = highest
    return top, tl.sum(total, axis=0), tl.sum(tilted, axis=0), tl.sum(squares, axis=0), tl.sum(larger, axis=0)


@triton.jit
def _finish_scores(r, target_logit, top, total, tilted, squares, larger, logp, lse, entropy, collision, rank, top_p):
    """Store the statistics of row r; return log p and log Σe."""
    log_total = tl.log(total)
    value = (target_logit - top) - log_total
    tl.store(logp + r, value)
    tl.store(lse + r, top + log_total)
    if entropy is not None:
        tl.store(entropy + r, log_total - tilted / total)
    if collision is not None:
        tl.store(collision + r, squares / (total * total))
    if rank is not None:
        tl.store(rank + r, larger.to(tl.int64))
    if top_p is not None:
        tl.store(top_p + r, 1.0 / total)
    return value


@triton.jit
def _gradient_row(
    row,
    out,
    target,
    at_target,
    bias,
    scale,
    softcap,
    shift,
    offset,
    factor,
    vocabulary: tl.constexpr,
    block: tl.constexpr,
):
    """Write the gradient by the raw products: factor·exp(logit − shift + offset), and at the target `at_target`."""
    lanes = tl.arange(0, block)
    for start in range(0, vocabulary, block):
        at = start + lanes
        valid = at < vocabulary
        z, slope = _logits(row, at, valid, bias, scale, softcap)
        grad = tl.where(at == target, at_target, tl.exp((z - shift) + offset) * factor)
        grad = grad * slope * scale
        tl.debug_barrier()
        tl.store(out + at, grad.to(out.dtype.element_ty), mask=valid)


@triton.jit
def _weight(value, ref_logp, first, low, high, form: tl.constexpr):
    """A built-in weighting as a function of log p; a NaN stays one, as no comparison holds for it."""
    if form == "uniform":
        weight = tl.full((), 1.0, tl.float32)
    elif form == "floored":
        weight = tl.exp(value)
        weight = tl.where(weight < low, low, weight)
    else:
        tl.static_assert(form == "ratio")
        weight = tl.exp(first * (value - ref_logp))
        weight = tl.where(weight < low, low, tl.where(weight > high, high, weight))
    return weight


@triton.jit(do_not_specialize=["target"])
def score(
    logits, stride, target, bias, scale, softcap,
    logp, lse, entropy, collision, rank, top_p,
    vocabulary: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Statistics of each row, which stays as it is."""
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * stride
    z = _logit_of(row, tl.load(target + r), bias, scale, softcap, vocabulary)
    top, total, tilted, squares, larger = _score_row(
        row, z, bias, scale, softcap, entropy, collision, rank, vocabulary, block
    )
    _finish_scores(r, z, top, total, tilted, squares, larger, logp, lse, entropy, collision, rank, top_p)


@triton.jit(do_not_specialize=["target", "logp", "lse", "coefficient"])
def gradient(
    logits, stride, target, bias, scale, softcap,
    out, out_stride, logp, lse, coefficient,
    vocabulary: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The gradient of each row in its own memory, from statistics that are known.

    exp(logit − lse) loses as many units of rounding as lse is large, exp(logit − target's + log p) as log p is: the
    smaller of the two is taken.
    """
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * stride
    y = tl.load(target + r)
    z = _logit_of(row, y, bias, scale, softcap, vocabulary)
    value = tl.load(logp + r)
    known = tl.load(lse + r)
    factor = tl.load(coefficient + r)
    near = tl.abs(value) < tl.abs(known)
    shift = tl.where(near, z, known)
    offset = tl.where(near, value, 0.0)
    at_target = factor * _expm1(value)
    _gradient_row(
        row, out + r * out_stride, y, at_target, bias, scale, softcap, shift, offset, factor, vocabulary, block
    )


@triton.jit(do_not_specialize=["target", "factor", "ref_logp"])
def fused(
    logits, stride, target, bias, scale, softcap,
    logp, lse, entropy, collision, rank, top_p,
    out, out_stride, weight, factor, ref_logp, first, low, high,
    form: tl.constexpr, vocabulary: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Statistics, weight and gradient of each row, in its own memory."""
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * stride
    y = tl.load(target + r)
    z = _logit_of(row, y, bias, scale, softcap, vocabulary)
    top, total, tilted, squares, larger = _score_row(
        row, z, bias, scale, softcap, entropy, collision, rank, vocabulary, block
    )
    value = _finish_scores(r, z, top, total, tilted, squares, larger, logp, lse, entropy, collision, rank, top_p)
    reference = value
    if ref_logp is not None:
        reference = tl.load(ref_logp + r)
    coefficient = _weight(value, reference, first, low, high, form)
    tl.store(weight + r, coefficient)
    if factor is not None:
        coefficient *= tl.load(factor + r)
    at_target = coefficient * _expm1(value)
    _gradient_row(
        row, out + r * out_stride, y, at_target, bias, scale, softcap, top, 0.0, coefficient / total, vocabulary, block
    )
