"""What follows the all-reduce of a step on a GPU, in Triton's language: one kernel decides and scales.

`distnorm.kernels.gpu_clip` launches it. Rows of tables are those of `distnorm.kernels.gpu_code`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distnorm.kernels.gpu_code import ZERO_CONSTANT, scale_chunk

PROPAGATE, SKIP, ZERO_ALL, LEAVE_OUT = range(4)
"""What `clip` does about a norm that is not finite: what the formula gives; leave gradients alone; set them
to zero; set them to zero, and say that the step is skipped."""
_PROPAGATE, _SKIP = tl.constexpr(PROPAGATE), tl.constexpr(SKIP)
_ZERO_ALL, _LEAVE_OUT = tl.constexpr(ZERO_ALL), tl.constexpr(LEAVE_OUT)


@triton.jit(do_not_specialize=["first"])
def clip(
    rows,
    first,
    reduced,
    terms,
    values,
    flags,
    NONFINITE: tl.constexpr,
    ROOT: tl.constexpr,
    HAS_REPLICAS: tl.constexpr,
    MAY_CLIP: tl.constexpr,
    MAY_SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Decide by the reduced vector, and scale each chunk from row `first` on, of one dtype.

    Every program decides for itself, which costs a few operations; the very first writes down what for.
    """
    norm, agreed = _norm_of(reduced, terms, ROOT, HAS_REPLICAS)
    is_finite = norm < float("inf")
    coef = _coefficient(norm, is_finite, terms, NONFINITE, MAY_CLIP)
    coef = tl.where(agreed, coef, 1.0)
    keeps = is_finite | (is_finite == 0)
    if NONFINITE == _LEAVE_OUT:
        keeps = is_finite
    elif NONFINITE == _ZERO_ALL:
        keeps = is_finite | (agreed == 0)
    row = first + tl.program_id(0)
    if row == 0:
        tl.store(values, norm)
        tl.store(values + 1, agreed.to(tl.float64))
        tl.store(values + 2, coef)
        tl.store(values + 3, tl.where(keeps, norm * coef, 0.0))
        tl.store(values + 4, tl.load(terms))
        tl.store(flags, is_finite.to(tl.int8))
        tl.store(flags + 1, (coef < 1.0).to(tl.int8))
        skipped = is_finite == 0
        if (NONFINITE != _SKIP) and (NONFINITE != _LEAVE_OUT):
            skipped = is_finite & (is_finite == 0)
        tl.store(flags + 2, skipped.to(tl.int8))
    if MAY_SCALE:
        scale_chunk(rows, first, tl.where(keeps, coef, ZERO_CONSTANT), DTYPE, BLOCK)


@triton.jit
def _norm_of(reduced, terms, ROOT: tl.constexpr, HAS_REPLICAS: tl.constexpr):
    """The norm, NaN where the ranks did not measure the same, and whether they did."""
    norm = tl.load(reduced + 1)
    if ROOT:
        norm = tl.sqrt(norm)
    agreed = (tl.load(reduced).to(tl.int64) & (tl.load(terms + 1).to(tl.int64) - 1)) == 0
    if HAS_REPLICAS:  # what is not finite has no difference
        within = tl.abs(tl.load(reduced + 2)) <= tl.load(terms + 2)
        agreed = agreed & (within | (norm == float("inf")) | (norm != norm))
    return tl.where(agreed, norm, float("nan")), agreed


@triton.jit
def _coefficient(norm, is_finite, terms, NONFINITE: tl.constexpr, MAY_CLIP: tl.constexpr):
    coef = tl.full([], 1.0, tl.float64)
    if MAY_CLIP:
        coef = tl.load(terms) / (norm + tl.load(terms + 3))
        coef = tl.where(coef > 1.0, 1.0, coef)  # NaN stays
    if NONFINITE == _ZERO_ALL:
        coef = tl.where(is_finite, coef, 0.0)
    elif NONFINITE != _PROPAGATE:
        coef = tl.where(is_finite, coef, 1.0)
    return coef
