"""DTensors in every form: FSDP2, HSDP, tensor, sequence and expert parallel, and any mix of them."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distnorm.errors import UnsupportedGradientError
from distnorm.sources.shards import Extent, GradShard, PartialGrad, Source, measurable

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

REDUCE_OPS = ("sum", "avg")


def holds(tensor: Tensor) -> bool:
    """Whether this is a DTensor; false wherever the caller never imported DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@dataclass(frozen=True, slots=True)
class DTensorShard(GradShard):
    """This rank's piece of a DTensor, cut out by the placements of its mesh."""

    has_fast_path: ClassVar[bool] = True

    placements: tuple[Any, ...]

    @property
    def mesh_axes(self) -> tuple[int, ...]:
        sizes = _dtensor(self.holder).device_mesh.shape
        return tuple(axis for axis, size in enumerate(sizes) if size > 1)

    @property
    def replicated_axes(self) -> tuple[int, ...]:
        return tuple(axis for axis in self.mesh_axes if _cuts(self.placements[axis]) is None)

    @property
    def cutting_axes(self) -> dict[str, int]:
        mesh = _dtensor(self.holder).device_mesh
        names = mesh.mesh_dim_names or tuple(map(str, range(mesh.ndim)))
        cuts = zip(names, mesh.shape, self.placements, strict=True)
        return {name: size for name, size, p in cuts if size > 1 and _cuts(p) is not None}

    def piece_at(self, places: Mapping[str, int]) -> tuple[tuple[Extent, ...], int]:
        mesh = _dtensor(self.holder).device_mesh
        names = mesh.mesh_dim_names or tuple(map(str, range(mesh.ndim)))
        coordinate = tuple(places.get(name, 0) for name in names)
        piece, shape = _cut(self.global_shape, tuple(mesh.shape), coordinate, self.placements)
        return piece, math.prod(shape)

    def indices(self, dim: int) -> Tensor:
        mesh = _dtensor(self.holder).device_mesh
        coordinate = tuple(mesh.get_coordinate() or ())
        return _held(dim, self.global_shape, tuple(mesh.shape), coordinate, self.placements)

    def wide_shape(self, wide: tuple[int, ...]) -> tuple[int, ...]:
        return self._uncut(wide)[1] if wide else self.shape

    def narrowed(self, tensor: Tensor, wide: tuple[int, ...]) -> Tensor:
        for dim, (ours, theirs) in enumerate(zip(self.piece, self._uncut(wide)[0], strict=True)):
            if ours != theirs:
                if isinstance(ours, str) or isinstance(theirs, str):
                    raise UnsupportedGradientError(
                        f"expected runs of indices on dim {dim}, found {ours} of {theirs}; "
                        "redistribute the gradient to the placements of its parameter"
                    )
                tensor = tensor.narrow(dim, ours[0] - theirs[0], ours[1] - ours[0])
        return tensor

    def _uncut(self, wide: tuple[int, ...]) -> tuple[tuple[Extent, ...], tuple[int, ...]]:
        from torch.distributed.tensor import Replicate

        mesh = _dtensor(self.holder).device_mesh
        placements = tuple(Replicate() if axis in wide else p for axis, p in enumerate(self.placements))
        return _cut(self.global_shape, tuple(mesh.shape), tuple(mesh.get_coordinate() or ()), placements)

    def axis_group(self, axis: int) -> ProcessGroup:
        return _dtensor(self.holder).device_mesh.get_group(axis)

    def axis_index(self, axis: int) -> int:
        return _dtensor(self.holder).device_mesh.get_local_rank(axis)

    def witness(self) -> Tensor:
        return _local(self.holder).detach()

    def read(self) -> Tensor | PartialGrad | None:
        value = self.value()
        if value is None:
            return None
        if not holds(value):
            raise UnsupportedGradientError(
                f"expected a DTensor gradient of a DTensor, found {type(value).__name__}"
            )
        local = measurable(_local(value))
        placements = _dtensor(value).placements
        if placements == self.placements and self.source is Source.GRADIENT:
            return local
        return self._align(local, placements)

    def _align(self, local: Tensor, placements: tuple[Any, ...]) -> Tensor | PartialGrad:
        """Read a gradient that is laid out unlike its parameter: partial, or copied where that is sharded."""
        unlike = [
            a for a in self.mesh_axes if placements[a].is_partial() or placements[a] != self.placements[a]
        ]
        axes = tuple(axis for axis in unlike if placements[axis].is_partial())
        wide = tuple(axis for axis in unlike if _cuts(self.placements[axis]) is not None)
        ops = {_reduce_op(placements[axis]) for axis in axes}
        if not all(placements[axis].is_partial() or placements[axis].is_replicate() for axis in unlike):
            raise UnsupportedGradientError(
                f"expected the placements of its parameter {self.placements}, or Partial or Replicate in "
                f"their place; found {placements}; redistribute the gradient first"
            )
        if len(ops) > 1:
            raise UnsupportedGradientError(f"expected one kind of Partial, found {sorted(ops)}")
        if not unlike:
            return local
        if self.place is not None and callable(self.place.given):
            self.place.put(self.holder, None)  # refuses it, before any rank reduces
        arrived = PartialGrad(local, axes, ops.pop() if ops else "sum", wide)
        if wide and tuple(local.shape) == self.wide_shape(wide):
            self.narrowed(local, wide)  # refuses what it can't cut before any rank reduces
        return arrived

    def store(self, reduced: Tensor) -> None:
        from torch.distributed.tensor import DTensor

        parameter = _dtensor(self.holder)
        gradient = DTensor.from_local(
            reduced,
            parameter.device_mesh,
            self.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        self._put(gradient)


def shard(name: str, tensor: Tensor, source: Source) -> DTensorShard:
    """Describe a DTensor's local piece.

    Raises:
        UnsupportedGradientError: the local tensor is not the piece that its placements cut out.
    """
    whole = _dtensor(tensor)
    mesh = whole.device_mesh
    coordinate = mesh.get_coordinate()
    global_shape = tuple(whole.shape)
    local_shape = tuple(whole._local_tensor.shape)
    if coordinate is None:  # this rank is outside the mesh and holds nothing
        return DTensorShard(name, tensor, source, (), (0,), global_shape, whole.placements)
    piece, shape = _cut(global_shape, tuple(mesh.shape), tuple(coordinate), whole.placements)
    if shape != local_shape and any(map(math.prod, (shape, local_shape))):  # FSDP2 shapes nothing as (0, 0)
        raise UnsupportedGradientError(
            f"parameter '{name}': expected a local shape of {shape} by {whole.placements} of "
            f"{global_shape} on mesh {tuple(mesh.shape)}, found {local_shape}"
        )
    return DTensorShard(name, tensor, source, piece, local_shape, global_shape, whole.placements)


@lru_cache(maxsize=65536)
def _cut(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: tuple[Any, ...],
) -> tuple[tuple[Extent, ...], tuple[int, ...]]:
    """Which indices of each dim the placements leave to one coordinate of the mesh, and their number."""
    extents: list[Extent] = []
    local: list[int] = []
    for dim, size in enumerate(shape):
        if _axes(dim, len(shape), placements):
            held = _held(dim, shape, mesh_shape, coordinate, placements)
            extents.append(_extent(held))
            local.append(len(held))
        else:
            extents.append((0, size))
            local.append(size)
    return tuple(extents), tuple(local)


@lru_cache(maxsize=4096)
def _axes(dim: int, dims: int, placements: tuple[Any, ...]) -> list[int]:
    """The mesh axes that cut one of so many dims."""
    return [axis for axis, p in enumerate(placements) if _cuts(p) and p.dim % dims == dim]


def _held(
    dim: int,
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: tuple[Any, ...],
) -> Tensor:
    """The indices of one dim that the placements leave to one coordinate of the mesh.

    Every cut is made on the indices themselves, so that strided, uneven and empty pieces need no rule of
    their own.
    """
    held = torch.arange(shape[dim], device="cpu")
    for axis, parts in _in_order(_axes(dim, len(shape), placements), mesh_shape, placements):
        runs = torch.chunk(held, parts) if parts > 1 else (held,)
        held = torch.cat([_chunk(run, mesh_shape[axis], coordinate[axis]) for run in runs])
    return held


def _in_order(
    axes: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Any]
) -> list[tuple[int, int]]:
    """The axes that cut one dim in the order in which they cut it, each with the runs that it cuts apart.

    `Shard` cuts from left to right. `_StridedShard` says that axes further right, whose sizes multiply to
    its split factor, have cut before it, as tensor parallel has before FSDP2. Where they do, their order
    is kept: torch's own left-to-right reading of it differs for uneven sizes from what FSDP2 holds. Where
    no such axes are, the dim is cut into that many runs, and each run again.
    """
    order: list[tuple[int, int]] = []
    for axis in reversed(axes):
        parts = _cuts(placements[axis])
        assert parts is not None
        before = [math.prod(mesh_shape[a] for a, _ in order[:n]) for n in range(len(order) + 1)]
        if parts in before:
            order.insert(before.index(parts), (axis, 1))
        else:
            order.insert(0, (axis, parts))
    return order


