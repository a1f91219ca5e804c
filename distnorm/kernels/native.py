"""The local statistic and the scaling of CPU tensors by compiled C, at the memory's bandwidth.

Wheels bring the library, built for several kinds of CPU; elsewhere the compiler makes it at the first use.
Other tensors and orders, and machines that have neither, are left to `distnorm.kernels.eager`. The
environment variable ``DISTNORM_NATIVE=0`` leaves everything to it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distnorm.kernels import compiling
from distnorm.kernels.addresses import CODES, PLAIN, SIZES, AddressTable, Ints, is_dense

_LOG = logging.getLogger("distnorm")
_RECIPE = compiling.Recipe(
    Path(__file__).with_name("native.c"),
    "CC",
    "cc",
    # No -ffast-math: NaN and inf must come through. hatch_build.py builds with these flags too.
    ("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-pthread"),
)
_IN_WHEEL = Path(__file__).with_name("libnative.so")  # no module's name, or it would be imported in its place
_VARIANTS = {"AVX2": "_avx2", "AVX512": "_avx512"}  # what torch calls a CPU, whose conditions are the build's
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


@dataclass(frozen=True, slots=True)
class Library:
    """The compiled functions. Rows are given as `AddressTable.arguments` has them.

    Args:
        code: of each dtype that they can do here.
        run: takes the kernel, the rows, the number of elements and of threads, the coefficient, and where the
            result goes.
        printed: takes the kernel, the rows, the number of elements and of threads, and where the results go.
        summaries: takes the kernel, the rows, the number of threads, and where the results go.
        checksum: takes an address, the bytes of an element and the number of elements.
        fingerprints: takes the rows, the number of threads, and where the results go.
        samples: takes the rows, the signs, and where the results go.
    """

    code: dict[torch.dtype, int]
    run: ctypes._NamedFuncPointer
    printed: ctypes._NamedFuncPointer
    summaries: ctypes._NamedFuncPointer
    checksum: ctypes._NamedFuncPointer
    fingerprints: ctypes._NamedFuncPointer
    samples: ctypes._NamedFuncPointer


@cache
def library() -> Library | None:
    """The wheel's, or else what the compiler makes or has left; `None` if there can't be one here."""
    if os.environ.get("DISTNORM_NATIVE") == "0":
        return None
    try:
        loaded, variant = _load()
    except (compiling.CompileError, OSError) as error:
        level = logging.WARNING if os.environ.get("LOCAL_RANK", "0") == "0" else logging.INFO
        _LOG.log(
            level,
            "gradients on the CPU are read by torch's operators, not by compiled "
            "code, which would take less time: %s",
            error,
        )
        return None
    return _described(loaded, variant)


def _load() -> tuple[ctypes.CDLL, str]:
    """The library, and what stands behind the names of the functions that are built for this CPU."""
    with suppress(OSError):  # not there, or of another architecture or C library
        return ctypes.CDLL(str(_IN_WHEEL)), _VARIANTS.get(torch.backends.cpu.get_cpu_capability(), "")
    return compiling.load(_RECIPE), ""


def _described(loaded: ctypes.CDLL, variant: str) -> Library:
    def function(name: str) -> ctypes._NamedFuncPointer:
        found: ctypes._NamedFuncPointer = getattr(loaded, f"distnorm_{name}{variant}")
        return found

    address, size, code = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    rows = (size, address, address, address)
    arguments: dict[str, list[Any]] = {
        "run": [code, *rows, size, size, ctypes.c_double, address],
        "printed": [code, *rows, size, size, address, address],
        "summaries": [code, *rows, size, address],
        "checksum": [address, size, size],
        "fingerprints": [*rows, size, address],
        "samples": [*rows, ctypes.c_uint64, address],
        "use_pool": [address],
    }
    functions = {name: function(name) for name in arguments}
    for name, types in arguments.items():
        functions[name].argtypes = types
        functions[name].restype = None
    for name in ("run", "printed", "summaries"):
        functions[name].restype = code
    functions["checksum"].restype = size
    functions.pop("use_pool")(_pool())
    able = function("dtypes")()
    return Library({dtype: code for dtype, code in CODES.items() if able >> code & 1}, **functions)


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


def statistic(table: AddressTable, kernel: Kernel) -> float:
    """The statistic of all elements; 0 if there are none.

    It depends on the elements and their order alone, not on how they are cut into rows, where they
    lie, or on the number of threads.
    """
    result = ctypes.c_double(0.0)
    _run(kernel, table.merged, _threads(table.total), 0.0, ctypes.addressof(result))
    return result.value


def printed_statistic(table: AddressTable, kernel: Kernel) -> tuple[float, Ints]:
    """The bits of `statistic`, and each row's print: see `distnorm.kernels.printed_statistic`."""
    table.require_memory()
    result, prints = ctypes.c_double(0.0), np.zeros(len(table.starts), dtype=np.int64)
    ways = (table.total, _threads(table.total), ctypes.addressof(result), prints.ctypes.data)
    if _library().printed(kernel, *table.arguments, *ways):
        raise MemoryError
    return result.value, prints


