"""What measures and changes tensors on the GPU, in Triton's language. `distnorm.kernels.gpu` launches it.

A program takes one row of a table, [rows, 2] int64: the address of a chunk of a tensor; and in one number the
chunk's elements, in the lower 32 bits, and the tensor's position, in the upper ones. Offsets in a chunk fit
in 32 bits; what lies beyond 2**31 elements of a tensor is in the address.
Chunks at addresses that are no multiple of 16 are read by blocks of another size: loads that share a block's
indices share their layout too, and would be slowed down to the least aligned of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distnorm.kernels.native import Kernel

# By the codes of `AddressTable`. bf16 is converted by its bits: Triton's interpreter can't round.
DTYPES = (tl.float32, tl.float64, tl.uint16, tl.float16)
ZERO = float("-inf")
"""In place of a coefficient, which it never is: every element becomes zero."""
_BF16 = tl.constexpr(tl.uint16)
ZERO_CONSTANT = tl.constexpr(ZERO)
_SQUARES = tl.constexpr(int(Kernel.SQUARES))
_LARGEST = tl.constexpr(int(Kernel.LARGEST))
_MAGNITUDE = tl.constexpr((1 << 63) - 1)  # all bits of an fp64 number but its sign


@triton.jit(do_not_specialize=["first"])
def partials(rows, first, out, DTYPE: tl.constexpr, KERNEL: tl.constexpr, BLOCK: tl.constexpr):
    """The statistic of each chunk from row `first` on, of one dtype, into its place of [rows] fp64."""
    row = first + tl.program_id(0)
    address = tl.load(rows + row * 2)
    count = tl.load(rows + row * 2 + 1).to(tl.int32)
    measure_chunk(address, count, out + row, DTYPE, KERNEL, BLOCK)


@triton.jit(do_not_specialize=["before"])
def totals(parts, runs, out, before, HAS_BEFORE: tl.constexpr, KERNEL: tl.constexpr, BLOCK: tl.constexpr):
    """The statistic of each run of chunks, of those from runs[i, 0] to runs[i, 1], [runs] fp64; and, if it
    is asked for, a number of the host's before the first."""
    run = tl.program_id(0)
    place = out + run
    if HAS_BEFORE:
        place += 1
        tl.store(out, before.to(tl.int64).to(tl.float64))
    first, last = tl.load(runs + run * 2).to(tl.int32), tl.load(runs + run * 2 + 1).to(tl.int32)
    _combine(parts, first, last, place, KERNEL, BLOCK)


