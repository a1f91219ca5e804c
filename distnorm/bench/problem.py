"""What contenders work on: one rank's gradients, who else holds them, and their true norm in fp64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor, Replicate

from distnorm.bench.peers import Parts, local
from distnorm.trainer.world import World

_CHUNK = 2**22  # elements converted to fp64 at a time


@dataclass(frozen=True, slots=True)
class Held:
    """One parameter on this rank, with its gradient as it was left by the backward pass.

    Args:
        name: in the whole model.
        parameter: what the optimizer steps.
        gradient: the tensor that is its `grad`.
        saved: a copy of the local tensor of it.
        replicas: on how many ranks the same piece is.
        owned: whether this rank is the first of them.
    """

    name: str
    parameter: nn.Parameter
    gradient: Tensor
    saved: Tensor
    replicas: int
    owned: bool

    @property
    def is_partial(self) -> bool:
        return isinstance(self.gradient, DTensor) and any(p.is_partial() for p in self.gradient.placements)

    @property
    def saved_bytes(self) -> int:
        return self.saved.numel() * self.saved.element_size()


@dataclass(frozen=True, slots=True)
class Problem:
    """A model after a backward pass, as one rank sees it. Every rank makes one: use `describe`.

    Args:
        target: what `GradClipper` takes.
        held: the parameters that have a gradient here.
        world: the ranks.
        replications: all numbers of replicas that there are, on any rank.
        whole_ranks: whether every rank has a gradient.
        any_partial: whether a gradient, on any rank, is a sum not yet reduced.
        parts: for torch's functions.
        tied: what `GradClipper` takes.
        norm: the true norm, fp64.
    """

    target: Any
    held: tuple[Held, ...]
    world: World
    replications: frozenset[int]
    whole_ranks: bool
    any_partial: bool
    parts: Parts
    tied: Sequence[Sequence[str]]
    norm: float

    @property
    def fsdp1(self) -> FullyShardedDataParallel | None:
        target = self.target[0] if isinstance(self.target, list) else self.target
        return target if isinstance(target, FullyShardedDataParallel) else None

    @property
    def locals(self) -> list[Tensor]:
        """What this rank holds of the gradients; restored ones are these very tensors."""
        return [local(each.gradient) for each in self.held]

    def restore(self) -> None:
        """Give every gradient the values it had after the backward pass."""
        for each in self.held:
            if each.parameter.grad is not each.gradient:
                each.parameter.grad = None  # torch refuses to put a gradient of another layout in its place
                each.parameter.grad = each.gradient
        if self.held:
            torch._foreach_copy_(self.locals, [each.saved for each in self.held])

    def present_norm(self) -> float:
        """The norm, in fp64, of the gradients as they are now. Collective."""
        pieces = [(each.parameter.grad, each.replicas) for each in self.held]
        return _true_norm([(g, r) for g, r in pieces if g is not None], self.world)


def describe(
    target: Any,
    named: Mapping[str, nn.Parameter],
    world: World,
    *,
    parts: Sequence[tuple[Sequence[nn.Parameter], dist.ProcessGroup | None]] | None = None,
    tied: Sequence[Sequence[str]] = (),
) -> Problem:
    """Find out what all ranks hold, after a backward pass. Collective.

    Args:
        target: what `GradClipper` takes.
        named: this rank's parameters by their names in the whole model.
        world: the ranks.
        parts: parameters with the group over which their squares still add up when torch has measured them;
            by default all, and none.
        tied: what `GradClipper` takes.
    """
    root = target[0] if isinstance(target, list) else target
    present = {name: p for name, p in named.items() if p.grad is not None}
    pieces = [_piece(name, p, root, world) for name, p in present.items()]
    of_ranks = world.gather(pieces)
    counts = Counter(piece for theirs in of_ranks for piece in theirs)
    before = {piece for theirs in of_ranks[: world.rank] for piece in theirs}
    held = tuple(
        Held(name, p, _gradient(p), local(_gradient(p)).detach().clone(), counts[piece], piece not in before)
        for (name, p), piece in zip(present.items(), pieces, strict=True)
    )
    by_mesh = [(_by_mesh(some), group) for some, group in parts or [(list(named.values()), None)]]
    return Problem(
        target,
        held,
        world,
        frozenset(counts.values()),
        all(of_ranks),
        any(world.gather(any(each.is_partial for each in held))),
        by_mesh,
        tied,
        _true_norm([(each.gradient, each.replicas) for each in held], world),
    )


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _piece(name: str, parameter: nn.Parameter, root: object, world: World) -> Hashable:
    """What is the same on two ranks that hold the same elements."""
    if isinstance(root, FullyShardedDataParallel):
        whole = root.sharding_strategy == ShardingStrategy.NO_SHARD
        return name, -1 if whole else dist.get_rank(root.process_group)
    if not isinstance(parameter, DTensor):
        return name, -1
    mesh = parameter.device_mesh
    coordinates = mesh.get_coordinate()
    assert coordinates is not None
    at = zip(coordinates, mesh.shape, parameter.placements, strict=True)
    return name, tuple((index, size) for index, size, placement in at if not placement.is_replicate())


def _by_mesh(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    meshes: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        meshes.setdefault(mesh, []).append(parameter)
    return list(meshes.values()) or [[]]


def _true_norm(pieces: Sequence[tuple[Tensor, int]], world: World) -> float:
    square = 0.0
    for gradient, replicas in pieces:
        if isinstance(gradient, DTensor):
            reduced = [Replicate() if p.is_partial() else p for p in gradient.placements]
            gradient = gradient.redistribute(placements=reduced)
        chunks = local(gradient).detach().reshape(-1).split(_CHUNK)  # type: ignore[no-untyped-call]
        square += sum(float(chunk.double().square().sum()) for chunk in chunks) / replicas
    return float(sum(world.gather(square)) ** 0.5)
