"""What a rank holds of the model's gradient, whatever framework holds it.

A source (see `distnorm.sources`) turns the caller's target into `GradShard` objects; everything after
it, from the plan to the scaling, knows no framework.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distnorm.errors import UnsupportedGradientError

Extent = tuple[int, int] | str
"""The indices a piece holds along one dim: ``(start, stop)``, or a digest where they have gaps."""


@dataclass(frozen=True, slots=True)
class PartialGrad:
    """A local gradient that is laid out unlike its parameter: to be reduced, or cut, or both.

    Args:
        tensor: this rank's summand, in the shape of the local shard, uncut along `wide`.
        axes: the mesh axes over which it is partial, ascending.
        op: ``"sum"`` or ``"avg"``.
        wide: the mesh axes along which the parameter is sharded, and this gradient is not.
    """

    tensor: Tensor
    axes: tuple[int, ...]
    op: str = "sum"
    wide: tuple[int, ...] = ()


class LayoutChangedError(Exception):
    """A gradient is missing, or is laid out otherwise than it was: it has to be read with care."""


@dataclass(frozen=True, slots=True)
class Route:
    """How the gradients of all shards of a class are found, once each of them was read with care.

    Args:
        layout_of: from a gradient to what is equal as long as its local tensor has the same shape, strides,
            dtype and device.
        addresses: from holders and the layouts of their gradients, of which local tensors are contiguous
            in the CPU's memory, to the addresses of their first elements; or `LayoutChangedError`, or
            `AttributeError` or `TypeError` where there is no gradient at all.
        mark_of: from a gradient to what another change of its local tensor's elements changes: how many such
            changes in place there were, and its address.
        is_versioned: whether the gradient is the local tensor itself, so that autograd sees its version.
    """

    layout_of: Callable[[Tensor], object]
    addresses: Callable[[Sequence[Tensor], Sequence[Any]], Iterator[int]]
    mark_of: Callable[[Tensor], tuple[int, ...]]
    is_versioned: bool


@dataclass(frozen=True, slots=True)
class GradShard(ABC):
    """The piece of one parameter's gradient that this rank holds.

    Args:
        name: the parameter's fully qualified name in the whole model.
        holder: what the caller gave: the parameter, or the tensor that is measured itself.
        take: finds this step's gradient on the holder, or `None` where there is none.
        piece: which piece of the parameter this is, an extent for each dim of the global shape.
        shape: shape of the local piece.
        global_shape: shape of the whole parameter.

    Attributes:
        route: the class's; `None` where every gradient is read with care in every step.
    """

    route: ClassVar[Route | None] = None

    name: str
    holder: Tensor
    take: Callable[[Tensor], Tensor | None]
    piece: tuple[Extent, ...]
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements of the local piece."""
        return math.prod(self.shape)

    @property
    def global_numel(self) -> int:
        """Number of elements of the whole parameter."""
        return math.prod(self.global_shape)

    @property
    def measures_itself(self) -> bool:
        """Whether the tensor given is measured, and not a gradient that it holds."""
        return self.take is itself

    @property
    def is_flat(self) -> bool:
        """Whether this is a run of the parameter as it lies in memory, and no block of its dims."""
        dims = len(self.global_shape)
        return dims > 1 and len(self.piece) != dims and self.numel < self.global_numel

    def indices(self, dim: int) -> Tensor:
        """The indices that the piece holds along one dim of the global shape, [n] int64."""
        extent = self.piece[dim]
        assert isinstance(extent, tuple), "a source that gives digests tells what they stand for"
        return torch.arange(*extent, device="cpu")

    @property
    def replicated_axes(self) -> tuple[int, ...]:
        """Mesh axes over which this piece is copied, and over which a gradient may arrive partial."""
        return ()

    @property
    def mesh_axes(self) -> tuple[int, ...]:
        """The axes of this parameter's mesh that have more than one rank."""
        return ()

    def wide_shape(self, wide: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a local gradient that is not cut along the axes `wide`."""
        return self.shape

    def narrowed(self, tensor: Tensor, wide: tuple[int, ...]) -> Tensor:
        """This shard's piece, as a view, of a gradient of `wide_shape`."""
        return tensor

    def axis_group(self, axis: int) -> ProcessGroup:
        """The ranks along one of `mesh_axes`."""
        raise NotImplementedError(f"{type(self).__name__} has no mesh axis {axis}")

    def axis_index(self, axis: int) -> int:
        """This rank's coordinate on one of `mesh_axes`."""
        raise NotImplementedError(f"{type(self).__name__} has no mesh axis {axis}")

    def store(self, reduced: Tensor) -> None:
        """Put the reduced gradient, shaped like the local piece, where the partial one was."""
        raise NotImplementedError(f"{type(self).__name__} has no partial gradients")

    @abstractmethod
    def witness(self) -> Tensor:
        """The local values by which two shards are seen to be replicas."""

    @abstractmethod
    def read(self) -> Tensor | PartialGrad | None:
        """This step's local gradient.

        Raises:
            UnsupportedGradientError: with the bare fact; the caller adds parameter and rank.
        """


def of_grad(holder: Tensor) -> Tensor | None:
    """Measure the gradient that the tensor holds."""
    return holder.grad


def itself(holder: Tensor) -> Tensor:
    """Measure the tensor itself."""
    return holder


def whole(shape: tuple[int, ...]) -> tuple[Extent, ...]:
    """The piece that is a whole parameter."""
    return tuple((0, size) for size in shape)


def require_dense(tensor: Tensor) -> None:
    """Refuse what has no p-norm over plain elements: sparse layouts, integers, quantised values."""
    if tensor.layout is not torch.strided:
        raise UnsupportedGradientError(
            f"expected a dense gradient, found layout {tensor.layout}; "
            "make it dense (for nn.Embedding: sparse=False) before it is measured"
        )
    if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        raise UnsupportedGradientError(f"expected a floating-point or complex dtype, found {tensor.dtype}")
