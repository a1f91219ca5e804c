"""One rank of a large world, whose other ranks are computed.

The process group hands the rank what the others would send it: their rows of the names that it owns, and the
answers to its own rows. So `distnorm` runs as it stands, on a world size of the caller's choice, and what is
timed is the work of one rank without the network's. Replicas agree here, so nothing is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from distnorm import kernels
from distnorm.measure.partials import _COMPLETE, _DTYPES, Batch, _merge, agree_on_partials
from distnorm.measure.replica_check import _IRRATIONALS, _compared, _differing, compare_replicas
from distnorm.plan.collectives import Ranks
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
    """The rows of some names from all ranks, as each exchange sends them."""

    def __init__(self, topology: Topology, names: Sequence[str]) -> None:
        values: dict[tuple[int, ...], tuple[int, list[float]]] = {}  # by shape: all elements are 1
        identities, of_rank, found, sizes = [], [], [], []
        for rank in range(topology.size):
            pieces = [p for name in names for p in topology.pieces(rank, name)]
            sizes += [[p.numel, p.global_numel] for p in pieces]
            of_rank += [rank] * len(pieces)
            identities.append(identity_rows(pieces))
            for p in pieces:
                if p.shape not in values:
                    values[p.shape] = int(kernels.checksum(p.witness())), _compared(p.read())
                found.append(values[p.shape])
        self.of_rank = torch.tensor(of_rank, dtype=torch.int64)
        self.plan = torch.cat(
            [torch.cat(identities), torch.tensor(sizes, dtype=torch.int64).view(-1, 2)], dim=1
        )
        self._checksums = torch.tensor([value for value, _ in found], dtype=torch.int64).view(-1, 1)
        compared = [numbers for _, numbers in found]
        self._compared = torch.tensor(compared, dtype=torch.float64).view(-1, 2 + len(_IRRATIONALS))
        self._claims = torch.zeros(len(of_rank), dtype=torch.bool)

    def claim(self, replies: Tensor) -> None:
        """Take the planner's answers to these rows, as every rank takes those to its own."""
        self._claims = (replies[:, 0] > 1) & (self.plan[:, 2] > 0)

    def sent(self, join: int) -> tuple[Tensor, Tensor]:
        """The rows of each join, and their ranks: of the plan, the claims, the partial gradients, the ranks
        that reduce these together, and what is compared of replicas."""
        if join == 0:
            return self.plan, self.of_rank
        if join == 2:
            flags = _COMPLETE * (self.plan[:, 2:3] > 0).long()
            dtypes = torch.full_like(flags, _DTYPES.index(torch.float32))
            return torch.cat([self.plan[:, :2], flags, dtypes], dim=1), self.of_rank
        if join == 3:
            return torch.zeros(0, 3, dtype=torch.int64), self.of_rank[:0]
        facts = self._checksums if join == 1 else self._compared.view(torch.int64)
        rows = torch.cat([self.plan[:, :2], facts], dim=1)
        return rows[self._claims], self.of_rank[self._claims]


ANSWERS: dict[int, Callable[[Tensor], Tensor]] = {0: _holders, 1: differing, 2: _merge, 4: _differing}


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
    """

    def __init__(self, rank: int, topology: Topology) -> None:
        super().__init__(rank, topology.size)
        self._rank, self._topology = rank, topology
        self.met = _Rows(topology, owned_names(topology, rank))
        self.mine = [p for name in topology.names for p in topology.pieces(rank, name)]
        self._own = [p.name for p in self.mine]
        self._by_kind: dict[Hashable, tuple[_Rows, dict[int, Tensor]]] = {}
        self.restart()
        for name in self._own:
            self._answers(name)

    def restart(self) -> None:
        """Expect the first exchange of a plan."""
        self.seconds, self.received, self.sent = clocks() * 0, 0, 0
        self._call = 0

    def _answers(self, name: str) -> tuple[_Rows, dict[int, Tensor]]:
        """The rows of one name of a kind, and what its owner answers in each join."""
        kind = self._topology.kind(name)
        if kind not in self._by_kind:
            rows = _Rows(self._topology, [name])
            answers: dict[int, Tensor] = {}
            for join, answer in ANSWERS.items():
                answers[join] = answer(rows.sent(join)[0])
                if join == 0:
                    rows.claim(answers[0])
            self._by_kind[kind] = rows, answers
        return self._by_kind[kind]

    def _replies(self, join: int, width: int) -> Tensor:
        """The answers to this rank's own rows, in the order in which it sent them."""
        replies = []
        for name in dict.fromkeys(self._own):
            if join in ANSWERS:
                rows, answers = self._answers(name)
                mine = answers[join][rows.sent(join)[1] == self._rank]
                owner = torch.full((len(mine), 1), stable_hash(name) % self._topology.size)
                replies.append(torch.cat([owner, mine], dim=1))
        found = torch.cat(replies) if replies else torch.zeros(0, width + 1, dtype=torch.int64)
        return found[found[:, 0].argsort(stable=True), 1:]

    def all_to_all_single(
        self, output: Tensor, sending: Tensor, receive: Any, send: Any, opts: Any = None
    ) -> Any:
        began = clocks()
        join, phase = divmod(self._call, 3)
        rows, of_rank = self.met.sent(join)
        if phase == 0:
            output.copy_(torch.bincount(of_rank, minlength=self._topology.size))
        elif phase == 1:
            own = sending.split(send)[self._rank]
            assert torch.equal(own, rows[of_rank == self._rank])
            output.copy_(rows)
        else:
            if join == 0:
                self.met.claim(sending)
            output.copy_(self._replies(join, output.shape[1]))
        self.sent += sending.nbytes
        self.received += output.nbytes
        self._call += 1
        self.seconds += clocks() - began
        return _done([output])

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
