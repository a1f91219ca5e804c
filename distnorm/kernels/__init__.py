"""The local statistic and the scaling, per device; eager torch is the fallback and the reference."""

from __future__ import annotations

from distnorm.kernels.dispatch import measure, measure_spans, scale_, scale_spans_
from distnorm.kernels.eager import blocks, checksum, zero_unless_
from distnorm.kernels.native import Kernel, Spans, SpanTable, addresses_of, split
from distnorm.kernels.walking import Walker, walker

__all__ = [
    "Kernel",
    "SpanTable",
    "Spans",
    "Walker",
    "addresses_of",
    "blocks",
    "checksum",
    "measure",
    "measure_spans",
    "scale_",
    "scale_spans_",
    "split",
    "walker",
    "zero_unless_",
]
