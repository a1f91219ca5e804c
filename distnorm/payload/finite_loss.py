"""Whether the losses of all ranks are finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distnorm import kernels


class LossFiniteness:
    """Two values: whether a rank has a loss, and whether that is inf or NaN. Sums and maxima of them do.

    Attributes:
        loss: this rank's, 0-d or a number; `None` where it has none. A tensor must not change any more.
    """

    length = 2

    def __init__(self) -> None:
        self.loss: Tensor | float | None = None

    def local(self, gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """This rank's values, [2] fp64 on the device. No device is waited for."""
        values = torch.zeros(self.length, dtype=torch.float64, device=device)
        if self.loss is None:
            return values
        values[0].fill_(1.0)
        if isinstance(self.loss, Tensor):
            is_bad = ~self.loss.detach().reshape(()).isfinite()
            values[1].copy_(kernels.moved(is_bad, device, torch.float64))
        else:
            values[1].fill_(float(not math.isfinite(self.loss)))
        return values

    def read(self, reduced: Tensor) -> bool | None:
        """Whether all losses are finite; `None` where no rank had one. Waits for the device."""
        given, bad = reduced.tolist()
        return not bad if given else None
