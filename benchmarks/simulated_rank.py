"""One rank of a large world, whose other ranks are computed.

Its exchanges with other ranks hand it what these would send: their rows of the names that it owns, the rows
that it passes on from its row of the grid to their owners, and the answers to them and to its own. So
`distnorm` runs as it stands but for the messages themselves, on a world size of the caller's choice, and what
is timed is the work of one rank without the network's. Replicas agree here, so nothing is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from distnorm import kernels
from distnorm.measure.partials import _COMPLETE, _DTYPES, Batch, _merge, agree_on_partials
from distnorm.measure.replica_check import _IRRATIONALS, _compared, _differing, compare_replicas
from distnorm.plan.collectives import Ranks
from distnorm.plan.join import Grid, hops
from distnorm.plan.plan import Plan, _holders, differing, identity_rows, make_plan
from distnorm.plan.terms import stable_hash
from distnorm.sources.shards import Extent, GradShard, Source


def clocks() -> Tensor:
    """Seconds of the wall's clock, and of this process on a core."""
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


TERMS = {"norm.type": 2.0, "clip.max_norm": 1.0, "tied": ()}


@dataclass(frozen=True, slots=True)
class Piece(GradShard):
    """A piece of a parameter that is made of the number 1."""

    def witness(self) -> Tensor:
        return self.holder.detach()

    def read(self) -> Tensor:
        return self.holder.detach()


def piece(name: str, extents: tuple[Extent, ...], global_shape: tuple[int, ...]) -> Piece:
    shape = tuple(stop - start for start, stop in extents)
    return Piece(name, torch.ones(shape, requires_grad=True), Source.GRADIENT, extents, shape, global_shape)


class Topology(Protocol):
    """Who holds what in a world."""

    size: int
    names: Sequence[str]

    def kind(self, name: str) -> Hashable:
        """Names of one kind are held alike: the same pieces, by the same ranks."""

    def pieces(self, rank: int, name: str) -> list[Piece]:
        """The pieces of one name that a rank holds."""


def owned_names(topology: Topology, rank: int) -> list[str]:
    """The names whose rows of all ranks meet on this one."""
    return [name for name in topology.names if stable_hash(name) % topology.size == rank]


def most_loaded_rank(topology: Topology) -> int:
    """The rank on which most rows meet."""
    held: dict[Hashable, int] = {}
    load = [0] * topology.size
    for name in topology.names:
        kind = topology.kind(name)
        if kind not in held:
            held[kind] = sum(len(topology.pieces(rank, name)) for rank in range(topology.size))
        load[stable_hash(name) % topology.size] += held[kind]
    return load.index(max(load))


class _Rows:
    """The rows of some names from some ranks, as each join sends them.

    Attributes:
        owners: [rows] the rank on which each row meets the others of its name.
    """

    def __init__(self, topology: Topology, names: Sequence[str], ranks: Iterable[int]) -> None:
        values: dict[tuple[int, ...], tuple[int, list[float]]] = {}  # by shape: all elements are 1
        identities, found, sizes = [torch.zeros(0, 2, dtype=torch.int64)], [], []
        self.of: list[tuple[int, str]] = []  # of each row its rank and its name
        for rank in ranks:
            pieces = [p for name in names for p in topology.pieces(rank, name)]
            sizes += [p.numel for p in pieces]
            self.of += [(rank, p.name) for p in pieces]
            identities.append(identity_rows(pieces))
            for p in pieces:
                if p.shape not in values:
                    values[p.shape] = int(kernels.checksum(p.witness())), _compared(p.read())
                found.append(values[p.shape])
        self.of_rank = torch.tensor([rank for rank, _ in self.of], dtype=torch.int64)
        numels = torch.tensor(sizes, dtype=torch.int64).view(-1, 1)
        self.plan = torch.cat([torch.cat(identities), numels], dim=1)
        self.owners = self.plan[:, 0].remainder(topology.size)
        self._checksums = torch.tensor([value for value, _ in found], dtype=torch.int64).view(-1, 1)
        compared = [numbers for _, numbers in found]
        self._compared = torch.tensor(compared, dtype=torch.float64).view(-1, 2 + len(_IRRATIONALS))
        self._claims = torch.zeros(len(self.of), dtype=torch.bool)

    def claim(self, replies: Tensor) -> None:
        """Take the planner's answers to these rows, as every rank takes those to its own."""
        self._claims = (replies[:, 0] > 1) & (self.plan[:, 2] > 0)

    def taking_part(self, join: str) -> Tensor:
        """Which rows a join sends."""
        if join in ("checksums", "replicas"):
            return self._claims
        return torch.full_like(self._claims, join != "members")

    def sent(self, join: str) -> Tensor:
        """What a join sends of those that take part."""
        if join == "plan":
            return self.plan
        if join == "partials":
            flags = _COMPLETE * (self.plan[:, 2:3] > 0).long()
            dtypes = torch.full_like(flags, _DTYPES.index(torch.float32))
            return torch.cat([self.plan[:, :2], flags, dtypes], dim=1)
        if join == "members":
            return torch.zeros(0, 3, dtype=torch.int64)
        facts = self._checksums if join == "checksums" else self._compared.view(torch.int64)
        return torch.cat([self.plan[:, :2], facts], dim=1)[self._claims]


