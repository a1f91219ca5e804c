"""Plain tensors that are pieces of parameters, as the caller declares: hand-written tensor parallelism."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from distnorm.errors import ConfigError, UnsupportedGradientError
from distnorm.sources.plain import PlainShard
from distnorm.sources.shards import Extent, Source


@dataclass(frozen=True, slots=True)
class Piece:
    """Which piece of a parameter a plain tensor is.

    Args:
        extents: the indices (start, stop) that it holds, for each dim of the whole parameter; or one (start,
            stop), where it is a run of the parameter as that lies in memory, row by row. A text stands for
            indices that are no run: ranks that give the same text hold the same elements.
        shape: that of the whole parameter.
        name: the parameter's name in the whole model, where the tensor was given under another.

    Raises:
        ConfigError: the extents don't lie within the shape.

    Example:
        >>> Piece(((4, 8), (0, 16)), (8, 16))  # the second half of the rows
    """

    extents: tuple[Extent, ...]
    shape: tuple[int, ...]
    name: str | None = None

    def __post_init__(self) -> None:
        try:  # one spelling of a piece, by which ranks compare
            extents = tuple(e if isinstance(e, str) else tuple(map(operator.index, e)) for e in self.extents)
            shape = tuple(map(operator.index, self.shape))
        except TypeError as error:
            raise ConfigError(
                f"sharded: expected extents and a shape of integers, found {self.extents!r} of {self.shape!r}"
            ) from error
        object.__setattr__(self, "extents", extents)
        object.__setattr__(self, "shape", shape)
        within = [(0, math.prod(self.shape))] if self.is_run else [(0, size) for size in self.shape]
        fits = len(within) == len(self.extents) and all(
            isinstance(extent, str) or (len(extent) == 2 and 0 <= extent[0] <= extent[1] <= most)
            for extent, (_, most) in zip(self.extents, within, strict=True)
        )
        if not fits:
            raise ConfigError(
                f"sharded: expected (start, stop) within {tuple(self.shape)} for each dim, or one for all "
                f"elements in a row; found {self.extents!r}"
            )

    @property
    def is_run(self) -> bool:
        """Whether it is a run of elements, or a text stands for all of them, and no block of dims."""
        return len(self.extents) == 1 and len(self.shape) != 1

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why a tensor of this shape is not the piece, if it is not."""
        sizes = [None if isinstance(e, str) else e[1] - e[0] for e in self.extents]
        numel = math.prod(shape)
        if self.is_run or (len(sizes) == 1 and len(shape) != 1):
            fits, expected = sizes[0] in (None, numel), f"{sizes[0]} elements"
        else:
            fits = len(sizes) == len(shape)
            fits = fits and all(a is None or a == b for a, b in zip(sizes, shape, strict=True))
            expected = f"the shape {tuple(sizes)}"
        if fits and numel <= math.prod(self.shape):
            return None
        return f"expected {expected} by its extents {self.extents} of {self.shape}, found the shape {shape}"


PieceOf = Callable[[str, Tensor], Piece | None]
"""From a tensor's name in the whole model, and the tensor, to its piece; `None` where it is a whole one."""
Sharded = Mapping[str, tuple[int, ProcessGroup | DeviceMesh]] | PieceOf | None
"""Patterns of names with (dim, group); or a function."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Parameters that are cut evenly along one dim.

    Args:
        pattern: of their names in the whole model, as `fnmatch` has it.
        dim: which; may be negative.
        index: this rank's place in the group that holds the pieces.
        size: of the group.
    """

    pattern: str
    dim: int
    index: int
    size: int

    def piece(self, name: str, shape: tuple[int, ...]) -> Piece:
        """The piece that a tensor of this shape is.

        Raises:
            ConfigError: it has no such dim.
        """
        if not -len(shape) <= self.dim < len(shape):
            raise ConfigError(
                f"sharded[{self.pattern!r}]: expected a dim of '{name}', whose local shape is {shape}, found "
                f"{self.dim}"
            )
        dim, held = self.dim % len(shape), shape[self.dim]
        extents = [(0, size) for size in shape]
        extents[dim] = (self.index * held, (self.index + 1) * held)
        return Piece(tuple(extents), (*shape[:dim], held * self.size, *shape[dim + 1 :]))


