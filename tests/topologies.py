"""Topologies as plain data: who holds which piece of what, and what their gradients are.

The same description is read twice: by every rank, which makes its own DTensors and plain tensors of it,
and by the parent process, which adds everything up in fp64 without any of them.
"""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from tests import oracle

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "complex64": torch.complex64,
}


@dataclass(frozen=True)
class Mesh:
    ranks: tuple[int, ...]
    shape: tuple[int, ...]

    def coordinate(self, rank: int) -> tuple[int, ...]:
        return tuple(int(i) for i in np.unravel_index(self.ranks.index(rank), self.shape))


@dataclass(frozen=True)
class Held:
    """One parameter on one mesh, or, plain, on some ranks.

    Placements: ``S1`` shards dim 1, ``Z1/2`` shards each of its two runs, ``R`` copies.
    """

    label: str  # which parameter of the whole model this is
    name: str  # what its ranks call it
    shape: tuple[int, ...]
    dtype: str
    exponent: int = 0
    mesh: int | None = None
    ranks: tuple[int, ...] = ()
    placements: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()  # for each axis "", "sum" or "avg"


@dataclass(frozen=True)
class Topology:
    world: int
    meshes: tuple[Mesh, ...]
    held: tuple[Held, ...]
    order: float = 2.0
    seed: int = 0
    missing: float = 0.0  # how likely a piece has no gradient in a step
    steps: int = 3  # the last of them has gradients of ones, and all of them
    factor: float = 0.5  # the threshold relative to the norm of the first step
    stages: int = 1  # more than 1: names are those of a stage, and there is a pp_mesh
    tied: tuple[tuple[str, ...], ...] = field(default=())


@dataclass(frozen=True)
class Place:
    """Which piece a rank holds: its coordinates on axes that cut, and on those that are to be summed."""

    piece: tuple[int, ...]
    part: tuple[int, ...]


def place(topology: Topology, held: Held, rank: int) -> Place | None:
    if held.mesh is None:
        return Place((), ()) if rank in held.ranks else None
    mesh = topology.meshes[held.mesh]
    if rank not in mesh.ranks:
        return None
    axes = list(zip(mesh.coordinate(rank), held.placements, held.partial, strict=True))
    return Place(
        tuple(i for i, placement, _ in axes if placement != "R"),
        tuple(i for i, _, partial in axes if partial),
    )


def cut(topology: Topology, held: Held, whole: np.ndarray, rank: int) -> np.ndarray:
    """The piece that the placements leave to a rank, axis by axis, left to right."""
    if held.mesh is None:
        return whole
    mesh = topology.meshes[held.mesh]
    for size, index, placement in zip(mesh.shape, mesh.coordinate(rank), held.placements, strict=True):
        if placement != "R":
            dim, _, runs = placement[1:].partition("/")
            pieces = [_chunk(run, size, int(dim))[index] for run in _chunk(whole, int(runs or 1), int(dim))]
            whole = np.concatenate(pieces, axis=int(dim))
    return whole


