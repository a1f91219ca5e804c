"""One rank of a world whose other ranks don't exist: it plans as it would among them.

What the others hold is computed from how each parameter is cut over named axes, which a rank's own shards
say, and the others' messages from that. So planning itself runs as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distnorm.errors import RunError
from distnorm.plan.collectives import Ranks
from distnorm.plan.group_state import GroupState
from distnorm.plan.join import hops, route
from distnorm.plan.plan import _holders, differing, piece_hash
from distnorm.plan.terms import stable_hash
from distnorm.sources.shards import GradShard


@dataclass(frozen=True, slots=True)
class Rows:
    """What all ranks hold: a row for every shard, by rank and then by its order there.

    Args:
        facts: [rows, (name, piece, number of elements)] int64.
        origins: [rows] the rank of each.
    """

    facts: Tensor
    origins: Tensor


def rows_of_stage(shards: Sequence[GradShard], axes: Mapping[str, int], first_rank: int) -> Rows:
    """The rows of a pipeline stage, all of whose ranks hold the same parameters.

    Args:
        shards: of any one of its ranks.
        axes: the stage's mesh, outermost axis first; a parameter is alike on an axis that doesn't cut it.
        first_rank: of the stage's ranks, which are neighbours.
    """
    ranks, known = math.prod(axes.values()), dict[object, Tensor]()
    columns = []
    for shard in shards:
        key = _cutting(shard)
        if key not in known:
            known[key] = _pieces(shard, axes)
        names = torch.full((ranks, 1), stable_hash(shard.name), dtype=torch.int64, device="cpu")
        columns.append(torch.cat([names, known[key]], dim=1))
    facts = (
        torch.stack(columns, dim=1) if columns else torch.zeros(ranks, 0, 3, dtype=torch.int64, device="cpu")
    )
    origins = torch.arange(first_rank, first_rank + ranks, device="cpu").repeat_interleave(len(shards))
    return Rows(facts.reshape(-1, 3), origins)


def _cutting(shard: GradShard) -> object:
    """What is equal for parameters that are cut alike."""
    placements = getattr(shard, "placements", None)
    return (shard.global_shape, tuple(shard.cutting_axes.items()), placements) if placements else shard.name


def _pieces(shard: GradShard, axes: Mapping[str, int]) -> Tensor:
    """[ranks of a stage, (piece, number of elements)] of one parameter."""
    cutting = shard.cutting_axes
    if unknown := set(cutting) - set(axes):
        raise RunError(f"parameter '{shard.name}': expected axes among {list(axes)}, found {sorted(unknown)}")
    sizes = [size if name in cutting else 1 for name, size in axes.items()]
    found = np.zeros((math.prod(sizes), 2), dtype=np.int64)
    for i, places in enumerate(product(*map(range, sizes))):
        piece, numel = shard.piece_at(dict(zip(axes, places, strict=True)))
        found[i] = piece_hash(piece, shard.global_shape, numel), numel
    whole = np.broadcast_to(found.reshape(*sizes, 2), (*axes.values(), 2))
    return torch.from_numpy(whole.reshape(-1, 2).copy())


@dataclass(frozen=True, slots=True)
class Message:
    """One exchange or all-reduce, as one rank sees it.

    Args:
        kind: ``all-reduce`` or ``exchange``.
        sent, received: bytes to and from other ranks; of an all-reduce, the vector's.
        peers: with how many other ranks messages may be exchanged; `None` where the backend decides that.
    """

    kind: str
    sent: int
    received: int
    peers: int | None


class DryRanks(Ranks):
    """The ranks as one of them sees them, and none of the others is there.

    Args:
        rank, size: of the world.
        stages: what all ranks hold, one pipeline stage after the other.

    Attributes:
        messages: what was exchanged up to now.
    """

    def __init__(self, rank: int, size: int, stages: Sequence[Rows]) -> None:
        super().__init__(alone=True)
        self.rank, self.size = rank, size
        world = Rows(torch.cat([s.facts for s in stages]), torch.cat([s.origins for s in stages]))
        plan = _holders(world.facts)
        claims = (plan[:, 0] > 1) & (world.facts[:, 2] > 0)
        self._has_replicas = bool(claims.any())
        self._arriving = [self._arrivals(world.facts, world.origins, _holders, plan)]
        if self._has_replicas:  # whose values are taken to be equal
            sums = world.facts[claims] * torch.tensor([1, 1, 0], device="cpu")
            self._arriving.append(self._arrivals(sums, world.origins[claims], differing))
        self.begin_again()

    def _arrivals(
        self,
        rows: Tensor,
        origins: Tensor,
        answer: Callable[[Tensor], Tensor],
        answers: Tensor | None = None,
    ) -> list[Tensor]:
        """What this rank gets in each exchange of one join of all ranks' rows."""
        answers = answer(rows) if answers is None else answers
        at, there, back = origins, list[Tensor](), list[Tensor]()
        stations = route(self.size, origins, rows[:, 0].remainder(self.size))
        for hop, station in zip(hops(self.rank, self.size), stations, strict=True):
            held, arrives = at == self.rank, station == self.rank
            counts = torch.bincount(at[arrives], minlength=self.size)[hop.of]
            there += [counts.view(-1, 1), rows[arrives]]
            back.insert(0, answers[held][station[held].argsort(stable=True)])
            at = station
        return there + back

    def exchange(self, rows: Tensor, send: Mapping[int, int], receive: Mapping[int, int]) -> Tensor:
        """What other ranks would send."""
        out = next(self._arrives, None)
        if out is None:
            raise RunError(
                "clip: expected policies of the total norm, found some that need a table of the whole model "
                "(clip.groups, or a policy of single parameters), which ranks that don't exist can't make"
            )
        assert len(out) == sum(receive.values()), "what all ranks hold is not what this rank holds"
        sent, received = (
            sum(count for peer, count in counts.items() if peer != self.rank) for counts in (send, receive)
        )
        width = 8 * rows.shape[1], 8 * out.shape[1]
        peers = len({*send, *receive} - {self.rank})
        self.messages.append(Message("exchange", sent * width[0], received * width[1], peers))
        return out.clone()

    def all_reduce_(self, tensor: Tensor, op: str) -> Tensor:
        """What this rank has: the others agree."""
        if self.size > 1:
            self.messages.append(Message("all-reduce", tensor.nbytes, tensor.nbytes, None))
        return tensor

    def any(self, *facts: bool) -> list[bool]:
        found = super().any(*facts)
        # The one question of planning that others may answer with yes alone: has any shard replicas?
        return [found[0] or self._has_replicas, *found[1:]] if len(facts) > 1 else found

    def gather(self, fact: Any) -> list[Any]:
        raise RunError("expected nothing that ranks have to tell each other in full, which these can't")

    def begin_again(self) -> None:
        """Expect the first exchange of planning."""
        self.messages: list[Message] = []
        self._state = GroupState()
        self._arrives = iter([out for outs in self._arriving for out in outs])