@dataclass(frozen=True, slots=True)
class Declared:
    """What the caller declares to be pieces.

    Args:
        rules: the first whose pattern fits a name is in force.
        function: asked in place of rules.
    """

    rules: tuple[Rule, ...] = ()
    function: PieceOf | None = None

    @classmethod
    def of(cls, sharded: Sharded) -> Declared:
        """Read what the caller gave.

        Raises:
            ConfigError: it is wrong by itself, or this rank is in no such group.
        """
        if sharded is None:
            return cls()
        if isinstance(sharded, Mapping):
            return cls(tuple(_rule(pattern, given) for pattern, given in sharded.items()))
        if not callable(sharded):
            raise ConfigError(
                'sharded: expected patterns such as {"*.qkv.weight": (0, group)}, or a function of name and '
                f"tensor; found {type(sharded).__name__}"
            )
        return cls(function=sharded)

    @property
    def term(self) -> object:
        """What must be the same on all ranks."""
        return "a function" if self.function else tuple((rule.pattern, rule.dim) for rule in self.rules)

    def piece(self, name: str, tensor: Tensor) -> Piece | None:
        """The piece that a tensor is declared to be; `None` where nothing is said of it.

        Raises:
            ConfigError: a rule or the function is wrong about it.
        """
        if self.function is None:
            rule = next((rule for rule in self.rules if fnmatchcase(name, rule.pattern)), None)
            return None if rule is None else rule.piece(name, tuple(tensor.shape))
        piece = self.function(name, tensor)
        if piece is not None and not isinstance(piece, Piece):
            raise ConfigError(
                f"sharded: expected a distnorm.Piece, or None, for '{name}', found {type(piece).__name__}"
            )
        return piece


NOTHING = Declared()
"""No pieces."""


@dataclass(frozen=True, slots=True)
class DeclaredShard(PlainShard):
    """A plain tensor that is a piece of a parameter."""

    has_fast_path: ClassVar[bool] = True

    def indices(self, dim: int) -> Tensor:
        if isinstance(self.piece[dim], str):
            raise UnsupportedGradientError(
                f"parameter '{self.name}': expected indices of dim {dim}, found the text {self.piece[dim]!r}"
            )
        return PlainShard.indices(self, dim)


def shard(
    name: str, tensor: Tensor, source: Source, piece: Piece, framework: str | None = None
) -> DeclaredShard:
    """Describe a tensor that is a piece.

    Args:
        name: of the parameter in the whole model.
        tensor: this rank's.
        source: what is measured of it.
        piece: what it is declared to be.
        framework: whose tensor it is, and what says which piece; `None` if it is a plain one.

    Raises:
        ConfigError: it is no plain tensor, or not of the piece's shape.
    """
    shape = tuple(tensor.shape)
    misfit = piece.misfit(shape)
    if hasattr(tensor, "placements"):
        framework = "a DTensor, whose placements"
    if framework is not None:
        misfit = f"expected a plain tensor, found {framework} say which piece it is"
    if misfit:
        raise ConfigError(f"sharded: parameter '{name}': {misfit}")
    return DeclaredShard(piece.name or name, tensor, source, piece.extents, shape, piece.shape)


def _rule(pattern: Any, given: Any) -> Rule:
    is_pair = isinstance(given, tuple | list) and len(given) == 2 and isinstance(given[0], int)
    if not isinstance(pattern, str) or not is_pair or isinstance(given[0], bool):
        raise ConfigError(f"sharded[{pattern!r}]: expected (dim, group), found {given!r}")
    dim, group = given
    if isinstance(group, DeviceMesh):
        if group.ndim != 1 or group.get_coordinate() is None:
            raise ConfigError(
                f"sharded[{pattern!r}]: expected a 1-d mesh with this rank on it, found {group}"
            )
        return Rule(pattern, dim, group.get_local_rank(), group.size())
    if not isinstance(group, ProcessGroup):
        raise ConfigError(
            f"sharded[{pattern!r}]: expected a process group, or a 1-d mesh, that this rank is in; found "
            f"{group!r}"
        )
    return Rule(pattern, dim, group.rank(), group.size())
