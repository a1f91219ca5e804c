"""The statistics of single tensors, of their rows and of their samples on the GPU, in Triton's language.
`distnorm.kernels.gpu_statistics` launches it; the tables of chunks are those of `gpu_code`.

A table of rows, [programs, 5] int64, has for each program the address of the first element that it takes, the
number of rows and the elements of each, where its first result goes, and the number of its first row among
those of all tensors. A row too long for one program is cut, and each part of it counts as one row here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distnorm.kernels.gpu_code import (
    _LARGEST,
    _MAGNITUDE,
    _SQUARES,
    _add,
    _aligned,
    _combine,
    _measure,
    _multiply,
    _nothing,
    _rounded,
    _store,
    _widened,
)

_INFINITE = tl.constexpr(0x7FF0000000000000)  # the bits of inf in fp64; those of NaN are above
_SUM = tl.constexpr(1)  # of what is not negative: Kernel.MAGNITUDES
_RUNS, _RUN = tl.constexpr(4), tl.constexpr(16)
_SAMPLE = tl.constexpr(64)


# ---- several statistics of each tensor


@triton.jit(do_not_specialize=["first", "total"])
def summary_parts(rows, first, total, out, DTYPE: tl.constexpr, KERNEL: tl.constexpr, BLOCK: tl.constexpr):
    """Of each chunk from row `first` on, of one dtype: the statistic, the largest magnitude, the numbers of
    zeros and of elements that are not finite, into its places of [4, total] fp64."""
    row = first + tl.program_id(0)
    address = tl.load(rows + row * 2)
    count = tl.load(rows + row * 2 + 1).to(tl.int32)
    if address % 16 == 0:
        _summarise(_aligned(address, DTYPE), count, out + row, total, KERNEL, BLOCK)
    else:
        _summarise(address.to(tl.pointer_type(DTYPE)), count, out + row, total, KERNEL, BLOCK // 2)


@triton.jit(do_not_specialize=["total"])
def summary_totals(parts, total, runs, out, KERNEL: tl.constexpr, BLOCK: tl.constexpr):
    """The same of each run of chunks, [runs, 4]."""
    run = tl.program_id(0)
    first = tl.load(runs + run * 2).to(tl.int32)
    last = tl.load(runs + run * 2 + 1).to(tl.int32)
    _combine(parts, first, last, out + run * 4, KERNEL, BLOCK)
    _combine(parts + total, first, last, out + run * 4 + 1, _LARGEST, BLOCK)
    _combine(parts + total * 2, first, last, out + run * 4 + 2, _SUM, BLOCK)
    _combine(parts + total * 3, first, last, out + run * 4 + 3, _SUM, BLOCK)


@triton.jit
def _summarise(start, count, out, total, KERNEL: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    found, most = _nothing(KERNEL, BLOCK), _nothing(_LARGEST, BLOCK)
    zeros, bad = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    whole = count // BLOCK * BLOCK
    for at in range(0, whole, BLOCK):
        values = tl.load(start + at + lanes)
        bits = _magnitude_bits(values)
        found, most = _add(found, values, KERNEL), tl.maximum(most, bits)
        zeros, bad = zeros + (bits == 0).to(tl.int32), bad + (bits >= _INFINITE).to(tl.int32)
    if whole < count:
        inside = whole + lanes < count
        values = tl.load(start + whole + lanes, mask=inside, other=0)
        bits = _magnitude_bits(values)
        found, most = _add(found, values, KERNEL), tl.maximum(most, bits)
        # What fills the block up is no element.
        zeros, bad = zeros + ((bits == 0) & inside).to(tl.int32), bad + (bits >= _INFINITE).to(tl.int32)
    _store(out, found, KERNEL)
    _store(out + total, most, _LARGEST)
    tl.store(out + total * 2, tl.sum(zeros, axis=0).to(tl.float64))
    tl.store(out + total * 3, tl.sum(bad, axis=0).to(tl.float64))


@triton.jit
def _magnitude_bits(values):
    return _widened(values).to(tl.float64).to(tl.int64, bitcast=True) & _MAGNITUDE


# ---- a few elements of each tensor


@triton.jit(do_not_specialize=["fp64", "bf16", "fp16"])
def samples(rows, runs, fp64, bf16, fp16, out, SIGNS: tl.constexpr):
    """The two sums of each tensor's sample, [tensors, 2]: see `distnorm.kernels.sampling`.

    From chunk `fp64` on come tensors of that dtype, and so on: fp32 ones are before them.
    """
    tensor = tl.program_id(0)
    first = tl.load(runs + tensor * 2)
    last = tl.load(runs + tensor * 2 + 1)
    to = out + tensor * 2
    if first == last:
        tl.store(to + tl.arange(0, 2), tl.zeros([2], tl.float64))
    elif first < fp64:
        _sample(rows, first, last, to, tl.float32, SIGNS)
    elif first < bf16:
        _sample(rows, first, last, to, tl.float64, SIGNS)
    elif first < fp16:
        _sample(rows, first, last, to, tl.uint16, SIGNS)  # bf16
    else:
        _sample(rows, first, last, to, tl.float16, SIGNS)


@triton.jit
def _sample(rows, first, last, out, DTYPE: tl.constexpr, SIGNS: tl.constexpr):
    address = tl.load(rows + first * 2)
    before = (tl.load(rows + last * 2 - 2) - address) // (DTYPE.primitive_bitwidth // 8)
    numel = before + tl.load(rows + last * 2 - 1).to(tl.int32)
    lanes = tl.arange(0, _SAMPLE)
    run = (lanes // _RUN).to(tl.int64)
    spread = run * (numel - _RUN) // (_RUNS - 1)
    at = tl.where(numel > _SAMPLE, spread, run * _RUN) + lanes % _RUN
    values = tl.load(address.to(tl.pointer_type(DTYPE)) + at, mask=at < numel, other=0)
    wide = _widened(values).to(tl.float64)
    # By a product: a difference from 0 would lose the sign of a zero.
    signs = (1 - 2 * ((SIGNS >> lanes.to(tl.int64)) & 1)).to(tl.float64)
    tl.store(out + tl.arange(0, 1), _added(wide * signs))
    tl.store(out + 1 + tl.arange(0, 1), _added(tl.abs(wide)))


@triton.jit
def _added(x):
    """x[k] + x[k + half], for ever smaller halves, [1]: each sum is of two, so its bits can't differ."""
    x = tl.sum(tl.reshape(x, [2, 32]), axis=0)
    x = tl.sum(tl.reshape(x, [2, 16]), axis=0)
    x = tl.sum(tl.reshape(x, [2, 8]), axis=0)
    x = tl.sum(tl.reshape(x, [2, 4]), axis=0)
    x = tl.sum(tl.reshape(x, [2, 2]), axis=0)
    return tl.sum(tl.reshape(x, [2, 1]), axis=0)


