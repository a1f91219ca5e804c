"""What the all-reduce of a measurement gave."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.measure.header import DecodedHeader, Packing
from distnorm.measure.norms import Norm


@dataclass(frozen=True, slots=True)
class ReducedStatistics:
    """What the all-reduce gave.

    Args:
        total_norm: 0-d fp64; NaN where the ranks did not measure the same.
        payload: the reduced payload, [length] fp64.
        decode: the headers, read on the host. In the packed form every rank must call it that reads a total
            norm of disagreement, and every rank that measures nothing.
        is_packed: in which form the vector was.
        agreed: whether all ranks measured, and the same; 0-d bool where that isn't known on the host.
        if_agreed: what `total_norm` is if the ranks measured the same after all.
        replica_difference: by how much replicas differ, where that is known on the host; else 0-d fp64, and
            `None` where nothing was compared.
    """

    total_norm: Tensor
    payload: Tensor
    decode: Callable[[], DecodedHeader]
    is_packed: bool
    agreed: Tensor | bool
    if_agreed: Tensor
    replica_difference: Tensor | float | None = None

    @property
    def is_known_not_finite(self) -> bool:
        """Whether all ranks measured the same and the norm is not finite, if that can be read for free."""
        norm = self.total_norm
        return self.agreed is True and kernels.on_host(norm) and not bool(norm.isfinite())

    def checked(self) -> ReducedStatistics:
        """The same where this rank has found that all ranks measured alike."""
        return self if self.agreed is True else replace(self, agreed=True)


@dataclass(slots=True)
class UnreadStatistics:
    """What the all-reduce gave where nobody reads it on the host, as it came. The rest of `ReducedStatistics`
    is worked out by torch's operators when it is asked for: one kernel may do without.

    Args:
        vector: [2 or 3 + length] fp64 header, statistic, difference of replicas, payload.
        has_replicas: whether there is a difference.
        packing, norm: how header and statistic are read.
        tolerance: what the difference may be; `None` where no difference is too large.
    """

    vector: Tensor
    has_replicas: bool
    packing: Packing
    norm: Norm
    tolerance: float | None = None
    _read: tuple[Tensor, Tensor] | None = None

    @property
    def is_known_not_finite(self) -> bool:
        """It can't be read for free."""
        return False

    @property
    def payload(self) -> Tensor:
        """The reduced payload, [length] fp64."""
        return self.vector[2 + self.has_replicas :]

    @property
    def agreed(self) -> Tensor:
        """Whether all ranks measured, and the same, 0-d bool."""
        return self._agreed_and_norm()[0]

    @property
    def total_norm(self) -> Tensor:
        """0-d fp64; NaN where the ranks did not measure the same."""
        return self._agreed_and_norm()[1]

    def _agreed_and_norm(self) -> tuple[Tensor, Tensor]:
        if self._read is None:
            agreed, norm = self.packing.agreed(self.vector[0]), self.norm.finalise(self.vector[1:2])
            if self.tolerance is not None:  # what is not finite has no difference; the norm says it itself
                agreed = agreed & ((self.vector[2].abs() <= self.tolerance) | ~norm.isfinite())
            self._read = agreed, torch.where(agreed, norm, math.nan)
        return self._read


def without_norm(gradients: Sequence[Tensor | None], device: torch.device) -> ReducedStatistics:
    """What stands for a reduction of gradients where no norm is needed: a total norm of NaN on a device."""
    with kernels.mode_of([gradient for gradient in gradients if gradient is not None]):
        norm = torch.full((), math.nan, dtype=torch.float64, device=device)
    return ReducedStatistics(norm, norm.view(1)[:0], lambda: DecodedHeader({}), True, True, norm)
