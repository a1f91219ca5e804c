"""What the caller declares of tensors that don't say it themselves: pieces, and where gradients are.

Read anew, apart from the library's own sources, like all that verify judges by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distnorm.errors import DistnormError
from distnorm.verification.pieces import Layout

Named = list[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where gradients are.

    Args:
        given: the name of an attribute, or a function of a parameter; `None`: `grad`.
    """

    given: str | Callable[[Tensor], Tensor | None] | None = None

    def of(self, parameter: Tensor) -> Tensor | None:
        """A parameter's gradient."""
        if callable(self.given):
            return self.given(parameter)
        found: Tensor | None = getattr(parameter, self.given or "grad", None)
        return found

    def put(self, parameter: Tensor, gradient: Tensor | None) -> None:
        """Put a gradient back; one that a function gives is where it was."""
        if self.given is None:
            # torch refuses to swap a gradient for one of other placements, unless there is none in between
            parameter.grad = None
            parameter.grad = gradient
        elif isinstance(self.given, str):
            setattr(parameter, self.given, gradient)


def declared_layouts(named: Sequence[tuple[str, Tensor]], sharded: Any) -> tuple[Named, dict[int, Layout]]:
    """The names of this rank's tensors in the whole model, and the layout of declared pieces by their `id`.

    Args:
        named: as the caller names them.
        sharded: as for `GradClipper`.

    Raises:
        DistnormError: indices of a piece are given by a text, which doesn't say what they are.
    """
    found: Named = []
    layouts: dict[int, Layout] = {}
    for name, tensor in named:
        piece: Any = None
        if isinstance(sharded, Mapping):
            layout = next((_cut(tensor, *v) for k, v in sharded.items() if fnmatchcase(name, k)), None)
        else:
            piece = None if sharded is None else sharded(name, tensor)
            layout = None if piece is None else _piece(name, piece)
        if layout is not None:
            layouts[id(tensor)] = layout
        found.append((getattr(piece, "name", None) or name, tensor))
    return found, layouts


def _cut(tensor: Tensor, dim: int, group: Any) -> Layout:
    """An even cut along one dim, in the order of the group's ranks."""
    group = group.get_group() if isinstance(group, DeviceMesh) else group
    parts, which = dist.get_world_size(group), dist.get_group_rank(group, dist.get_rank())
    held, dim = tensor.shape[dim], dim % tensor.ndim
    shape = [size * parts if d == dim else size for d, size in enumerate(tensor.shape)]
    runs = [((0, size),) for size in tensor.shape]
    runs[dim] = ((which * held, (which + 1) * held),)
    return Layout(tuple(shape), tuple(runs if tensor.numel() else () for runs in runs))


def _piece(name: str, piece: Any) -> Layout:
    if any(isinstance(extent, str) for extent in piece.extents):
        raise DistnormError(
            f"verify: parameter '{name}': expected a piece whose indices are numbers, found {piece.extents!r}"
        )
    shape = (math.prod(piece.shape),) if len(piece.extents) != len(piece.shape) else tuple(piece.shape)
    return Layout(shape, tuple((tuple(e),) if e[0] < e[1] else () for e in piece.extents))
