"""The all-reduce of a step whose result no rank reads on the host: nothing here waits for a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.measure.exchange import Exchange, Payload
from distnorm.measure.gradients import Gradients
from distnorm.measure.header import Header
from distnorm.measure.norms import Norm
from distnorm.measure.reduced import ReducedStatistics, UnreadStatistics
from distnorm.measure.result_checks import ResultChecks
from distnorm.plan.plan import Share
from distnorm.plan.stops import Stops


@dataclass(frozen=True, slots=True)
class UnreadReduction:
    """Reduces the gradients of one plan.

    Args:
        exchange: meets the other ranks.
        norm: which norm.
        checks: compares replicas.
        shares: what this rank counts of each shard.
    """

    exchange: Exchange
    norm: Norm
    checks: ResultChecks
    shares: Sequence[Share]

    def __call__(
        self,
        gradients: Gradients,
        statistic: Tensor | None,
        header: Header,
        payload: Payload | None,
        device: torch.device,
        *,
        marks: bool,
    ) -> Stops[ReducedStatistics | UnreadStatistics]:
        """Measure and reduce. Stops at the all-reduce.

        Args:
            gradients: of this step.
            statistic: theirs, where backward has prepared it.
            header: this rank's consensus header.
            payload: what else is reduced.
            device: where.
            marks: whether it must be known afterwards which gradients are not finite.

        Raises:
            UnsupportedGradientError: this rank has a gradient that can't be measured; the others learn of it.
        """
        marks = marks and not kernels.is_captured()  # replays are not asked for names
        number = self.exchange.header_number(header, payload)
        if number is not None and statistic is None:
            vector = gradients.headed_statistic(self.norm, device, number, marks=marks)
            if vector is not None:
                return (yield from self.exchange.of_vector(vector))
        if statistic is None:
            statistic = gradients.statistic(self.norm, self.shares, device, marks=marks)
        summand = 0 if payload is None else payload.local(gradients.tensors, device)
        replicas = self.checks.replica_difference(gradients, device)
        reduced = yield from self.exchange.unread(statistic, header, summand, replicas)
        gradients.raise_problems()
        found = self.checks.without_suspects(reduced)
        self.checks.compare_unread_pieces(found, gradients)
        return found