ANSWERS: dict[str, Callable[[Tensor], Tensor]] = {
    "plan": _holders,
    "checksums": differing,
    "partials": _merge,
    "replicas": _differing,
}


def _done(result: Any) -> Any:
    future: Future[Any] = Future()
    future.set_result(result)
    return torch._C._distributed_c10d._create_work_from_future(future)


class SimulatedGroup(dist.ProcessGroup):
    """The group of `rank`, which answers for all others.

    Attributes:
        seconds: time spent on computing the others, on `clocks`.
        received: bytes that came from them.
        sent: bytes that went to them.
        peers: the ranks that were sent to, or heard from.
        met: the rows that this rank answers.
    """

    def __init__(self, rank: int, topology: Topology) -> None:
        super().__init__(rank, topology.size)
        self._rank, self._topology = rank, topology
        self.met = _Rows(topology, owned_names(topology, rank), range(topology.size))
        self.mine = [p for name in topology.names for p in topology.pieces(rank, name)]
        own = _Rows(topology, topology.names, [rank])
        self._hops, self._held = list(hops(rank, topology.size)), [own]  # what is sent at each hop
        if len(self._hops) > 1:
            first, second = self._hops
            owners = set(second.to.tolist())
            passed_on = [name for name in topology.names if stable_hash(name) % topology.size in owners]
            self._held.append(_Rows(topology, passed_on, first.of.tolist()))
        self._by_kind: dict[Hashable, tuple[_Rows, dict[str, Tensor]]] = {}
        self.restart()
        for rows in self._held:
            rows.claim(self._answers(rows, "plan"))

    def restart(self) -> None:
        """Expect the first exchange of a plan."""
        self.seconds, self.received, self.sent = clocks() * 0, 0, 0
        self.peers: set[int] = set()
        self._exchanges = self._expected()

    def _expected(self) -> Iterator[tuple[str, str, int]]:
        """What each exchange is: of which join, what it carries, and at which hop."""
        has_claims = bool(self._held[0].taking_part("checksums").any())
        there, back = range(len(self._hops)), reversed(range(len(self._hops)))
        steps = [(kind, hop) for hop in there for kind in ("counts", "rows")] + [("answers", h) for h in back]
        for join in ("plan", "checksums", "partials", "members", "replicas"):
            if join != "checksums" or has_claims:
                yield from ((join, kind, hop) for kind, hop in steps)

    def _kind(self, name: str) -> tuple[_Rows, dict[str, Tensor]]:
        """The rows of one name of a kind, and what its owner answers in each join."""
        kind = self._topology.kind(name)
        if kind not in self._by_kind:
            rows = _Rows(self._topology, [name], range(self._topology.size))
            answers: dict[str, Tensor] = {}
            for join, answer in ANSWERS.items():
                answers[join] = answer(rows.sent(join))
                if join == "plan":
                    rows.claim(answers[join])
            self._by_kind[kind] = rows, answers
        return self._by_kind[kind]

    def _answers(self, rows: _Rows, join: str) -> Tensor:
        """What the owners answer to rows that take part in a join."""
        replies = [torch.zeros(0, 1, dtype=torch.int64)] if join == "members" else []
        takes_part = rows.taking_part(join).tolist()
        for (rank, name), group in groupby(zip(rows.of, takes_part, strict=True), lambda one: one[0]):
            if any(takes for _, takes in group):
                whole, answers = self._kind(name)
                replies.append(answers[join][whole.of_rank[whole.taking_part(join)] == rank])
        width = 1 if join in ("checksums", "replicas") else 3
        return torch.cat(replies) if replies else torch.zeros(0, width, dtype=torch.int64)

    def exchange(self, rows: Tensor, send: Mapping[int, int], receive: Mapping[int, int]) -> Tensor:
        """In the place of `Ranks.exchange`."""
        began = clocks()
        join, kind, hop = next(self._exchanges)
        # What comes in at a hop is what the next one sends on, or, at the last, what this rank answers.
        comes = self._held[hop + 1] if hop + 1 < len(self._hops) else self.met
        if kind == "answers":
            held = self._held[hop]
            if join == "plan" and comes is self.met:
                self.met.claim(rows)
            order = self._hops[hop].next(held.owners[held.taking_part(join)]).argsort(stable=True)
            out = self._answers(held, join)[order]
        elif kind == "rows":
            own = dict(zip(send, rows.split(list(send.values())), strict=True))[self._rank]
            arriving = comes.sent(join)
            whose = comes.of_rank[comes.taking_part(join)]
            out = arriving
            if not hop:
                assert torch.equal(own, arriving[whose == self._rank])
        else:
            whose = comes.of_rank[comes.taking_part(join)]
            out = self._counted(hop, whose).view(-1, 1)
        assert len(out) == sum(receive.values())
        others_in, others_out = (
            sum(n for rank, n in listed.items() if rank != self._rank) for listed in (receive, send)
        )
        self.received += others_in * out.shape[1] * 8
        self.sent += others_out * rows.shape[1] * 8
        self.peers |= {*send, *receive} - {self._rank}
        self.seconds += clocks() - began
        return out

    def _counted(self, hop: int, whose: Tensor) -> Tensor:
        """How many of the rows that arrive at a hop come from each of its ranks."""
        of, size = self._hops[hop].of, self._topology.size
        if hop:  # they were at the rank of their row through which it reaches this one
            whose = of[Grid(size).row(whose)]
        return torch.bincount(whose, minlength=size)[of]

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """All others have what this rank has (a maximum), or nothing (a sum)."""
        self.sent += sum(tensor.nbytes for tensor in tensors)
        self.received += sum(tensor.nbytes for tensor in tensors)
        return _done(tensors)

    def allgather(self, outputs: list[list[Tensor]], tensors: list[Tensor], opts: Any = None) -> Any:
        """All others have what this rank has."""
        for output in outputs[0]:
            output.copy_(tensors[0])
        return _done(outputs)

    def size(self) -> int:
        return self._topology.size

    def getBackendName(self) -> str:
        return "simulated"


