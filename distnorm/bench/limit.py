"""What the machine can do, measured on the spot, and how many bytes a norm and a clipping need."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from distnorm.bench.problem import Problem
from distnorm.trainer.world import World

BUFFER_ELEMENTS = 2**26
"""Of fp32, on each rank: 256 MiB, more than most caches hold."""

_ROUNDS = 7
_LATENCY_ROUNDS = 100


@dataclass(frozen=True, slots=True)
class Limit:
    """What one rank can do while all ranks do the same: the best that was seen.

    Args:
        read: bytes/s of a plain sum over a large buffer.
        write: bytes/s, read and written ones added up, of a copy or a scaling in place, the faster one.
        latency: seconds of an all-reduce of 2 fp64; 0 where there is one rank.
    """

    read: float
    write: float
    latency: float

    def seconds(self, work: Work) -> float:
        """The least time in which one rank can do the work."""
        together = work.read / self.read + (self.latency if work.reduces else 0.0)
        norm = together if work.read_alone is None else min(together, work.read_alone / self.read)
        return norm + work.write / self.write


@dataclass(frozen=True, slots=True)
class Work:
    """What can't be done without, on one rank.

    Args:
        read: bytes that are only read.
        write: bytes read and bytes written where they are changed, added up.
        reduces: whether ranks that share the reading have to tell each other something.
        read_alone: bytes with which this rank needs nobody, where it holds everything; else `None`.
    """

    read: float
    write: float
    reduces: bool
    read_alone: float | None = None

    @property
    def bytes(self) -> float:
        return self.read + self.write


def work_of(problem: Problem, *, clips: bool, step: bool = False) -> Work:
    """What this rank has to do.

    Each gradient byte is read once for the norm, by one of its replicas; where clipping changes them, each
    is read and written once more by everyone who has it. AdamW reads parameter, gradient and two moments,
    and writes all but the gradient; its kernel can scale the gradient on the way.
    """
    read = sum(each.saved_bytes / each.replicas for each in problem.held)
    here = sum(each.saved_bytes for each in problem.held)
    write = 7 * here if step else 2 * here if clips else 0
    ranks = problem.world.size
    return Work(read, write, ranks > 1, here if problem.replications == {ranks} else None)


def measure_limit(world: World, elements: int = BUFFER_ELEMENTS) -> Limit:
    """Measure, on all ranks at once, with the threads that torch uses here. Collective.

    Args:
        world: the ranks.
        elements: of the fp32 buffer on each rank.
    """
    source = torch.ones(elements, device=world.device)
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    reading = min(_times(world, source.sum))
    copying = min(_times(world, lambda: target.copy_(source)))
    scaling = min(_times(world, lambda: target.mul_(1.0)))
    few = torch.zeros(2, dtype=torch.float64, device=world.device)
    reduction = _times(world, lambda: dist.all_reduce(few), _LATENCY_ROUNDS) if world.size > 1 else [0.0]
    return Limit(size / reading, 2 * size / min(copying, scaling), min(reduction))


def _times(world: World, action: Callable[[], object], rounds: int = _ROUNDS) -> list[float]:
    mine = [seconds(world, action) for _ in range(rounds + 1)][1:]
    return slowest(world, mine)


def seconds(world: World, action: Callable[[], object]) -> float:
    """How long an action takes on this rank, from a barrier until the device has done it. Collective."""
    world.synchronize()
    if world.size > 1:
        dist.barrier()
    world.synchronize()
    began = time.perf_counter()
    action()
    world.synchronize()
    taken = time.perf_counter() - began
    if world.size > 1:
        dist.barrier()  # or what a rank does next would slow down those that aren't done
    return taken


def slowest(world: World, mine: list[float]) -> list[float]:
    """For every round the time of the rank that took longest. Collective."""
    return [max(times) for times in zip(*world.gather(mine), strict=True)]
