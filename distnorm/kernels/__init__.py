"""Where tensors lie, the local statistic and the scaling, per device; eager torch is the fallback and the
reference."""

from __future__ import annotations

from distnorm.kernels.addresses import HOST, PLAIN, AddressTable, addresses_of, on_host
from distnorm.kernels.dispatch import (
    checksum,
    fingerprints,
    measure,
    row_squares,
    scale_,
    scale_at_,
    scale_each_,
    statistic_at,
    summaries,
)
from distnorm.kernels.eager import blocks, clamp_, mode_of, moved, on_device, zero_unless_
from distnorm.kernels.finding import Finder, Found
from distnorm.kernels.host_copy import AsyncHostCopy
from distnorm.kernels.marks import FiniteMarks
from distnorm.kernels.memory import SharedMemoryError, is_all_there, memory_of, once
from distnorm.kernels.modes import outside_graphs, plain_operators
from distnorm.kernels.native import Kernel, split
from distnorm.kernels.sampling import samples, samples_of
from distnorm.kernels.walking import first_with_gradient, hold_just

__all__ = [
    "HOST",
    "PLAIN",
    "AddressTable",
    "AsyncHostCopy",
    "Finder",
    "FiniteMarks",
    "Found",
    "Kernel",
    "SharedMemoryError",
    "addresses_of",
    "blocks",
    "checksum",
    "clamp_",
    "fingerprints",
    "first_with_gradient",
    "hold_just",
    "is_all_there",
    "measure",
    "memory_of",
    "mode_of",
    "moved",
    "on_device",
    "on_host",
    "once",
    "outside_graphs",
    "plain_operators",
    "row_squares",
    "samples",
    "samples_of",
    "scale_",
    "scale_at_",
    "scale_each_",
    "split",
    "statistic_at",
    "summaries",
    "zero_unless_",
]
