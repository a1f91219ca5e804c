"""The hash join of planning: rows of one key meet on one rank, which answers them, over a grid of ranks.

In a small world each rank sends its rows straight to the ranks that own their keys. In a large one that
would make NCCL connect every rank with every other, so rows take two hops over a grid of about sqrt(W) rows
of ranks: within the sender's row to the rank through which that row reaches the owner, and from there to the
owner; answers go back the same way. So a rank talks to at most 2 sqrt(W) + 1 others, whatever W is.

No process groups are made for it: that is a collective call for each of about 2 sqrt(W) groups. Nor are all
ranks given splits of zero rows, which torch sends all the same, over NCCL (from 2.14 on) and gloo alike.

The meshes of DTensors say who should hold what, and a digest could show that ranks agree on that. But plain
tensors beside them, stages, engines' runs and ranks that were given something else are in no mesh, and they
are what is to be found; so rows travel for everything, and nothing is planned in two ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distnorm.plan.collectives import Ranks

MOST_IN_ONE_HOP = 16
"""Ranks that talk to all others: two hops save few connections there, and double the exchanges."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One exchange of rows with some ranks, as one of them sees it.

    Args:
        to: the ranks that may get rows from this one, ascending; it is among them.
        of: those that this one may get rows from, likewise.
        next: from the owners of rows to the ranks among `to` that get them.
    """

    to: Tensor
    of: Tensor
    next: Callable[[Tensor], Tensor]


class Grid:
    """Ranks in rows of neighbours, of two lengths if there is no other way.

    Attributes:
        rows: how many rows there are.
    """

    def __init__(self, size: int) -> None:
        self.rows = math.isqrt(size)
        self._columns, self._longer = divmod(size, self.rows)  # the first rows have a column more

    def row(self, ranks: Tensor) -> Tensor:
        """The row of each rank."""
        beyond = ranks - self._longer * (self._columns + 1)
        return torch.where(beyond < 0, ranks // (self._columns + 1), self._longer + beyond // self._columns)

    def first(self, rows: Tensor) -> Tensor:
        """The first rank of each row."""
        return rows * self._columns + rows.clamp(max=self._longer)

    def through(self, rows: Tensor, owners: Tensor) -> Tensor:
        """The rank of a row that passes on what this row has for an owner: the one in the owner's column.

        Where the row is too short for that, its ranks share the owners that are left.
        """
        row = self.row(owners)
        column, length = owners - self.first(row), self._columns + (rows < self._longer).long()
        return self.first(rows) + torch.where(column < length, column, row % self._columns)


def hops(rank: int, size: int) -> Iterator[Hop]:
    """The hops from a rank to the owners of its rows.

    At every hop rows come by rank and then by their order there, so that is how they reach their owners.
    """
    everyone = torch.arange(size, device="cpu")
    if size <= MOST_IN_ONE_HOP:
        yield Hop(everyone, everyone, lambda owners: owners)
        return
    grid, me = Grid(size), everyone[rank]
    mine, rows = grid.row(me), everyone[: grid.rows]
    peers = everyone[grid.row(everyone) == mine]
    yield Hop(peers, peers, lambda owners: grid.through(mine, owners))
    yield Hop(everyone[grid.through(mine, everyone) == rank], grid.through(rows, me), lambda owners: owners)


def route(size: int, origins: Tensor, owners: Tensor) -> list[Tensor]:
    """Where rows of these ranks are after each hop: what `hops` says, for all ranks at once."""
    if size <= MOST_IN_ONE_HOP:
        return [owners]
    grid = Grid(size)
    return [grid.through(grid.row(origins), owners), owners]


def join(ranks: Ranks, rows: Tensor, answer: Callable[[Tensor], Tensor]) -> Tensor:
    """Answer every row by a rank that sees all ranks' rows of the same key. Collective.

    Args:
        ranks: who takes part.
        rows: [n, c] int64 on the CPU; the first column is the key.
        answer: [m, c] -> [m, d], called once, with all rows that met here, by rank and then by their order
            there.

    Returns:
        [n, d] int64, the answer to each row. No rank holds more than its own rows, those of its own keys,
        and what it passes on: on average as many rows as it has.
    """
    if ranks.size == 1:
        return answer(rows)
    way = []
    for hop in hops(ranks.rank, ranks.size):
        towards = hop.next(rows[:, 0].remainder(ranks.size))
        order = towards.argsort(stable=True)
        send = torch.bincount(towards, minlength=ranks.size)[hop.to]
        to, of = hop.to.tolist(), hop.of.tolist()
        outgoing = dict(zip(to, send.tolist(), strict=True))
        counts = ranks.exchange(send.view(-1, 1), dict.fromkeys(to, 1), dict.fromkeys(of, 1))
        incoming = dict(zip(of, counts.view(-1).tolist(), strict=True))
        rows = ranks.exchange(rows[order], outgoing, incoming)
        way.append((order, outgoing, incoming))
    replies = answer(rows)
    for order, outgoing, incoming in reversed(way):
        came = ranks.exchange(replies, incoming, outgoing)
        replies = torch.empty_like(came).index_copy_(0, order, came)
    return replies
