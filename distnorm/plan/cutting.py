"""Where the pieces of a parameter are cut again, so that those of all its holders are cut alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.plan.collectives import Ranks
from distnorm.plan.join import join
from distnorm.plan.terms import stable_hash

Cuts = Mapping[str, Sequence[int]]
"""Offsets, ascending, at which a parameter is cut into runs, by the parameter's name."""


class Run(Protocol):
    """Elements `start` to `stop` of a parameter, in row-major order."""

    @property
    def name(self) -> str:
        """The parameter's."""

    @property
    def start(self) -> int:
        """First element."""

    @property
    def stop(self) -> int:
        """End of the elements."""

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole parameter."""


def cuts_inside(ranks: Ranks, pieces: Sequence[Run]) -> Cuts:
    """Where other ranks' pieces end inside this rank's. Collective: every rank must call it.

    Args:
        ranks: who takes part.
        pieces: what this rank holds, of any parameters.

    Returns:
        Offsets by name. No rank holds more than those of its own pieces, and of the names it owns.
    """
    with kernels.plain_operators():
        return _cuts_inside(ranks, pieces)


def _cuts_inside(ranks: Ranks, pieces: Sequence[Run]) -> Cuts:
    facts = [[stable_hash(p.name), p.start, p.stop, p.is_whole, 0] for p in pieces]
    rows = torch.tensor(facts, dtype=torch.int64, device="cpu").view(-1, 5)
    inside, cut = join(ranks, rows, _nth_cut).unbind(1)
    most = torch.tensor([max(inside.tolist(), default=0)], dtype=torch.int64, device=ranks.device())
    asked = torch.arange(len(rows), device="cpu")
    if ranks.all_reduce_(most, "max").item() > 1:  # ask once for each cut, and once where there is none
        times = inside.clamp(min=1)
        asked = asked.repeat_interleave(times)
        rows = rows[asked]
        rows[:, 4] = torch.arange(len(rows), device="cpu") - (times.cumsum(0) - times)[asked]
        inside, cut = join(ranks, rows, _nth_cut).unbind(1)
    cuts: dict[str, set[int]] = defaultdict(set)
    for i, count, offset in zip(asked.tolist(), inside.tolist(), cut.tolist(), strict=True):
        if count:
            cuts[pieces[i].name].add(offset)
    return {name: sorted(offsets) for name, offsets in cuts.items()}


def _nth_cut(rows: Tensor) -> Tensor:
    """[m, (name, start, stop, is whole, n)] -> [m, (cuts inside the piece, offset of the n-th)]."""
    if not len(rows):
        return rows[:, :2]
    ends = torch.cat([rows[:, [0, 1]], rows[:, [0, 2]]])
    points, at = torch.unique(ends, dim=0, return_inverse=True)  # ascending, name by name
    start, stop = at.chunk(2)
    is_cut = torch.zeros(len(points), dtype=torch.bool, device="cpu")
    is_cut[at[(rows[:, 3] == 0).repeat(2)]] = True
    up_to = is_cut.cumsum(0)
    inside = torch.where(start < stop, up_to[(stop - 1).clamp(min=0)] - up_to[start], 0)
    offsets = torch.cat([points[is_cut, 1], points.new_zeros(1)])
    nth = (up_to[start] + rows[:, 4]).clamp(max=len(offsets) - 1)
    return torch.stack([inside, offsets[nth]], dim=1)