@triton.jit(do_not_specialize=["first"])
def scale(rows, first, coef, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply each chunk from row `first` on, of one dtype, by an fp64 coefficient, unless that is 1; or set
    it to zero, if that is `ZERO`."""
    scale_chunk(rows, first, tl.load(coef), DTYPE, BLOCK)


@triton.jit(do_not_specialize=["first"])
def scale_each(rows, first, coefs, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """`scale` by each tensor's own of [tensors] fp64 coefficients."""
    row = first + tl.program_id(0)
    packed = tl.load(rows + row * 2 + 1)
    wide = tl.load(coefs + (packed >> 32))
    if wide != 1.0:
        address = tl.load(rows + row * 2)
        factor = wide.to(tl.float32 if DTYPE.primitive_bitwidth < 64 else tl.float64)
        if address % 16 == 0:
            _multiply(_aligned(address, DTYPE), packed.to(tl.int32), factor, DTYPE, BLOCK)
        else:
            _multiply(address.to(tl.pointer_type(DTYPE)), packed.to(tl.int32), factor, DTYPE, BLOCK // 2)


@triton.jit(do_not_specialize=["first"])
def zero_unless(rows, first, keep, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Set each chunk from row `first` on, of one dtype, to zero, unless a byte is not 0."""
    if tl.load(keep) == 0:
        row = first + tl.program_id(0)
        address = tl.load(rows + row * 2)
        count = tl.load(rows + row * 2 + 1).to(tl.int32)
        if address % 16 == 0:
            _fill_zero(_aligned(address, DTYPE), count, DTYPE, BLOCK)
        else:
            _fill_zero(address.to(tl.pointer_type(DTYPE)), count, DTYPE, BLOCK // 2)


@triton.jit(do_not_specialize=["first", "high", "low"])
def clamp(rows, first, high, low, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Put each chunk from row `first` on, of one dtype, within plus and minus a bound.

    The bound comes as the two halves of an fp64 number's bits: Triton takes a Python float as fp32.
    """
    bits = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    wide = bits.to(tl.float64, bitcast=True)
    bound = wide.to(tl.float32 if DTYPE.primitive_bitwidth < 64 else tl.float64)
    row = first + tl.program_id(0)
    address = tl.load(rows + row * 2)
    count = tl.load(rows + row * 2 + 1).to(tl.int32)
    if address % 16 == 0:
        _clamp(_aligned(address, DTYPE), count, bound, DTYPE, BLOCK)
    else:
        _clamp(address.to(tl.pointer_type(DTYPE)), count, bound, DTYPE, BLOCK // 2)


@triton.jit
def measure_chunk(address, count, out, DTYPE: tl.constexpr, KERNEL: tl.constexpr, BLOCK: tl.constexpr):
    """Write the statistic of a chunk's elements."""
    if address % 16 == 0:
        _measure(_aligned(address, DTYPE), count, out, KERNEL, BLOCK)
    else:
        _measure(address.to(tl.pointer_type(DTYPE)), count, out, KERNEL, BLOCK // 2)


@triton.jit
def scale_chunk(rows, first, wide, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply this program's chunk by a number, unless that is 1; or set it to zero, if that is `ZERO`."""
    if wide != 1.0:
        row = first + tl.program_id(0)
        address = tl.load(rows + row * 2)
        count = tl.load(rows + row * 2 + 1).to(tl.int32)
        if wide == ZERO_CONSTANT:
            if address % 16 == 0:
                _fill_zero(_aligned(address, DTYPE), count, DTYPE, BLOCK)
            else:
                _fill_zero(address.to(tl.pointer_type(DTYPE)), count, DTYPE, BLOCK // 2)
        else:
            factor = wide.to(tl.float32 if DTYPE.primitive_bitwidth < 64 else tl.float64)
            if address % 16 == 0:
                _multiply(_aligned(address, DTYPE), count, factor, DTYPE, BLOCK)
            else:
                _multiply(address.to(tl.pointer_type(DTYPE)), count, factor, DTYPE, BLOCK // 2)


@triton.jit
def _combine(parts, first, last, out, KERNEL: tl.constexpr, BLOCK: tl.constexpr):
    """The statistic of what parts from the first to the last, not with it, are the statistics of."""
    found = _nothing(KERNEL, BLOCK)
    for at in range(first, last, BLOCK):
        lanes = at + tl.arange(0, BLOCK)
        values = tl.load(parts + lanes, mask=lanes < last, other=0.0)
        if KERNEL == _LARGEST:
            found = tl.maximum(found, values.to(tl.int64, bitcast=True))
        else:
            found += values
    _store(out, found, KERNEL)


@triton.jit
def _measure(start, count, out, KERNEL: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    found = _nothing(KERNEL, BLOCK)
    whole = count // BLOCK * BLOCK
    for at in range(0, whole, BLOCK):
        found = _add(found, tl.load(start + at + lanes), KERNEL)
    if whole < count:  # apart: a mask would let every load be of one element
        found = _add(found, tl.load(start + whole + lanes, mask=whole + lanes < count, other=0), KERNEL)
    _store(out, found, KERNEL)


@triton.jit
def _aligned(address, DTYPE: tl.constexpr):
    """A pointer by which 16 bytes are loaded at once. `address` itself must not be marked: it is the same
    value where it is no multiple of 16."""
    return tl.multiple_of((address // 16 * 16).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def _nothing(KERNEL: tl.constexpr, BLOCK: tl.constexpr):
    if KERNEL == _LARGEST:
        return tl.zeros([BLOCK], tl.int64)
    else:
        return tl.zeros([BLOCK], tl.float64)


@triton.jit
def _add(found, values, KERNEL: tl.constexpr):
    wide = _widened(values).to(tl.float64)
    if KERNEL == _LARGEST:
        # Without the sign, the bits of fp64 numbers are in the numbers' order, and NaN above inf.
        return tl.maximum(found, wide.to(tl.int64, bitcast=True) & _MAGNITUDE)
    elif KERNEL == _SQUARES:
        return found + wide * wide
    else:
        return found + tl.abs(wide)


@triton.jit
def _widened(values):
    if values.dtype == _BF16:
        return (values.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif values.dtype == tl.float16:
        return values.to(tl.float32)
    else:
        return values


@triton.jit
def _rounded(values, DTYPE: tl.constexpr):
    if DTYPE == _BF16:
        bits = values.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # of two equally near ones, the even one
        return tl.where(values == values, nearest, 0x7FFF).to(_BF16)
    else:
        return values.to(DTYPE)


@triton.jit
def _store(out, found, KERNEL: tl.constexpr):
    if KERNEL == _LARGEST:
        tl.store(out, tl.max(found, axis=0).to(tl.float64, bitcast=True))
    else:
        tl.store(out, tl.sum(found, axis=0))


@triton.jit
def _multiply(start, count, factor, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    whole = count // BLOCK * BLOCK
    for at in range(0, whole, BLOCK):
        values = tl.load(start + at + lanes)
        tl.store(start + at + lanes, _rounded(_widened(values) * factor, DTYPE))
    if whole < count:
        inside = whole + lanes < count
        values = tl.load(start + whole + lanes, mask=inside, other=0)
        tl.store(start + whole + lanes, _rounded(_widened(values) * factor, DTYPE), mask=inside)


@triton.jit
def _fill_zero(start, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], DTYPE)
    whole = count // BLOCK * BLOCK
    for at in range(0, whole, BLOCK):
        tl.store(start + at + lanes, zeros)
    if whole < count:
        tl.store(start + whole + lanes, zeros, mask=whole + lanes < count)


@triton.jit
def _clamp(start, count, bound, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    whole = count // BLOCK * BLOCK
    for at in range(0, whole, BLOCK):
        tl.store(start + at + lanes, _within(tl.load(start + at + lanes), bound, DTYPE))
    if whole < count:
        inside = whole + lanes < count
        values = tl.load(start + whole + lanes, mask=inside, other=0)
        tl.store(start + whole + lanes, _within(values, bound, DTYPE), mask=inside)


@triton.jit
def _within(values, bound, DTYPE: tl.constexpr):
    wide = _widened(values)
    # By comparisons, so that NaN, and the bits of what is within the bound, stay.
    limited = tl.where(wide > bound, bound, tl.where(wide < -bound, -bound, wide))
    return tl.where((wide > bound) | (wide < -bound), _rounded(limited, DTYPE), values)
