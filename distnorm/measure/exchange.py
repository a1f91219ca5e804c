"""The one all-reduce of a measurement: every rank's statistic, and its ballot beside it.

It has two forms. In the full one each lane of a ballot is an element, and a statistic may be wide. In the
brief one the ballot is a single number, which tells no more than whether all ranks measured the same; where
they did not, those that read the result exchange their ballots in full, once more. Two elements arrive many
times sooner than seventeen through gloo, which cuts a vector into messages of one element each.

All ranks that meet must use one form. So it belongs to the group: brief, until a plan is made on it that
needs the full one, which all ranks make together.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distnorm.measure.header import LANES, Ballot, Brief, Count, on_device
from distnorm.measure.norms import Norm
from distnorm.plan.collectives import Ranks

_WIDTH = 8  # fp64 values of a statistic in the full form, for orders up to 27 and inf
_NOTHING = torch.zeros(0, dtype=torch.float64)
_in_full: weakref.WeakSet[ProcessGroup] = weakref.WeakSet()


class Lanes(Protocol):
    """What else a rank adds to the vector of one measurement."""

    @property
    def length(self) -> int:
        """How many fp64 values, the same on all ranks."""

    def local(self, gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """This rank's, [length] on the device, of its local gradients, in the order of its shards."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What all ranks said together.

    Args:
        total_norm: 0-d fp64; NaN where the ranks did not measure the same.
        more: what all ranks' further lanes add up to, [lanes] fp64.
        count: the votes, read on the host. In the brief form every rank must call it that reads a total norm
            which is not finite, and every rank that measures nothing.
        is_brief: in which form it came.
        well: whether all ranks measured, and the same; 0-d bool where that isn't known on the host.
    """

    total_norm: Tensor
    more: Tensor
    count: Callable[[], Count]
    is_brief: bool
    well: Tensor | bool


class Exchange:
    """Gives every rank the total norm of all ranks' statistics. A call is collective.

    Args:
        ranks: who takes part.
        norm: which norm.
    """

    def __init__(self, ranks: Ranks, norm: Norm) -> None:
        self._ranks, self._norm = ranks, norm
        self._brief = Brief(ranks.rank, ranks.size)

    @property
    def fits(self) -> bool:
        """Whether this norm can be told in the brief form."""
        return self._norm.op == "sum" and self._norm.width == 1

    def use_full_form(self) -> None:
        """From now on, on this group. Every rank must call it at the same point."""
        if self._ranks.group is not None:
            _in_full.add(self._ranks.group)

    def __call__(self, statistic: Tensor | None, ballot: Ballot, more: Tensor | int = 0) -> Reply:
        """Reduce this rank's statistic, [width] fp64, or none, and its ballot.

        Args:
            statistic: of what this rank counts.
            ballot: its votes.
            more: further lanes, [lanes] fp64, which are reduced by the norm's op, or how many the other ranks
                may have where this one has none. All ranks that meet must have as many.
        """
        if isinstance(more, int):
            device = self._ranks.device() if statistic is None else statistic.device
            more = _zeros(more, device) if more or device.type != "cpu" else _NOTHING
        if self._ranks.group in _in_full or not (self.fits or statistic is None):
            return self._in_full(statistic, ballot, more)
        if statistic is None or not ballot.stands:
            statistic = torch.full((1,), math.nan, dtype=torch.float64, device=more.device)
        if more is _NOTHING:
            return self._on_host(float(statistic.numpy()[0]), ballot)
        mark = on_device([self._brief.mark(ballot)], statistic.device)
        vector = self._ranks.all_reduce_(torch.cat([mark, statistic, more]), "sum")
        well = self._brief.well(vector[0])
        finalised = self._norm.finalise(vector[1:2]) if self.fits else vector[1]
        total_norm = torch.where(well, finalised, math.nan)
        return Reply(
            total_norm, vector[2:], lambda: self._second_count(vector[0].item(), ballot, more), True, well
        )

    def _on_host(self, statistic: float, ballot: Ballot) -> Reply:
        """Two numbers in the host's memory: to look at them takes no operator, and waits for nothing."""
        both = [self._brief.mark(ballot), statistic]
        vector = self._ranks.all_reduce_(torch.tensor(both, dtype=torch.float64), "sum")
        marks, total = vector.tolist()
        well = self._brief.is_well(marks)
        norm = self._norm.finalise_number(total) if well and self.fits else math.nan
        return Reply(
            torch.tensor(norm, dtype=torch.float64),
            _NOTHING,
            lambda: self._second_count(marks, ballot, _NOTHING),
            True,
            well,
        )

    def _second_count(self, marks: float, ballot: Ballot, like: Tensor) -> Count:
        deaf = self._brief.deaf(marks)
        if deaf:  # they go on, and hear of no second exchange
            return Count.of_deaf(deaf, ballot)
        return self._in_full(None, ballot, like[:0]).count()

    def _in_full(self, statistic: Tensor | None, ballot: Ballot, more: Tensor) -> Reply:
        """All-reduce ``[nan, votes ..., padding ..., statistic ..., more ...]``.

        A NaN travels in a lane, since a maximum may lose it. The padding gives vectors of unlike norms one
        length, so that ranks which differ in the norm meet, and see it.
        """
        norm = self._norm
        if statistic is None:
            statistic = norm.zeros(more.device)
        nan = statistic.isnan()
        votes = on_device([*ballot.votes(norm.op), *[0] * (_WIDTH - norm.width)], statistic.device)
        vector = torch.cat([nan.any().double().view(1), votes, torch.where(nan, 0.0, statistic), more])
        end = len(vector) - len(more)
        vector = self._ranks.all_reduce_(vector, norm.op)
        lanes, statistic, more = vector[: len(LANES)], vector[end - norm.width : end], vector[end:]
        well = ballot.well(norm.op, self._ranks.size, lanes)
        total_norm = torch.where(well, norm.finalise(statistic), math.nan)
        return Reply(total_norm, more, lambda: Count.of(lanes.tolist()), False, well)


def _zeros(lanes: int, device: torch.device) -> Tensor:
    return torch.zeros(lanes, dtype=torch.float64, device=device)


Payload = Lanes
