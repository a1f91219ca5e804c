"""Bytes that a process holds, counted and not estimated: what the C library has handed out and not got back.

Resident memory holds more: what was freed and not given back to the system, which differs from run to run.
"""

from __future__ import annotations

import ctypes
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_FIELDS = (
    "arena",
    "ordblks",
    "smblks",
    "hblks",
    "hblkhd",
    "usmblks",
    "fsmblks",
    "uordblks",
    "fordblks",
    "keepcost",
)


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


def can_count() -> bool:
    """Whether this C library counts (glibc from 2.33)."""
    return hasattr(ctypes.CDLL(None), "mallinfo2")


def held_bytes() -> int:
    """What the process holds now: tensors on the CPU, arrays, byte strings; but for small Python objects."""
    info = _mallinfo()
    return int(info.uordblks + info.hblkhd)


class HeldPeak(TorchDispatchMode):
    """The most that is held while this is active, looked at after every operator of torch, of this thread.

    An operator's result is seen before anything that it was made of goes. What it frees itself isn't.
    """

    def __init__(self) -> None:
        super().__init__()
        self._most = held_bytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and look."""
        result = func(*args, **(kwargs or {}))
        self._most = max(self._most, held_bytes())
        return result

    def next(self) -> int:
        """The most since the last call, and now; another count begins."""
        now = held_bytes()
        most, self._most = max(self._most, now), now
        return most


def _mallinfo() -> _Mallinfo:
    found: _Mallinfo = _MALLINFO2()
    return found


if can_count():
    _MALLINFO2 = ctypes.CDLL(None).mallinfo2
    _MALLINFO2.restype = _Mallinfo
