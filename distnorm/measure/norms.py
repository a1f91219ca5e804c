"""The algebra of p-norms: local statistic, reduce op, finaliser. Nobody else asks whether p is infinite.

For finite p the statistic is the sum of ``|x|**p``, reduced by addition; for p = inf it is the largest
``|x|``, reduced by maximum. Where ``|x|**p`` would leave fp64's range for some fp32 value (p above 6.5),
the sum is kept in buckets of magnitude, each with a power-of-two scale of its own, so that one
all-reduce is still enough and nothing overflows or vanishes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.errors import ConfigError

LARGEST_ORDER = 10_000.0
_LOG2_LEAST, _LOG2_MOST = -150, 129  # fp32's magnitudes, subnormals included
_LOG2_RANGE = 950  # of a bucket's largest power: leaves 2**70 elements of room in fp64
_UNSCALED_ORDER = 6.5
_OF_POWERS = {1.0: kernels.Kernel.MAGNITUDES, 2.0: kernels.Kernel.SQUARES}


@dataclass(frozen=True, slots=True)
class Norm(ABC):
    """The order p of a norm, and what follows from it.

    Args:
        order: p, above 0, or inf.
        width: number of fp64 values in a statistic.
        replicas_share: whether each replica may count only its own part of a shard. A maximum counts
            nothing twice, so there every replica counts everything.
    """

    order: float
    width: int
    replicas_share: bool

    @property
    @abstractmethod
    def op(self) -> str:
        """The reduce op over ranks: ``"sum"`` or ``"max"``."""

    @property
    def kernel(self) -> kernels.Kernel | None:
        """What compiled code computes in place of `of_block`, if it can."""
        return None

    @abstractmethod
    def reduce(self, stacked: Tensor) -> Tensor:
        """Combine statistics, [n, width] -> [width], as the all-reduce does over ranks."""

    @abstractmethod
    def of_block(self, block: Tensor) -> Tensor:
        """The statistic, [width] fp64, of a 1-d fp64 block, which may be overwritten."""

    @abstractmethod
    def finalise(self, statistic: Tensor) -> Tensor:
        """The norm, 0-d fp64, of a reduced statistic."""

    def finalise_number(self, statistic: float) -> float:
        """`finalise` of a statistic that is one number in the host's memory."""
        return float(self.finalise(torch.tensor([statistic], dtype=torch.float64, device="cpu")))

    def statistic(
        self, tensors: Sequence[Tensor], device: torch.device, marks: kernels.FiniteMarks | None = None
    ) -> Tensor:
        """The statistic, [width] fp64, of tensors of one device; zeros where there are none.

        Args:
            tensors: whose statistic is asked for.
            device: theirs.
            marks: gets a number for each of the tensors that is not empty.
        """
        statistics: list[Tensor] = []
        if self.kernel is not None:
            statistics, tensors = kernels.measure(tensors, self.kernel, marks)
        if marks is not None:
            marks.add_largest(tensors)
        statistics += [self.of_block(block) for block in kernels.blocks(tensors)]
        if len(statistics) == 1:
            return statistics[0]
        return self.reduce(torch.stack(statistics)) if statistics else self.zeros(device)

    def together(self, norms: Tensor) -> Tensor:
        """The norm, 0-d fp64, of what has parts of these norms, [n] fp64; only for a `width` of 1."""
        assert self.width == 1
        return self.finalise(self.of_block(norms.clone()) if norms.numel() else self.zeros(norms.device))

    def statistic_at(self, place: kernels.Located, taken: kernels.TakenParts | None = None) -> Tensor:
        """The statistic, [width] fp64, of what lies there; only where there is a `kernel`."""
        assert self.kernel is not None
        return kernels.statistic_at(place, self.kernel, taken)

    def zeros(self, device: torch.device) -> Tensor:
        """The statistic of nothing."""
        return torch.zeros(self.width, dtype=torch.float64, device=device)


class _Max(Norm):
    __slots__ = ()
    op = "max"
    kernel = kernels.Kernel.LARGEST

    def reduce(self, stacked: Tensor) -> Tensor:
        return stacked.amax(dim=0)

    def of_block(self, block: Tensor) -> Tensor:
        return block.abs_().amax().view(1)

    def finalise(self, statistic: Tensor) -> Tensor:
        return statistic[0]


class _Sum(Norm):
    __slots__ = ()
    op = "sum"

    @property
    def kernel(self) -> kernels.Kernel | None:
        return _OF_POWERS.get(self.order)

    def reduce(self, stacked: Tensor) -> Tensor:
        return stacked.sum(dim=0)

    def of_block(self, block: Tensor) -> Tensor:
        if self.order == 2:
            return torch.dot(block, block).view(1)
        powers = block.abs_() if self.order == 1 else block.abs_().pow_(self.order)
        return powers.sum().view(1)

    def finalise(self, statistic: Tensor) -> Tensor:
        if self.order == 2:
            return statistic[0].sqrt()
        return statistic[0].pow(1 / self.order)

    def finalise_number(self, statistic: float) -> float:
        return math.sqrt(statistic) if self.order == 2 else super().finalise_number(statistic)


class _BucketedSum(_Sum):
    """Sums of powers by magnitude: bucket b holds blocks whose largest element is at least 2**edge[b]."""

    __slots__ = ()

    def of_block(self, block: Tensor) -> Tensor:
        edges = self._edges(block)
        largest = block.abs_().amax()
        mine = torch.searchsorted(edges, largest.log2().view(1), right=True).sub_(1).clamp_(0, self.width - 1)
        power = block.mul_(torch.exp2(-edges[mine])).pow_(self.order).sum()
        return torch.zeros_like(edges).index_put_((mine,), power.view(1))

    def finalise(self, statistic: Tensor) -> Tensor:
        norms = statistic.pow(1 / self.order) * torch.exp2(self._edges(statistic))
        largest = norms.amax()
        scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
        return (norms / scale).pow(self.order).sum().pow(1 / self.order) * scale

    def _edges(self, like: Tensor) -> Tensor:
        step = (_LOG2_MOST - _LOG2_LEAST) / self.width
        return torch.arange(self.width, dtype=torch.float64, device=like.device) * step + _LOG2_LEAST


def norm(order: float | str) -> Norm:
    """The norm of order p.

    Raises:
        ConfigError: p is not a number above 0, or is finite and above `LARGEST_ORDER`.
    """
    try:
        p = float(order)
    except (TypeError, ValueError):
        p = math.nan
    if isinstance(order, bool) or not p > 0:
        raise ConfigError(f"norm_type: expected a number above 0, or inf; found {order!r}")
    if math.isinf(p):
        return _Max(p, 1, replicas_share=False)
    if p > LARGEST_ORDER:
        raise ConfigError(f"norm_type: expected at most {LARGEST_ORDER:g}, or inf; found {order!r}")
    if p > _UNSCALED_ORDER:
        buckets = math.ceil((_LOG2_MOST - _LOG2_LEAST) * p / _LOG2_RANGE)
        return _BucketedSum(p, buckets, replicas_share=True)
    return _Sum(p, 1, replicas_share=True)
