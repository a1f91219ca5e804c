"""All that follows the all-reduce of a step on a GPU, in one launch: norm, coefficient, scaling, result.

It does what the exchange, a constant threshold and the deferred error do by torch's operators, a launch each,
with the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from distnorm.kernels.device_table import DeviceTable, on
from distnorm.kernels.gpu import BLOCK


class Clipped(NamedTuple):
    """What a step found and did: 0-d tensors on the GPU, fp64 and bool.

    `found` is fp64 [2]: the norm, and whether the ranks measured the same.
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
    """

    threshold: float
    eps: float
    nonfinite: str
    modulus: int
    tolerance: float | None
    order: float
    _on_device: Tensor | None = field(init=False, default=None)

    @property
    def may_clip(self) -> bool:
        """Whether the coefficient can be other than 1."""
        return self.threshold != float("inf")

    @property
    def may_scale(self) -> bool:
        """Whether gradients can change."""
        return self.may_clip or self.nonfinite in ("zero", "leave out")

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
    from distnorm.kernels import gpu_code

    modes = {"propagate": gpu_code.PROPAGATE, "zero": gpu_code.ZERO_ALL, "leave out": gpu_code.LEAVE_OUT}
    mode = modes.get(terms.nonfinite, gpu_code.SKIP)
    values = torch.empty(5, dtype=torch.float64, device=table.device)
    flags = torch.empty(3, dtype=torch.bool, device=table.device)
    options = (mode, terms.order == 2, terms.tolerance is not None, terms.may_clip, terms.may_scale)
    with on(table.device):
        table.ready()
        numbers = terms.at(table.device)
        kinds = table.kinds if terms.may_scale else [(table.kinds[0][0], 0, 1)]
        for code, first, rows in kinds:
            gpu_code.clip[(rows,)](
                table.rows, first, reduced, numbers, values, flags, *options, gpu_code.DTYPES[code], BLOCK
            )
    norm, _, coef, clipped_norm, threshold = values.unbind()
    return Clipped(values[:2], norm, coef, clipped_norm, threshold, *flags.unbind())
