"""Finding where many gradients lie by compiled C++, some ten times sooner than by Python's attributes.

It reads torch's own structures, so it is compiled against the headers of the torch that is installed, once,
which takes some ten seconds. That is done meanwhile, by one process of a machine; until then, and where it
can't be, attributes do it. ``DISTNORM_NATIVE=0`` switches it off, and ``now`` waits for it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import chain, starmap, zip_longest
from operator import is_
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distnorm.kernels import compiling
from distnorm.kernels.native import Ints, SpanTable

_LOG = logging.getLogger("distnorm")
_MISSING = object()
_ready: list[ctypes.PyDLL] = []  # the library, once it is there
_WORTH_COMPILING = 256  # gradients: as many cost a fraction of a millisecond by attributes


class Walker:
    """The compiled function, for the gradients of the same parameters step after step.

    Args:
        library: what was compiled.
        table: dtypes and numbers of elements of the (local) gradients.
        specs: for DTensors, what each one's `_spec` is; else `None`.
    """

    def __init__(self, library: ctypes.PyDLL, table: SpanTable, specs: Sequence[object] | None) -> None:
        self._table, self._specs = table, None if specs is None else list(specs)
        self._scratch: Ints = np.empty(len(table.numels), dtype=np.int64)
        self._walk = library.distnorm_walk
        self._fixed: tuple[object, ...] = (None, -1, -1)
        if specs is not None:
            kind = sys.modules["torch.distributed.tensor"].DTensor
            slots = (library.distnorm_slot(kind, name) for name in (b"_spec", b"_local_tensor"))
            self._fixed = (kind, *slots)

    @property
    def works(self) -> bool:
        """Whether this torch keeps things where they are expected."""
        return self._specs is None or -1 not in self._fixed

    def __call__(self, holders: Sequence[Tensor], out: Ints) -> bool:
        """Write the addresses of the gradients' first elements into `out`, [tensors].

        Returns:
            Whether each gradient is there, in the CPU's memory, contiguous, and of its dtype, size and
            spec; if not, they must be looked at in another way.
        """
        numels, codes = self._table.numels, self._table.codes
        arrays = (numels.ctypes.data, codes.ctypes.data, out.ctypes.data, self._scratch.ctypes.data)
        found: int = self._walk(holders, self._specs, *arrays, *self._fixed)
        return found == len(out)


def hold_just(dicts: list[Mapping[Any, Any]], values: list[object]) -> bool:
    """Whether mappings hold these very values, in this order, one's behind the other's."""
    library = _library(False)
    if library is not None and (found := library.distnorm_holds(dicts, values)) >= 0:
        return bool(found)
    held = chain.from_iterable(owned.values() for owned in dicts)
    return all(starmap(is_, zip_longest(held, values, fillvalue=_MISSING)))


def can_walk(count: int) -> bool:
    """Whether the library is there; where it isn't, and so many gradients are worth it, it will be soon."""
    return _library(count >= _WORTH_COMPILING) is not None


def walker(table: SpanTable, specs: Sequence[object] | None) -> Walker | None:
    """A walker for gradients of such a table; `None` where there can't be one, or not yet."""
    library = _library(len(table.numels) >= _WORTH_COMPILING)
    made = None if library is None else Walker(library, table, specs)
    return made if made is not None and made.works else None


def _library(is_worth_it: bool) -> ctypes.PyDLL | None:
    if not _ready and (_kept() is None) and is_worth_it:
        _begin_to_compile()
    return _ready[0] if _ready else None


@cache
def _kept() -> ctypes.PyDLL | None:
    """What an earlier process has compiled."""
    return None if os.environ.get("DISTNORM_NATIVE") == "0" else _load(compiles=False)


@cache
def _begin_to_compile() -> None:
    """Nobody waits for it: steps go by attributes until it is there."""
    mode = os.environ.get("DISTNORM_NATIVE")
    if mode == "now":
        _load(compiles=True)
    elif mode != "0":
        Thread(target=_load, kwargs={"compiles": True}, name="distnorm compiles", daemon=True).start()


def _load(*, compiles: bool) -> ctypes.PyDLL | None:
    load = compiling.load_in_turn if compiles else partial(compiling.load, compiles=False)
    try:
        library = load(_recipe(), ctypes.PyDLL)
    except (compiling.CompileError, OSError) as error:
        if compiles:
            _LOG.info("gradients are found by Python's attributes, not by compiled code: %s", error)
        return None
    size, address, instance = ctypes.c_ssize_t, ctypes.c_void_p, ctypes.py_object
    library.distnorm_holds.argtypes = [instance, instance]
    library.distnorm_slot.argtypes = [instance, ctypes.c_char_p]
    library.distnorm_slot.restype = size
    library.distnorm_walk.argtypes = [instance, instance, *[address] * 4, instance, size, size]
    library.distnorm_walk.restype = ctypes.c_int64
    assert isinstance(library, ctypes.PyDLL)
    _ready.append(library)
    return library


def _recipe() -> compiling.Recipe:
    home = Path(torch.__file__).parent
    return compiling.Recipe(
        Path(__file__).with_name("walk.cpp"),
        "CXX",
        "c++",
        (
            *("-std=c++20", "-O2", "-fPIC", "-shared", "-w"),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            *("-isystem", str(home / "include"), "-isystem", sysconfig.get_path("include")),
        ),
        (f"-L{home / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-lc10"),
        (torch.__version__, sys.version),
    )
