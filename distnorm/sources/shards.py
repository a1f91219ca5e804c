"""What a rank holds of the model's gradient, whatever framework holds it.

A source (see `distnorm.sources`) turns the caller's target into `GradShard` objects; everything after
it, from the plan to the scaling, knows no framework.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distnorm import kernels
from distnorm.errors import UnsupportedGradientError
from distnorm.sources.elsewhere import GradPlace, refuse_unnamed

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


Reading = Tensor | PartialGrad | None
"""A local gradient as it was found, or `None` where this rank has none in this step."""


class Source(Enum):
    """What is measured of the tensor that the caller gave."""

    GRADIENT = "gradient"
    """The gradient that it holds."""
    TENSOR = "tensor"
    """The tensor that was given, be it a gradient, a parameter or an update."""


class Gate(Protocol):
    """What decides in each step whether the gradients of some shards may be read."""

    def refusal(self) -> str | None:
        """Why they may not be, if they may not."""


class FlatGradient(NamedTuple):
    """Where a gradient lies that is no tensor's `grad`: elements of a contiguous tensor, in memory's order.

    Args:
        key: of the tensor; gradients that lie in one tensor have one key.
        find: finds the tensor of this step, or `None`, and waits for nothing.
        at: the first of the elements.
    """

    key: Hashable
    find: Callable[[], Tensor | None]
    at: int


@dataclass(frozen=True, slots=True)
class GradShard(ABC):
    """The piece of one parameter's gradient that this rank holds.

    Args:
        name: the parameter's fully qualified name in the whole model.
        holder: what the caller gave.
        source: what is measured of it.
        piece: which piece of the parameter this is, an extent for each dim of the global shape.
        shape: shape of the local piece.
        global_shape: shape of the whole parameter.
        place: where its gradient is, if it is not the `grad` of the holder.

    Attributes:
        has_fast_path: whether the gradient is what the holder has, and nothing but `gate` decides whether it
            may be read.
    """

    has_fast_path: ClassVar[bool] = False

    name: str
    holder: Tensor
    source: Source
    piece: tuple[Extent, ...]
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    place: GradPlace | None = field(default=None, kw_only=True)

    @property
    def is_in_grad(self) -> bool:
        """Whether the gradient can be found in the holder's `grad` without the shard."""
        return self.has_fast_path and self.source is Source.GRADIENT and self.place is None

    @property
    def gate(self) -> Gate | None:
        """What decides whether the gradient may be read; `None` where it always may. Many shards share it."""
        return None

    @property
    def flat(self) -> FlatGradient | None:
        """Where the gradient lies, where that is known of what is no `grad` of the holder; if there is a
        tensor, nothing else decides whether it may be read."""
        return None

    @property
    def local_device(self) -> torch.device:
        """Where the gradient is."""
        return self.holder.device

    @property
    def numel(self) -> int:
        """Number of elements of the local piece."""
        return math.prod(self.shape)

    @property
    def global_numel(self) -> int:
        """Number of elements of the whole parameter."""
        return math.prod(self.global_shape)

    def value(self) -> Tensor | None:
        """What is measured in this step, as its framework holds it; `None` where there is no gradient."""
        if self.source is Source.TENSOR:
            return self.holder
        if self.place is not None:
            return self.place.of(self.holder)
        gradient = self.holder.grad
        if gradient is None:
            refuse_unnamed(self.holder)
        return gradient

    def _put(self, gradient: Tensor) -> None:
        if self.place is not None:
            self.place.put(self.holder, gradient)
            return
        # torch refuses to put a gradient of another layout in an old one's place, but not in no one's.
        self.holder.grad = None
        self.holder.grad = gradient

    @property
    def is_flat(self) -> bool:
        """Whether this is a run of the parameter as it lies in memory, and no block of its dims."""
        dims = len(self.global_shape)
        return dims > 1 and len(self.piece) != dims and self.numel < self.global_numel

    def indices(self, dim: int) -> Tensor:
        """The indices that the piece holds along one dim of the global shape, [n] int64."""
        extent = self.piece[dim]
        assert isinstance(extent, tuple), "a source that gives digests overrides this method"
        return torch.arange(*extent, device="cpu")

    @property
    def replicated_axes(self) -> tuple[int, ...]:
        """Mesh axes over which this piece is copied, and over which a gradient may arrive partial."""
        return ()

    @property
    def mesh_axes(self) -> tuple[int, ...]:
        """The axes of this parameter's mesh that have more than one rank."""
        return ()

    @property
    def cutting_axes(self) -> dict[str, int]:
        """Sizes of the mesh axes over which the parameter is cut, by name."""
        return {}

    def piece_at(self, places: Mapping[str, int]) -> tuple[tuple[Extent, ...], int]:
        """The piece that a rank holds at these places of `cutting_axes`, and its number of elements."""
        return self.piece, self.numel

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
        """The local values by which replicas are compared."""

    @abstractmethod
    def read(self) -> Tensor | PartialGrad | None:
        """This step's local gradient.

        Raises:
            UnsupportedGradientError: with the bare fact; the caller adds parameter and rank.
        """


def whole(shape: tuple[int, ...]) -> tuple[Extent, ...]:
    """The piece that is a whole parameter."""
    return tuple((0, size) for size in shape)


def measurable(tensor: Tensor) -> Tensor:
    """The tensor as plain memory, if it has elements that can be measured and multiplied there.

    Raises:
        UnsupportedGradientError: it is sparse, nested, of integers or of packed numbers, of a class whose
            operators alone know what is inside, or its memory is not all there.
    """
    if hasattr(tensor, "trigger_wait"):  # an asynchronous collective's result
        tensor = tensor.trigger_wait()
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise UnsupportedGradientError(
            f"expected a dense gradient, found layout {tensor.layout}; "
            "make it dense (for nn.Embedding: sparse=False) before it is measured"
        )
    if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex) or tensor.dtype in PACKED:
        raise UnsupportedGradientError(f"expected a floating-point or complex dtype, found {tensor.dtype}")
    if type(tensor).__name__ == "FakeTensor":
        return tensor
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise UnsupportedGradientError(
            f"expected a tensor of plain memory, found {type(tensor).__name__}, whose operators alone "
            "know its elements; convert the gradient to a plain tensor before it is measured"
        )
    plain = tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)
    if not kernels.is_all_there(plain):
        raise UnsupportedGradientError(
            f"expected memory for {tensor.numel()} elements of {tensor.dtype}, found less: it is a meta "
            "tensor or lazy zeros, or its storage was freed or made smaller"
        )
    return plain


PACKED = tuple(
    getattr(torch, name) for name in ("float8_e8m0fnu", "float4_e2m1fn_x2") if hasattr(torch, name)
)
"""No signs, or two numbers in an element: no gradient."""
