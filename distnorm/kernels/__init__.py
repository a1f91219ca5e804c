"""The local statistic and the scaling, per device; eager torch is the fallback and the reference."""

from __future__ import annotations

from distnorm.kernels.dispatch import measure, scale_
from distnorm.kernels.eager import blocks, checksum, zero_unless_
from distnorm.kernels.native import Kernel

__all__ = ["Kernel", "blocks", "checksum", "measure", "scale_", "zero_unless_"]
