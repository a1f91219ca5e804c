"""The local statistic and the scaling of CPU tensors by compiled C, at the memory's bandwidth.

Other tensors, orders and machines without a compiler are left to `distnorm.kernels.eager`. The
environment variable ``DISTNORM_NATIVE=0`` leaves everything to it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from distnorm.kernels import compiling

_LOG = logging.getLogger("distnorm")
_RECIPE = compiling.Recipe(
    Path(__file__).with_name("native.c"),
    "CC",
    "cc",
    # No -ffast-math: NaN and inf must come through.
    ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-pthread"),
)
PLAIN = {Tensor, nn.Parameter}
"""The classes whose memory is what they say."""
_OPENMP = re.compile(r"/lib(g|i)?omp[^/]*\.so")
_PER_THREAD = 1 << 19  # elements: below, starting a thread takes longer than it saves


class Kernel(IntEnum):
    """A statistic of the elements' magnitudes. The values are native.c's codes."""

    SQUARES = 0
    """Their squares' sum."""
    MAGNITUDES = 1
    """Their sum."""
    LARGEST = 2
    """The largest, or NaN if one is NaN."""


_SCALE = 3  # in place of a Kernel
CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""Each dtype's code in native.c and gpu_code.py."""
SIZES = np.array([dtype.itemsize for dtype in CODES], dtype=np.int64)
"""Bytes of an element, by code."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Library:
    """The compiled functions.

    Args:
        code: of each dtype that they can do here.
        run: takes the kernel; the number of spans and the addresses of three arrays, as `Spans` has them;
            the number of elements, of threads, the coefficient, and where the result goes.
        summaries: takes the kernel, the spans as `run` does, the number of threads, and where the rows go.
        checksum: takes an address, the bytes of an element and the number of elements.
    """

    code: dict[torch.dtype, int]
    run: ctypes._NamedFuncPointer
    summaries: ctypes._NamedFuncPointer
    checksum: ctypes._NamedFuncPointer


@cache
def library() -> Library | None:
    """Compile the C file, or take what an earlier process left; `None` if there can't be one here."""
    if os.environ.get("DISTNORM_NATIVE") == "0":
        return None
    try:
        loaded = compiling.load(_RECIPE)
    except (compiling.CompileError, OSError) as error:
        _LOG.info("gradients on the CPU are read by torch's operators, not by compiled code: %s", error)
        return None
    address, size = ctypes.c_void_p, ctypes.c_int64
    loaded.distnorm_run.argtypes = [
        *(ctypes.c_int32, size, address, address, address),
        *(size, size, ctypes.c_double, address),
    ]
    loaded.distnorm_summaries.argtypes = [
        *(ctypes.c_int32, size, address, address, address),
        *(size, address),
    ]
    loaded.distnorm_checksum.argtypes = [address, size, size]
    loaded.distnorm_checksum.restype = size
    loaded.distnorm_use_pool.argtypes = [address]
    loaded.distnorm_use_pool(_pool())
    able = loaded.distnorm_dtypes()
    code = {dtype: code for dtype, code in CODES.items() if able >> code & 1}
    return Library(code, loaded.distnorm_run, loaded.distnorm_summaries, loaded.distnorm_checksum)


def _pool() -> int | None:
    """The address of GOMP_parallel in the one OpenMP that is loaded, which is torch's; else `None`."""
    with suppress(OSError, AttributeError, ValueError):
        with open("/proc/self/maps", encoding="utf-8") as lines:
            found = {line.split(maxsplit=5)[5].strip() for line in lines if _OPENMP.search(line)}
        (path,) = found  # of two, nobody knows whose threads torch uses
        return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
    return None


