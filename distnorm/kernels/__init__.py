"""Where tensors lie, the local statistic and the scaling, per device; eager torch is the fallback and the
reference."""

from __future__ import annotations

from distnorm.kernels.addresses import HOST, PLAIN, AddressTable, Ints, addresses_of, on_host
from distnorm.kernels.device_table import DeviceTable
from distnorm.kernels.dispatch import (
    checksum,
    clamp_,
    fingerprints,
    measure,
    printed_statistic,
    row_squares,
    scale_,
    scale_each_,
    scale_rows_,
    summaries,
    zero_unless_,
)
from distnorm.kernels.eager import blocks, mode_of, moved, on_device
from distnorm.kernels.finding import Finder, Found
from distnorm.kernels.gpu_clip import Clipped, ClipTerms
from distnorm.kernels.gpu_clip import clip_ as clip_at_
from distnorm.kernels.host_copy import AsyncHostCopy
from distnorm.kernels.located import (
    Located,
    has_kernel,
    headed_statistic_at,
    located,
    scale_at_,
    statistic_at,
)
from distnorm.kernels.marks import FiniteMarks
from distnorm.kernels.memory import SharedMemoryError, is_all_there, memory_of, once
from distnorm.kernels.modes import Untracked, is_captured, outside_graphs, plain_operators, refuse_capture
from distnorm.kernels.native import Kernel, split
from distnorm.kernels.sampling import samples, samples_are_cheap, samples_at, samples_of
from distnorm.kernels.taken import LEAST, TakenParts, stream_of
from distnorm.kernels.walking import first_with_gradient, hold_just

__all__ = [
    "HOST",
    "LEAST",
    "PLAIN",
    "AddressTable",
    "AsyncHostCopy",
    "ClipTerms",
    "Clipped",
    "DeviceTable",
    "Finder",
    "FiniteMarks",
    "Found",
    "Ints",
    "Kernel",
    "Located",
    "SharedMemoryError",
    "TakenParts",
    "Untracked",
    "addresses_of",
    "blocks",
    "checksum",
    "clamp_",
    "clip_at_",
    "fingerprints",
    "first_with_gradient",
    "has_kernel",
    "headed_statistic_at",
    "hold_just",
    "is_all_there",
    "is_captured",
    "located",
    "measure",
    "memory_of",
    "mode_of",
    "moved",
    "on_device",
    "on_host",
    "once",
    "outside_graphs",
    "plain_operators",
    "printed_statistic",
    "refuse_capture",
    "row_squares",
    "samples",
    "samples_are_cheap",
    "samples_at",
    "samples_of",
    "scale_",
    "scale_at_",
    "scale_each_",
    "scale_rows_",
    "split",
    "statistic_at",
    "stream_of",
    "summaries",
    "zero_unless_",
]
