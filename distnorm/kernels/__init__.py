"""The local statistic and the scaling, per device; eager torch is the fallback and the reference."""

from __future__ import annotations

from distnorm.kernels.dispatch import (
    checksum,
    measure,
    measure_spans,
    row_squares,
    scale_,
    scale_each_,
    scale_spans_,
    summaries,
)
from distnorm.kernels.eager import blocks, clamp_, moved, on_host, zero_unless_
from distnorm.kernels.native import Kernel, Spans, SpanTable, addresses_of, split
from distnorm.kernels.walking import Walker, can_walk, hold_just, walker

__all__ = [
    "Kernel",
    "SpanTable",
    "Spans",
    "Walker",
    "addresses_of",
    "blocks",
    "can_walk",
    "checksum",
    "clamp_",
    "hold_just",
    "measure",
    "measure_spans",
    "moved",
    "on_host",
    "row_squares",
    "scale_",
    "scale_each_",
    "scale_spans_",
    "split",
    "summaries",
    "walker",
    "zero_unless_",
]