def _chunk(array: np.ndarray, parts: int, dim: int) -> list[np.ndarray]:
    length = array.shape[dim]
    step = max(-(-length // parts), 1)
    return [array.take(range(min(i * step, length), min((i + 1) * step, length)), dim) for i in range(parts)]


def values(topology: Topology, held: Held, step: int, part: tuple[int, ...]) -> torch.Tensor:
    """A whole gradient, or one summand of it; step -1 is the parameter itself."""
    sizes = topology.meshes[held.mesh].shape if held.mesh is not None else ()
    averaged = math.prod(size for size, op in zip(sizes, held.partial, strict=False) if op == "avg")
    dtype = DTYPES[held.dtype]
    if step == topology.steps - 1:
        return torch.full(held.shape, 0.0 if any(part) else float(averaged)).to(dtype)
    seed = zlib.crc32(repr((topology.seed, held.label, step, part)).encode())
    generator = torch.Generator().manual_seed(seed)
    if any(held.partial) and step >= 0:  # small integers, whose sums and averages are exact in every dtype
        return (torch.randint(-4, 5, held.shape, generator=generator) * averaged).to(dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return (torch.randn(held.shape, dtype=wide, generator=generator) * 10.0**held.exponent).to(dtype)


def is_missing(topology: Topology, held: Held, step: int, rank: int) -> bool:
    where = place(topology, held, rank)
    if step == topology.steps - 1 or (step == 0 and any(held.partial)):
        return False
    return random.Random(repr((topology.seed, held.label, step, where))).random() < topology.missing


def whole_gradients(topology: Topology, step: int) -> dict[str, np.ndarray]:
    """label -> the whole gradient of this step in fp64, zero where nobody has one."""
    result: dict[str, np.ndarray] = {}
    for held in topology.held:
        if held.label in result:
            continue
        wide = np.complex128 if held.dtype == "complex64" else np.float64
        total = np.zeros(held.shape, dtype=wide)
        indices = np.arange(total.size).reshape(held.shape)
        sizes = topology.meshes[held.mesh].shape if held.mesh is not None else ()
        averaged = math.prod(size for size, op in zip(sizes, held.partial, strict=False) if op == "avg")
        seen: set[Place] = set()
        for rank in range(topology.world):
            where = place(topology, held, rank)
            if where is None or where in seen or is_missing(topology, held, step, rank):
                continue
            seen.add(where)
            summand = oracle.as_numpy(values(topology, held, step, where.part)) / averaged
            mine = cut(topology, held, indices, rank).reshape(-1)
            total.reshape(-1)[mine] += summand.reshape(-1)[mine]
        result[held.label] = total
    return result


def exact_norms(topology: Topology) -> list[float]:
    steps = range(topology.steps)
    return [oracle.dense(whole_gradients(topology, step).values(), topology.order) for step in steps]


# ---- what a rank makes of it


def make_meshes(topology: Topology) -> list[DeviceMesh]:
    return [DeviceMesh("cpu", torch.tensor(mesh.ranks).reshape(mesh.shape)) for mesh in topology.meshes]


def pp_mesh(topology: Topology) -> DeviceMesh | None:
    if topology.stages == 1:
        return None
    ranks = torch.arange(topology.world).reshape(topology.stages, -1)
    return DeviceMesh("cpu", ranks, mesh_dim_names=("pp", "inner"))["pp"]


def placement(text: str) -> Any:
    if text == "R":
        return Replicate()
    dim, _, runs = text[1:].partition("/")
    return _StridedShard(int(dim), split_factor=int(runs)) if runs else Shard(int(dim))


def make_parameters(
    topology: Topology, meshes: list[DeviceMesh]
) -> list[tuple[Held, Place, torch.nn.Parameter]]:
    rank, result = dist.get_rank(), []
    for held in topology.held:
        where = place(topology, held, rank)
        if where is None:
            continue
        tensor = values(topology, held, -1, ())
        if held.mesh is not None:
            whole = oracle.as_numpy(tensor)
            placements = [placement(text) for text in held.placements]
            tensor = distribute_tensor(tensor, meshes[held.mesh], placements, src_data_rank=None)
            expected = cut(topology, held, whole, rank)  # torch's pieces are those that the oracle counts
            assert np.array_equal(oracle.as_numpy(tensor.to_local()), expected), held
        result.append((held, where, torch.nn.Parameter(tensor)))
    return result


def set_gradients(
    topology: Topology, parameters: list[tuple[Held, Place, torch.nn.Parameter]], step: int
) -> None:
    rank = dist.get_rank()
    for held, where, parameter in parameters:
        parameter.grad = None
        if is_missing(topology, held, step, rank):
            continue
        whole = oracle.as_numpy(values(topology, held, step, where.part))
        local = torch.from_numpy(cut(topology, held, whole, rank).copy()).to(DTYPES[held.dtype])
        parameter.grad = like(parameter, local, held.partial)


def like(parameter: torch.Tensor, local: torch.Tensor, partial: tuple[str, ...] = ()) -> torch.Tensor:
    """A gradient laid out like its parameter, but for the axes over which it is partial."""
    if not isinstance(parameter, DTensor):
        return local
    ops = partial or ("",) * len(parameter.placements)
    placements = [Partial(op) if op else p for op, p in zip(ops, parameter.placements, strict=True)]
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
