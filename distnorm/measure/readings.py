"""This step's local gradients, and what is wrong with those that can't be measured."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.errors import DistnormError, UnsupportedGradientError
from distnorm.measure.norms import Norm
from distnorm.plan.collectives import Ranks
from distnorm.plan.plan import Share
from distnorm.sources.shards import GradShard, PartialGrad

Reading = Tensor | PartialGrad | None
"""A local gradient as it was found, or `None` where this rank has none in this step."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A total norm and the local gradients that it was taken of.

    Args:
        total_norm: 0-d fp64, the same bits on every rank; NaN if a gradient is NaN, or if the ranks did
            not measure the same thing.
        gradients: gives this rank's local gradients, after partial ones were reduced, of all its shards in
            their order; `None` where there is none.
        scale_: multiplies them, in place, by a 0-d coefficient.
        more: what all ranks' further lanes were reduced to; `None` where there were none.
        well: whether all ranks measured, and the same: on the host, or 0-d bool; `None` where nobody did.
    """

    total_norm: Tensor
    gradients: Callable[[], list[Tensor | None]]
    scale_: Callable[[Tensor], None]
    more: Tensor | None = None
    well: Tensor | bool | None = None

    @classmethod
    def of(
        cls,
        total_norm: Tensor,
        gradients: Iterable[Tensor | None],
        more: Tensor | None = None,
        well: Tensor | bool | None = None,
    ) -> Measured:
        """Of gradients that are at hand."""
        every = list(gradients)
        return cls(total_norm, lambda: every, lambda coef: kernels.scale_(present(every), coef), more, well)


def present(gradients: Iterable[Tensor | None]) -> list[Tensor]:
    """The gradients that are there."""
    return [gradient for gradient in gradients if gradient is not None]


def statistic_of(
    norm: Norm, ranks: Ranks, shares: Sequence[Share], gradients: Sequence[Tensor | None]
) -> Tensor:
    """The statistic, [width] fp64, of what this rank counts of its gradients, wherever they are."""
    by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    for gradient, share in zip(gradients, shares, strict=True):
        if gradient is not None and share.start < share.stop:
            all_of_it = share.stop - share.start == gradient.numel()
            counted = gradient if all_of_it else gradient.reshape(-1)[share.start : share.stop]
            by_device[gradient.device].append(counted)
    devices = list(by_device) or [ranks.device()]
    device = ranks.device(devices[0])
    statistics = [kernels.moved(norm.statistic(by_device[d], d), device) for d in devices]
    return norm.reduce(torch.stack(statistics))


def read_gradients(shards: Sequence[GradShard]) -> tuple[list[Reading], list[DistnormError]]:
    """This step's gradients, and what is wrong with those that can't be measured."""
    readings: list[Reading] = []
    problems: list[DistnormError] = []
    for shard in shards:
        reading: Reading = None
        try:
            reading = shard.read()
        except UnsupportedGradientError as error:
            problems.append(_refusal(shard, str(error)))
        misfit = _misfit(shard, reading)
        if misfit:
            problems.append(_refusal(shard, misfit))
            reading = None
        readings.append(reading)
    return readings, problems


def _misfit(shard: GradShard, reading: Reading) -> str | None:
    local, expected = reading, shard.shape
    if isinstance(reading, PartialGrad):
        local, expected = reading.tensor, shard.wide_shape(reading.wide)
    assert not isinstance(local, PartialGrad)
    if local is None or tuple(local.shape) == expected or not (local.numel() or math.prod(expected)):
        return None
    return f"expected the shape {expected}, found {tuple(local.shape)}"


def completed(
    shards: Sequence[GradShard], readings: Sequence[Reading], *, store: bool
) -> tuple[list[Tensor | None], list[DistnormError]]:
    """The readings as gradients, and what is wrong with those that are partial still: nobody agreed to
    reduce them. An empty one needs no reducing; one that is only too wide is cut."""
    gradients: list[Tensor | None] = []
    late: list[DistnormError] = []
    for shard, reading in zip(shards, readings, strict=True):
        if not isinstance(reading, PartialGrad):
            gradients.append(reading)
        elif not reading.axes or not reading.tensor.numel():
            gradient = shard.narrowed(reading.tensor, reading.wide)
            if store:
                gradient = gradient.clone(memory_format=torch.contiguous_format)
                shard.store(gradient)
            gradients.append(gradient)
        else:
            gradients.append(None)
            fact = "its gradient is Partial now; the first gradients that were seen had none such"
            late.append(_refusal(shard, fact))
    return gradients, late


def _refusal(shard: GradShard, fact: str) -> DistnormError:
    return UnsupportedGradientError(f"parameter '{shard.name}': {fact}")