@contextmanager
def simulated(rank: int, topology: Topology) -> Iterator[SimulatedGroup]:
    """Be one rank of a world."""
    group = SimulatedGroup(rank, topology)
    _GROUPS.append(group)
    dist.init_process_group("simulated", rank=rank, world_size=topology.size, store=dist.HashStore())
    try:
        with mock.patch.object(Ranks, "exchange", lambda _, *sent: group.exchange(*sent)):
            yield group
    finally:
        _GROUPS.pop()
        dist.destroy_process_group()


_GROUPS: list[SimulatedGroup] = []
dist.Backend.register_backend("simulated", lambda *_: _GROUPS[-1], devices=["cpu"])


def plan(group: SimulatedGroup, *, replicas_share: bool = True) -> Plan:
    """What a rank does once: `make_plan`."""
    group.restart()
    return make_plan(Ranks(), group.mine, TERMS, replicas_share=replicas_share)


def agree(group: SimulatedGroup, planned: Plan) -> tuple[Batch, ...] | None:
    """What it does with its first gradients, after `plan`."""
    ranks, gradients = Ranks(), [p.read() for p in group.mine]
    batches = agree_on_partials(ranks, group.mine, gradients)
    if planned.has_replicas:
        compare_replicas(ranks, group.mine, planned.shares, gradients)
    return batches