def split(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those that the compiled code can read and scale, dense CPU memory of a real dtype, and the others."""
    compiled = library()
    code = compiled.code if compiled is not None else {}
    fitting: list[Tensor] = []
    rest: list[Tensor] = []
    for tensor in tensors:
        plain = tensor.dtype in code and tensor.is_cpu and type(tensor) in PLAIN
        fits = plain and is_dense(tensor)
        (fitting if fits else rest).append(tensor)
    return fitting, rest


def is_dense(tensor: Tensor) -> bool:
    """Whether it is contiguous but for the order of its dims."""
    if tensor.is_contiguous():
        return True
    strides = tensor.stride()
    return tensor.permute(sorted(range(tensor.dim()), key=lambda dim: -strides[dim])).is_contiguous()


@dataclass(frozen=True)
class SpanTable:
    """What tensors have in common from step to step, but for where they are.

    Args:
        offsets: [tensors] of the part of each tensor that is meant, in bytes from its first element.
        numels, codes: [tensors] number of elements of that part, and dtype.
    """

    offsets: Ints
    numels: Ints
    codes: npt.NDArray[np.int32]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> SpanTable:
        """Whole tensors that `split` found fitting."""
        compiled = library()
        assert compiled is not None
        numels = np.array(list(map(Tensor.numel, tensors)), dtype=np.int64)
        codes = np.array([compiled.code[tensor.dtype] for tensor in tensors], dtype=np.int32)
        return cls(np.zeros_like(numels), numels, codes)

    def part(self, starts: Ints, numels: Ints) -> SpanTable:
        """Of each tensor `numels` elements from `starts` on."""
        return SpanTable(self.offsets + starts * SIZES[self.codes], numels, self.codes)

    def at(self, addresses: Ints) -> Spans:
        """The spans of tensors whose first elements are at these addresses."""
        held = self.numels > 0
        if not addresses[held].all():
            raise ValueError("expected tensors with memory, found one whose storage was freed")
        starts, numels, codes = (addresses + self.offsets)[held], self.numels[held], self.codes[held]
        apart = (starts[1:] != _ends(starts, numels, codes)[:-1]) | (codes[1:] != codes[:-1])
        first = np.flatnonzero(np.concatenate([[True], apart])[: len(starts)])
        merged = np.add.reduceat(numels, first) if len(first) else numels
        return Spans(starts[first], merged, codes[first])


@dataclass(frozen=True)
class Spans:
    """Where tensors lie in memory. It keeps none of them alive: use it while they are there.

    Neighbours that lie one behind the other, as views of one flat buffer do, are one span.

    Args:
        starts, numels, codes: [spans] address, number of elements and dtype of each span; none is empty.
    """

    starts: Ints
    numels: Ints
    codes: npt.NDArray[np.int32]
    total: int = field(init=False)
    _arguments: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        arrays = [array.ctypes.data for array in (self.starts, self.numels, self.codes)]
        object.__setattr__(self, "total", int(self.numels.sum()))
        object.__setattr__(self, "_arguments", (len(self.starts), *arrays, self.total))

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Spans:
        """The spans of tensors that `split` found fitting."""
        return SpanTable.of(tensors).at(addresses_of(tensors))

    @cached_property
    def overlap(self) -> bool:
        """Whether some element is in two spans: then threads would race for it."""
        order = np.argsort(self.starts)
        ends = _ends(self.starts, self.numels, self.codes)
        return bool((self.starts[order][1:] < ends[order][:-1]).any())


def statistic(spans: Spans, kernel: Kernel) -> float:
    """The statistic of all elements; 0 if there are none.

    It depends on the elements and their order alone, not on how they are cut into spans, where they
    lie, or on the number of threads.
    """
    result = ctypes.c_double(0.0)
    _run(kernel, spans, _threads(spans.total), 0.0, ctypes.addressof(result))
    return result.value


def scale_(spans: Spans, coef: float) -> None:
    """Multiply every element in place, with the roundings of `distnorm.kernels.eager.scale_`.

    Autograd isn't told: see `torch.autograd.graph.increment_version`.
    """
    threads = _threads(spans.total)
    _run(_SCALE, spans, 1 if threads > 1 and spans.overlap else threads, coef, None)


def summaries(tensors: Sequence[Tensor], kernel: Kernel) -> Tensor:
    """Of each tensor that `split` found fitting: see `distnorm.kernels.summaries`."""
    table = SpanTable.of(tensors)
    return _summaries(addresses_of(tensors), table.numels, table.codes, kernel)


def row_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Of contiguous tensors that `split` found fitting: see `distnorm.kernels.row_squares`."""
    table = SpanTable.of(tensors)
    rows = np.array([len(tensor) for tensor in tensors], dtype=np.int64)
    numels = table.numels // np.maximum(rows, 1)
    starts, numels, sizes, codes = (
        np.repeat(column, rows)
        for column in (addresses_of(tensors), numels, numels * SIZES[table.codes], table.codes)
    )
    within = np.arange(len(starts)) - np.repeat(np.cumsum(rows) - rows, rows)
    return _summaries(starts + within * sizes, numels, codes, Kernel.SQUARES)[:, 0]


def _summaries(starts: Ints, numels: Ints, codes: npt.NDArray[np.int32], kernel: Kernel) -> Tensor:
    compiled = library()
    assert compiled is not None
    if not starts[numels > 0].all():
        raise ValueError("expected tensors with memory, found one whose storage was freed")
    rows = torch.zeros(len(starts), 4, dtype=torch.float64)
    arrays = [array.ctypes.data for array in (starts, numels, codes)]
    if compiled.summaries(kernel, len(starts), *arrays, _threads(int(numels.sum())), rows.data_ptr()):
        raise MemoryError
    return rows


def checksum(tensor: Tensor) -> int:
    """That of `distnorm.kernels.eager`, of a contiguous tensor that `split` found fitting."""
    compiled = library()
    assert compiled is not None
    return int(compiled.checksum(tensor.data_ptr(), tensor.element_size(), tensor.numel()))


def _run(code: int, spans: Spans, threads: int, coef: float, result: int | None) -> None:
    compiled = library()
    assert compiled is not None
    if compiled.run(code, *spans._arguments, threads, coef, result):
        raise MemoryError


def _threads(elements: int) -> int:
    """As many as torch uses, but no more than may run: OpenMP's own may be bound to one CPU each."""
    worth = elements // _PER_THREAD
    if worth < 2:
        return 1
    threads = min(torch.get_num_threads(), worth)
    return min(threads, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else threads


def addresses_of(tensors: Sequence[Tensor]) -> Ints:
    """[tensors] address of each one's first element."""
    return np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))


def _ends(starts: Ints, numels: Ints, codes: npt.NDArray[np.int32]) -> Ints:
    return starts + numels * SIZES[codes]
