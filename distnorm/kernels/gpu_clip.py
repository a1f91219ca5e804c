"""All that follows the all-reduce of a step on a GPU, in one launch: norm, coefficient, scaling, result.

It does what the exchange, a constant threshold and the deferred error do by torch's operators, a launch each,
with the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from distnorm.kernels.device_table import DeviceTable, on
from distnorm.kernels.gpu import BLOCK, triton_code


@cache
def clip_code() -> ModuleType:
    """The kernel. Triton is imported here."""
    return import_module("distnorm.kernels.gpu_clip_code")


class Clipped(NamedTuple):
    """What a step found and did: 0-d tensors on the GPU, fp64 and bool.

    `found` is fp64 and begins with the norm, and whether the ranks measured the same.
    """

    found: Tensor
    total_norm: Tensor
    clip_coef: Tensor
    clipped_norm: Tensor
    threshold: Tensor
    is_finite: Tensor
    was_clipped: Tensor
    skipped: Tensor


@dataclass
class ClipTerms:
    """By what a step is decided; see `clip_`.

    Args:
        threshold: the max norm; inf never clips.
        eps: what the norm is added to.
        nonfinite: as in the configuration, or ``"leave out"``: gradients become zero, the step is skipped.
        modulus: of what a header must be a multiple where the ranks measured the same; a power of two.
        tolerance: what the difference of replicas may be; `None` where that isn't reduced.
        order: of the norm: 1 or 2.

    Attributes:
        may_clip: whether the coefficient can be other than 1.
        may_scale: whether gradients can change.
        options: what the kernel is compiled for.
    """

    threshold: float
    eps: float
    nonfinite: str
    modulus: int
    tolerance: float | None
    order: float
    may_clip: bool = field(init=False)
    may_scale: bool = field(init=False)
    options: tuple[int, bool, bool, bool, bool] = field(init=False)
    _on_device: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.may_clip = self.threshold != float("inf")
        self.may_scale = self.may_clip or self.nonfinite in ("zero", "leave out")
        modes = ("propagate", "skip", "zero", "leave out")  # gpu_code's order
        mode = modes.index(self.nonfinite if self.nonfinite in modes else "skip")
        has_replicas = self.tolerance is not None
        self.options = (mode, self.order == 2, has_replicas, self.may_clip, self.may_scale)

    def at(self, device: torch.device) -> Tensor:
        """The numbers, [4] fp64, on the device: sent once."""
        if self._on_device is None or self._on_device.device != device:
            values = [self.threshold, self.modulus, self.tolerance or 0.0, self.eps]
            self._on_device = torch.tensor(values, dtype=torch.float64, device="cpu").to(device)
        return self._on_device


def clip_(table: DeviceTable, reduced: Tensor, terms: ClipTerms) -> Clipped:
    """Decide by what the all-reduce gave, and scale all elements in place. Nothing is waited for.

    Args:
        table: where they are; it has some.
        reduced: fp64, at least [2]: the header, the statistic, and the difference of replicas where the terms
            have a tolerance of it.
        terms: by what it is decided.
    """
    gpu_code, code = triton_code(), clip_code()
    values = torch.empty(5, dtype=torch.float64, device=table.device)
    flags = torch.empty(3, dtype=torch.bool, device=table.device)
    with on(table.device):
        table.ready()
        numbers = terms.at(table.device)
        kinds = table.kinds if terms.may_scale else [(table.kinds[0][0], 0, 1)]
        for kind, first, rows in kinds:
            code.clip[(rows,)](
                table.rows,
                first,
                reduced,
                numbers,
                values,
                flags,
                *terms.options,
                gpu_code.DTYPES[kind],
                BLOCK,
            )
    norm, _, coef, clipped_norm, threshold = values.unbind()
    return Clipped(values, norm, coef, clipped_norm, threshold, *flags.unbind())
