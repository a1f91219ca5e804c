"""The local statistic and the scaling, per device; eager torch is the fallback and the reference."""

from __future__ import annotations

from distnorm.kernels.eager import blocks, checksum, scale_, zero_unless_

__all__ = ["blocks", "checksum", "scale_", "zero_unless_"]
