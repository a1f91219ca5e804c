"""The compiled C++ that finds where many gradients lie, many times sooner than Python's attributes do.

It reads torch's own structures, so it is compiled against the headers of the torch that is installed, once,
which takes seconds. That is done meanwhile, by one process of a machine; until then, and where it
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

import torch
from torch import Tensor

from distnorm.kernels import compiling

_LOG = logging.getLogger("distnorm")
_MISSING = object()
_ready: list[ctypes.PyDLL] = []  # the library, once it is there
_WORTH_COMPILING = 256  # gradients: as many cost a fraction of a millisecond by attributes


def hold_just(dicts: list[Mapping[Any, Any]], values: list[object]) -> bool:
    """Whether mappings hold these very values, in this order, one's behind the other's."""
    compiled = library(0)
    if compiled is not None and (found := compiled.distnorm_holds(dicts, values)) >= 0:
        return bool(found)
    held = chain.from_iterable(owned.values() for owned in dicts)
    return all(starmap(is_, zip_longest(held, values, fillvalue=_MISSING)))


def first_with_gradient(tensors: list[Tensor]) -> int:
    """The position of the first tensor that has a gradient; -1 if none has."""
    compiled = library(0)
    if compiled is not None:
        return int(compiled.distnorm_first_with_gradient(tensors))
    return next((i for i, tensor in enumerate(tensors) if tensor.grad is not None), -1)


def slots_of(compiled: ctypes.PyDLL, kind: type, names: Sequence[str]) -> tuple[int, ...] | None:
    """Where a class keeps its `__slots__` of these names; `None` if one of them isn't kept so."""
    found = tuple(int(compiled.distnorm_slot(kind, name.encode())) for name in names)
    return None if -1 in found else found


def library(count: int) -> ctypes.PyDLL | None:
    """The compiled code; where it isn't there, and so many gradients are worth it, it will be soon."""
    if not _ready and _kept() is None and count >= _WORTH_COMPILING:
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
        compiled = load(_recipe(), ctypes.PyDLL)
    except (compiling.CompileError, OSError) as error:
        if compiles:
            _LOG.info("gradients are found by Python's attributes, not by compiled code: %s", error)
        return None
    size, address, instance = ctypes.c_ssize_t, ctypes.c_void_p, ctypes.py_object
    compiled.distnorm_holds.argtypes = [instance, instance]
    compiled.distnorm_first_with_gradient.argtypes = [instance]
    compiled.distnorm_first_with_gradient.restype = size
    compiled.distnorm_slot.argtypes = [instance, ctypes.c_char_p]
    compiled.distnorm_slot.restype = size
    compiled.distnorm_find.argtypes = [instance, address]
    compiled.distnorm_find.restype = instance
    compiled.distnorm_tensors.argtypes = [instance]
    compiled.distnorm_tensors.restype = instance
    compiled.distnorm_changed.argtypes = [instance]
    compiled.distnorm_changed.restype = None
    assert isinstance(compiled, ctypes.PyDLL)
    _ready.append(compiled)
    return compiled


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
