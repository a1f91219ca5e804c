"""The whole model's parameters, by name, the same list on every rank; and which rank holds what of them.

Made once, and only where something needs more than the total norm: per-layer monitoring, a policy that goes
by single parameters, a comparison of replicas. Each name is sent once, by one of the ranks that hold it,
chosen by hash to spread the load. Which rank holds what is sent as numbers, and so is each name's place on
the lowest rank that holds it, which gives the order of the table (`model_order`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distnorm.plan.collectives import Ranks
from distnorm.plan.join import join
from distnorm.plan.model_order import merged
from distnorm.plan.plan import Share, identity_rows
from distnorm.sources.shards import GradShard

Ints = npt.NDArray[np.int64]

MOST_ROWS = 1 << 20
"""Over all ranks. Above, no rank knows what the others hold, and no payload has a value for each of it."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A row for every shard of every rank that is not empty: by rank, then by its order there.

    Args:
        mine: positions of this rank's shards that have a row.
        start: row of the first of them.
        slots: [rows] the parameter, by its place in the table.
        ranks: [rows] who holds it.
        identities: [rows] equal numbers for replicas.
        firsts: [rows] whether it is the first of its replicas.
    """

    mine: tuple[int, ...]
    start: int
    slots: Ints
    ranks: Ints
    identities: Ints
    firsts: npt.NDArray[np.bool_]

    @property
    def replicated(self) -> npt.NDArray[np.bool_]:
        """[rows] whether the shard has replicas."""
        alone: npt.NDArray[np.bool_] = np.bincount(self.identities)[self.identities] > 1
        return alone


@dataclass(frozen=True, slots=True)
class ModelTable:
    """The parameters of the whole model in the order of its definition, the same on every rank.

    Args:
        names: of all parameters.
        shapes: their global shapes.
        slots: the place in `names` of each of this rank's shards.
        rows: who holds what; `None` if that is more than `MOST_ROWS`.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    slots: tuple[int, ...]
    rows: Rows | None

    @property
    def numels(self) -> tuple[int, ...]:
        """Number of elements of each parameter."""
        return tuple(map(math.prod, self.shapes))


def make_model_table(ranks: Ranks, shards: Sequence[GradShard], shares: Sequence[Share]) -> ModelTable:
    """List the model's parameters. Collective: every rank must call it, with the shards of one plan."""
    hashes = identity_rows(shards)[:, :1]
    places = torch.arange(len(shards), device="cpu").view(-1, 1)
    rows = torch.cat([hashes, torch.full_like(places, ranks.rank), places], dim=1)
    answers = join(ranks, rows, _publishers).tolist()
    mine = [
        (rank, place, shard.name, shard.global_shape)
        for shard, (publishes, rank, place) in zip(shards, answers, strict=True)
        if publishes
    ]
    published = sorted(fact for theirs in ranks.gather(mine) for fact in theirs)
    shapes = {name: shape for _, _, name, shape in published}
    by_rank = groupby(published, key=itemgetter(0))
    names = tuple(merged([name for _, _, name, _ in theirs] for _, theirs in by_rank))
    place = {name: slot for slot, name in enumerate(names)}
    slots = tuple(place[shard.name] for shard in shards)
    return ModelTable(
        names, tuple(shapes[name] for name in names), slots, _rows(ranks, shards, shares, slots)
    )


def _publishers(rows: Tensor) -> Tensor:
    """[m, (name, rank, place)] -> [m, (publishes, rank, place)].

    Whether this is the row that publishes its name; the lowest rank that holds the name, and the place there.
    """
    names, of, count = torch.unique(rows[:, 0], return_inverse=True, return_counts=True)
    order = of.argsort(stable=True)
    begins = count.cumsum(0) - count
    index = torch.empty_like(order)
    index[order] = torch.arange(len(rows), device=rows.device) - begins[of[order]]
    # Other bits of the hash than those that chose the rank on which the rows of one name meet.
    publishes = index == ((names >> 20) % count)[of]
    lowest = rows[order[begins]]  # rows come by rank, and then by their order there
    return torch.cat([publishes.long().view(-1, 1), lowest[of, 1:]], dim=1)


def _rows(
    ranks: Ranks, shards: Sequence[GradShard], shares: Sequence[Share], slots: Sequence[int]
) -> Rows | None:
    mine = tuple(i for i, shard in enumerate(shards) if shard.numel)
    counts = torch.zeros(ranks.size, dtype=torch.int64, device=ranks.device())
    counts[ranks.rank] = len(mine)
    held = ranks.all_reduce_(counts, "sum").tolist()
    if sum(held) > MOST_ROWS:
        return None
    facts = np.array([(slots[i], shares[i].key, shares[i].index) for i in mine], dtype=np.int64).reshape(
        -1, 3
    )
    everything = np.concatenate(ranks.gather(facts))
    _, identities = np.unique(everything[:, 1], return_inverse=True)
    return Rows(
        mine,
        sum(held[: ranks.rank]),
        everything[:, 0],
        np.repeat(np.arange(ranks.size), held),
        identities.reshape(-1).astype(np.int64),
        everything[:, 2] == 0,
    )
