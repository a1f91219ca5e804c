"""Partial sums that are taken during backward, and proved afterwards, in Triton's language.

`distnorm.kernels.taken` launches these kernels. A record of a chunk is its partial sum, a fingerprint of its
bytes, and a number that says in which step it was made and whether the chunk was aligned. Fingerprints are
sums, mod 2**64, of words that were mixed with their places: a word that changes always changes its summand,
and words that trade places are seen.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distnorm.kernels.gpu_code import measure_chunk

_LINES = tl.constexpr(16)  # of 64 bytes, in a period of 1 KiB
_ODD = tl.constexpr(0x9E3779B97F4A7C15)
_MIXER = tl.constexpr(0xD6E8FEB86659FD93)


@triton.jit(do_not_specialize=["first", "step"])
def take(rows, first, parts, prints, step, DTYPE: tl.constexpr, KERNEL: tl.constexpr, BLOCK: tl.constexpr):
    """Record each chunk from row `first` on, of one dtype, in its place.

    Args:
        rows: [chunks, 3] int64: the address; the number of elements, plus 2**32 where the chunk is sampled;
            the place of the record.
        parts, prints: [places] fp64 and [places, 2] int64, the records.
        step: this step's number.
    """
    row = (first + tl.program_id(0)) * 3
    address, packed, place = tl.load(rows + row), tl.load(rows + row + 1), tl.load(rows + row + 2)
    count = packed.to(tl.int32)
    found = _fingerprint(address, count, packed >> 32 != 0, place, DTYPE, BLOCK)
    tl.store(prints + place * 2, found.to(tl.int64, bitcast=True))
    tl.store(prints + place * 2 + 1, _mark(address, step))
    measure_chunk(address, count, parts + place, DTYPE, KERNEL, BLOCK)


@triton.jit(do_not_specialize=["first", "step", "most"])
def compare(
    rows,
    first,
    runs,
    prints,
    changed,
    step,
    most,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write this step's number if a record of this step is of other bytes than the chunk has now.

    Args:
        rows: of a table of `gpu_code`; chunks from row `first` on are compared, of one dtype.
        runs: [tensors, 2] from which to which chunk each tensor goes.
        prints: of the records.
        changed: where the number is written.
        most: chunks of the largest tensor that is not sampled.
    """
    row = first + tl.program_id(0)
    address, packed = tl.load(rows + row * 2), tl.load(rows + row * 2 + 1)
    count, tensor = packed.to(tl.int32), packed >> 32
    if tl.load(prints + row * 2 + 1) == _mark(address, step):
        is_sampled = tl.load(runs + tensor * 2 + 1) - tl.load(runs + tensor * 2) > most
        found = _fingerprint(address, count, is_sampled, row, DTYPE, BLOCK)
        if tl.load(prints + row * 2) != found.to(tl.int64, bitcast=True):
            tl.store(changed, step.to(tl.int64))  # whoever writes it writes the same


@triton.jit(do_not_specialize=["first", "step"])
def partials_unless_taken(
    rows,
    first,
    out,
    parts,
    prints,
    changed,
    step,
    DTYPE: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`gpu_code.partials`, but that chunks with a record of this step are not read, unless something has
    changed: then all are. The number of the step becomes 0 in the record of what is read."""
    row = first + tl.program_id(0)
    address = tl.load(rows + row * 2)
    is_taken = tl.load(prints + row * 2 + 1) == _mark(address, step)
    if is_taken & (tl.load(changed) != step):
        tl.store(out + row, tl.load(parts + row))
    else:
        tl.store(prints + row * 2 + 1, 0)
        count = tl.load(rows + row * 2 + 1).to(tl.int32)
        measure_chunk(address, count, out + row, DTYPE, KERNEL, BLOCK)


@triton.jit
def _mark(address, step):
    """Sums of chunks that are aligned otherwise may differ in their last bits."""
    return step.to(tl.int64) * 2 + (address % 16 == 0).to(tl.int64)


@triton.jit
def _fingerprint(address, count, is_sampled, place, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    if DTYPE.primitive_bitwidth == 64:
        start = address.to(tl.pointer_type(tl.uint64))
    elif DTYPE.primitive_bitwidth == 32:
        start = address.to(tl.pointer_type(tl.uint32))
    else:
        start = address.to(tl.pointer_type(tl.uint16))
    EACH: tl.constexpr = 64 // DTYPE.primitive_bitwidth  # elements of 8 bytes
    if address % 16 == 0:
        words = count // EACH
        wide = tl.multiple_of((address // 16 * 16).to(tl.pointer_type(tl.uint64)), 16)
        found = _sum_of(wide, words, is_sampled, place, 8, BLOCK)
        if words * EACH < count:
            lanes = words * EACH + tl.arange(0, EACH)
            rest = tl.load(start + lanes, mask=lanes < count, other=0)
            found += tl.sum(_mixed(rest.to(tl.uint64), lanes + (1 << 30)), axis=0)
    else:
        found = _sum_of(start, count, is_sampled, place, 8 * EACH, BLOCK)
    return found + count.to(tl.uint64)


@triton.jit
def _sum_of(start, total, is_sampled, place, LINE: tl.constexpr, BLOCK: tl.constexpr):
    """Of all words, or of the 8 to 32 of a line in each period: a pseudo-random one, so that a column of a
    matrix is met as surely as a row."""
    lanes = tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], tl.uint64)
    if is_sampled:
        periods = tl.cdiv(total, LINE * _LINES)
        for at in range(0, periods, BLOCK // LINE):
            period = at + lanes // LINE
            line = _mixed(period.to(tl.uint64), place.to(tl.uint64)) >> 60
            begin = tl.minimum(period * (LINE * _LINES) + line.to(tl.int32) * LINE, total - LINE)
            words = begin + lanes % LINE
            inside = (period < periods) & (words >= 0)
            values = tl.load(start + words, mask=inside, other=0)
            found += tl.where(inside, _mixed(values.to(tl.uint64), words), 0)
    else:
        for at in range(0, total, BLOCK):
            words = at + lanes
            inside = words < total
            values = tl.load(start + words, mask=inside, other=0)
            found += tl.where(inside, _mixed(values.to(tl.uint64), words), 0)
    return tl.sum(found, axis=0)


@triton.jit
def _mixed(words, places):
    mixed = words ^ (places.to(tl.uint64) * _ODD)
    mixed = (mixed ^ (mixed >> 32)) * _MIXER
    mixed = (mixed ^ (mixed >> 32)) * _MIXER
    return mixed ^ (mixed >> 32)