def scale_(table: AddressTable, coef: float) -> None:
    """Multiply every element in place, with the roundings of `distnorm.kernels.eager.scale_`.

    Autograd's version counter is not changed: see `torch.autograd.graph.increment_version`.
    """
    threads, rows = _threads(table.total), table.merged
    _run(_SCALE, rows, 1 if threads > 1 and rows.overlap else threads, coef, None)


def summaries(table: AddressTable, kernel: Kernel) -> Tensor:
    """Of each row: see `distnorm.kernels.summaries`."""
    results = np.zeros((len(table.starts), 4))
    threads = _threads(table.total)
    if _library().summaries(kernel, *table.arguments, threads, results.ctypes.data):
        raise MemoryError
    return torch.from_numpy(results)


def row_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Of contiguous tensors that `split` found fitting: see `distnorm.kernels.row_squares`."""
    whole = AddressTable.of(tensors)
    count = np.array([len(tensor) for tensor in tensors], dtype=np.int64)
    numels = whole.numels // np.maximum(count, 1)
    sizes = numels * SIZES[whole.codes]
    starts, numels, sizes, codes = (np.repeat(c, count) for c in (whole.starts, numels, sizes, whole.codes))
    within = np.arange(len(starts)) - np.repeat(np.cumsum(count) - count, count)
    rows = AddressTable(whole.device, starts + within * sizes, numels, codes, within * sizes)
    return summaries(rows, Kernel.SQUARES)[:, 0]


def checksum(tensor: Tensor) -> int:
    """That of `distnorm.kernels.eager`, of a contiguous tensor that `split` found fitting."""
    return int(_library().checksum(tensor.data_ptr(), tensor.element_size(), tensor.numel()))


def fingerprints(table: AddressTable) -> Ints:
    """Of each row: see `distnorm.kernels.fingerprints`."""
    results = np.zeros(len(table.starts), dtype=np.int64)
    _library().fingerprints(*table.arguments, _threads(table.total), results.ctypes.data)
    return results


def samples(table: AddressTable, signs: int) -> Tensor:
    """Of each row: see `distnorm.kernels.samples`."""
    results = np.zeros((len(table.starts), 2))
    _library().samples(*table.arguments, signs, results.ctypes.data)
    return torch.from_numpy(results)


def _library() -> Library:
    compiled = library()
    assert compiled is not None
    return compiled


def _run(code: int, rows: AddressTable, threads: int, coef: float, result: int | None) -> None:
    assert rows.device.type == "cpu"
    if _library().run(code, *rows.arguments, rows.total, threads, coef, result):
        raise MemoryError


def _threads(elements: int) -> int:
    """As many as torch uses, but no more than may run: OpenMP's own may be bound to one CPU each."""
    worth = elements // _PER_THREAD
    if worth < 2:
        return 1
    threads = min(torch.get_num_threads(), worth)
    return min(threads, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else threads