def _cuts(placement: Any) -> int | None:
    """Into how many runs a placement cuts a dim before it shards each: 1 for `Shard`, more for
    `_StridedShard`, `None` for what is copied. torch's ``is_shard()`` is false for strided shards in
    torch 2.13, so it is not asked."""
    if placement.is_partial() or placement.is_replicate():
        return None
    if not hasattr(placement, "dim"):
        raise UnsupportedGradientError(f"expected Shard, Replicate or Partial, found {placement}")
    return int(getattr(placement, "split_factor", 1))


def _chunk(indices: Tensor, parts: int, which: int) -> Tensor:
    """One of `torch.chunk`'s pieces, empty where it would give fewer than `parts`."""
    size = -(-len(indices) // parts)
    return indices[which * size : (which + 1) * size]


def _extent(indices: Tensor) -> Extent:
    if len(indices) == 0:
        return (0, 0)
    start, stop = int(indices[0]), int(indices[-1]) + 1
    if stop - start == len(indices):
        return (start, stop)
    digest = hashlib.blake2b(str(indices.tolist()).encode(), digest_size=8).hexdigest()
    return f"{len(indices)} of [{start}, {stop}): {digest}"


def _reduce_op(placement: Any) -> str:
    if type(placement).__name__ != "Partial" or placement.reduce_op not in REDUCE_OPS:
        raise UnsupportedGradientError(f"expected Partial of {' or '.join(REDUCE_OPS)}, found {placement}")
    return str(placement.reduce_op)


def _dtensor(tensor: Tensor) -> DTensor:
    return tensor  # type: ignore[return-value]


def _local(tensor: Tensor) -> Tensor:
    local = _dtensor(tensor)._local_tensor
    # Only a tensor of plain type is sure to be complete: an asynchronous collective's result is waited for.
    return local if type(local) is Tensor else _dtensor(tensor).to_local()
