"""What a rank does in a call that gave it no tensors: whatever the other ranks do."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.distributed.algorithms.join import JoinHook

from distnorm.measure.gradients import Gradients
from distnorm.measure.meter import Meter
from distnorm.measure.result_checks import ResultChecks


def join_empty(meter: Meter) -> tuple[Tensor, bool]:
    """The total norm where this rank was given no tensors, and whether the result is fp64. Collective.

    This rank can't know what the others do, so it reads their headers on the host, and does the same.
    """
    while True:
        reduced = meter.join()
        decoded = reduced.decode()
        if decoded.stages == {"plan"}:
            meter.allow_empty = True
            meter.prepare(lambda: ([], []))
        elif "agree" in decoded.stages:
            meter.agree_on_nothing()
        elif not decoded.stages:  # nobody has anything
            return meter.norm.finalise(meter.norm.zeros(meter.ranks.device())), False
        else:
            break
    if meter.listens:
        empty, checks = Gradients([]), ResultChecks(meter.ranks, meter.norm, meter.raises, meter.source)
        if not reduced.agreed:
            checks.raise_disagreement(reduced, decoded, None, (), empty)
        checks.check_values(reduced, tuple, empty)
    return reduced.total_norm, decoded.values["double"] > 0


class TakeOver(JoinHook):
    """What torch's `Join` calls when all ranks are out of data.

    Args:
        take_over: gets whether this rank was among the last that had some. Collective.
    """

    def __init__(self, take_over: Callable[[bool], None]) -> None:
        self._take_over = take_over

    def post_hook(self, is_last_joiner: bool) -> None:
        """Let ranks that were out of data sooner take over the state of one that was not."""
        self._take_over(is_last_joiner)