# ---- rows


@triton.jit(do_not_specialize=["first"])
def row_squares(table, first, out, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of squares of each row, or part of one, of one dtype's programs from `first` on."""
    at = table + (first + tl.program_id(0)) * 5
    address = tl.load(at)
    rows, width = tl.load(at + 1).to(tl.int32), tl.load(at + 2).to(tl.int32)
    to = out + tl.load(at + 3)
    start = address.to(tl.pointer_type(DTYPE))
    if width <= 16:
        _squares_of_short(start, rows, width, to, BLOCK // 16, 16)
    elif width <= 128:
        _squares_of_short(start, rows, width, to, BLOCK // 128, 128)
    elif (address % 16 == 0) & (width * (DTYPE.primitive_bitwidth // 8) % 16 == 0):
        for row in range(0, rows):
            _measure(tl.multiple_of(start + row * width, 16), width, to + row, _SQUARES, BLOCK)
    else:
        for row in range(0, rows):
            _measure(start + row * width, width, to + row, _SQUARES, BLOCK // 2)


@triton.jit
def row_totals(cut, out, BLOCK: tl.constexpr):
    """Add up the parts of rows that were cut, [rows, 3]: its first and last part, and where the sum goes."""
    at = cut + tl.program_id(0) * 3
    _combine(out, tl.load(at), tl.load(at + 1), out + tl.load(at + 2), _SUM, BLOCK)


@triton.jit(do_not_specialize=["first"])
def scale_rows(table, first, coefs, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply each row, of one dtype's programs from `first` on, by its own fp64 coefficient but 1."""
    at = table + (first + tl.program_id(0)) * 5
    address = tl.load(at)
    rows, width = tl.load(at + 1).to(tl.int32), tl.load(at + 2).to(tl.int32)
    mine = coefs + tl.load(at + 4)
    start = address.to(tl.pointer_type(DTYPE))
    if width <= 16:
        _scale_short(start, rows, width, mine, DTYPE, BLOCK // 16, 16)
    elif width <= 128:
        _scale_short(start, rows, width, mine, DTYPE, BLOCK // 128, 128)
    else:
        for row in range(0, rows):
            wide = tl.load(mine + row)
            if wide != 1.0:
                factor = wide.to(tl.float32 if DTYPE.primitive_bitwidth < 64 else tl.float64)
                if (address % 16 == 0) & (width * (DTYPE.primitive_bitwidth // 8) % 16 == 0):
                    _multiply(tl.multiple_of(start + row * width, 16), width, factor, DTYPE, BLOCK)
                else:
                    _multiply(start + row * width, width, factor, DTYPE, BLOCK // 2)


@triton.jit
def _squares_of_short(start, rows, width, out, ROWS: tl.constexpr, MOST: tl.constexpr):
    lanes, columns = tl.arange(0, ROWS), tl.arange(0, MOST)
    for top in range(0, rows, ROWS):
        row = top + lanes
        inside = (row < rows)[:, None] & (columns < width)[None, :]
        values = tl.load(start + row[:, None] * width + columns[None, :], mask=inside, other=0)
        wide = _widened(values).to(tl.float64)
        tl.store(out + row, tl.sum(wide * wide, axis=1), mask=row < rows)


@triton.jit
def _scale_short(start, rows, width, coefs, DTYPE: tl.constexpr, ROWS: tl.constexpr, MOST: tl.constexpr):
    lanes, columns = tl.arange(0, ROWS), tl.arange(0, MOST)
    for top in range(0, rows, ROWS):
        row = top + lanes
        wide = tl.load(coefs + row, mask=row < rows, other=1.0)
        factor = wide.to(tl.float32 if DTYPE.primitive_bitwidth < 64 else tl.float64)
        meant = ((row < rows) & (wide != 1.0))[:, None] & (columns < width)[None, :]
        to = start + row[:, None] * width + columns[None, :]
        values = tl.load(to, mask=meant, other=0)
        tl.store(to, _rounded(_widened(values) * factor[:, None], DTYPE), mask=meant)
