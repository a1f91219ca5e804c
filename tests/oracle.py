"""What one process that holds everything would compute, in fp64. Shares no code with the library."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's elements, exactly, as fp64 or complex128."""
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return tensor.detach().to(wide).numpy()


def dense(arrays: Iterable[np.ndarray], order: float = 2.0) -> float:
    """The norm of all elements as one vector; the sum of powers is rounded once."""
    parts = [np.abs(array).reshape(-1) for array in arrays]
    magnitudes = np.concatenate([np.zeros(0), *parts])
    if magnitudes.size == 0:
        return 0.0
    largest = float(magnitudes.max())  # NaN if an element is NaN
    if largest == 0.0 or not math.isfinite(largest) or math.isinf(order):
        return largest
    return largest * math.fsum(((magnitudes / largest) ** order).tolist()) ** (1.0 / order)


def dense_of(tensors: Iterable[torch.Tensor], order: float = 2.0) -> float:
    return dense([as_numpy(tensor) for tensor in tensors], order)


def relative_error(found: float, exact: float) -> float:
    if found == exact or (math.isnan(found) and math.isnan(exact)):
        return 0.0
    return abs(found - exact) / abs(exact) if exact else math.inf


def ulps(found: float, exact: float) -> float:
    """The distance in units of the last place of fp32."""
    return abs(found - exact) / float(np.spacing(np.float32(exact)))


def coefficient(total: float, max_norm: float) -> float:
    """torch's clip coefficient, in fp64."""
    return min(1.0, max_norm / (total + 1e-6))


def is_scaled(after: torch.Tensor, before: np.ndarray, coef: float) -> bool:
    """Whether every element is its old value times the coefficient, rounded once to its dtype.

    The coefficient itself is an fp32 number unless the elements are fp64. A product of two fp32
    numbers is exact in fp64, so there is one rounding left to allow for.
    """
    wide = after.dtype in (torch.float64, torch.complex128)
    factor = coef if wide else float(np.float32(coef))
    info = torch.finfo(after.dtype)
    exact = before * factor
    # 1.001: a bf16 product may be rounded to fp32 on its way. 2.3e-16: the coefficient's own rounding.
    allowed = np.abs(exact) * (info.eps / 2 * 1.001 + 2.3e-16) + info.smallest_normal * info.eps
    return bool((np.abs(as_numpy(after) - exact) <= allowed).all())


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's bits, in logical order: -0.0 is not 0.0, and one NaN is not another."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
