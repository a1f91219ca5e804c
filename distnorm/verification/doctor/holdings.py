"""What a rank holds of each parameter: which indices, the weight, and the gradient as it arrived."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.errors import DistnormError
from distnorm.sources import Source, Target, named_tensors, shards_of
from distnorm.sources.layout import Layout
from distnorm.sources.shards import GradShard, PartialGrad
from distnorm.verification.pieces import digest

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class FlatRun:
    """A run of a parameter's elements as they lie in memory, as FSDP1 cuts them."""

    start: int
    stop: int


Index = tuple[Runs, ...] | FlatRun
"""For each dim of the whole parameter the runs ``(start, stop)`` that a piece holds; or one flat run."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A rank's piece of a weight: of which parameter, which elements, and as what it is held."""

    name: str
    global_shape: tuple[int, ...]
    index: Index
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Holding:
    """One rank's piece of one parameter, without its values.

    Args:
        rank: who holds it.
        position: its place among this rank's holdings.
        name: the parameter's name in the whole model.
        global_shape: shape of the whole parameter.
        index: which elements of the parameter the weight is.
        has_other_weight: whether the weight's bits are not the reference's.
        dtype: dtype of the weight.
        trains: whether the parameter requires a gradient.
        gradient: digest of the gradient; `None` where there is none.
        gradient_dtype: its dtype.
        gradient_index: which elements the gradient is: more than the weight's where it is not cut as that.
        partial: this rank's coordinates on the axes over which the gradient says itself that it is partial.
        op: how those partial gradients are put together, ``"sum"`` or ``"avg"``.
        stale: whether the gradient has the bits that it had before this step.
        has_before: whether it is known what the gradient was before this step.
    """

    rank: int
    position: int
    name: str
    global_shape: tuple[int, ...]
    index: Index
    has_other_weight: bool
    dtype: torch.dtype
    trains: bool
    gradient: str | None
    gradient_dtype: torch.dtype | None
    gradient_index: Index
    partial: tuple[tuple[int, int], ...]
    op: str
    stale: bool
    has_before: bool


@dataclass(frozen=True, slots=True)
class Held:
    """A holding, and where its values are.

    Args:
        holding: the description that travels.
        gradient: the local gradient; `None` where there is none.
        before: a copy of the gradient as it was before this step; `None` where there was none, or zeros.
    """

    holding: Holding
    gradient: Tensor | None
    before: Tensor | None


def weights_held(target: Target, layout: Layout) -> list[Weight]:
    """The pieces of weights that this rank holds, those without elements left out. Local."""
    with kernels.plain_operators(), torch.no_grad():
        shards = shards_of(named_tensors(target), Source.GRADIENT, target=target, layout=layout)
        return [_weight_of(shard) for shard in shards if shard.numel]


def _weight_of(shard: GradShard) -> Weight:
    weight = shard.witness()
    return Weight(shard.name, shard.global_shape, index_of(shard), tuple(weight.shape), weight.dtype)


def read_holdings(
    rank: int,
    target: Target,
    layout: Layout,
    before: Mapping[str, Tensor] = MappingProxyType({}),
    digests: Mapping[Weight, str | None] | None = None,
) -> list[Held]:
    """Describe all that this rank holds. Local.

    Args:
        rank: this rank's number in its group.
        target: the model, or its parts.
        layout: what the caller says of names, pieces and gradients.
        before: copies of the gradients as they were before the step, by name.
        digests: of the reference's pieces of the weights; `None` where weights aren't compared.

    Raises:
        UnsupportedGradientError: a gradient can't be read.
        DistnormError: weights are cut otherwise than those that have digests.
    """
    with kernels.plain_operators(), torch.no_grad():
        shards = shards_of(named_tensors(target), Source.GRADIENT, target=target, layout=layout)
        return [_held(rank, i, shard, before, digests) for i, shard in enumerate(shards)]


def remember_gradients(target: Target, layout: Layout) -> dict[str, Tensor]:
    """Copy the gradients that are there before a step, zeros left out. Local."""
    found: dict[str, Tensor] = {}
    with kernels.plain_operators(), torch.no_grad():
        for shard in shards_of(named_tensors(target), Source.GRADIENT, target=target, layout=layout):
            if (
                shard.place is None and shard.holder.grad is None
            ):  # asked first: reading may refuse what isn't there yet
                continue
            reading = shard.read()
            local = reading.tensor if isinstance(reading, PartialGrad) else reading
            if local is not None and bool(local.any()):
                found[shard.name] = local.detach().clone()
    return found


def _held(
    rank: int,
    position: int,
    shard: GradShard,
    before: Mapping[str, Tensor],
    digests: Mapping[Weight, str | None] | None,
) -> Held:
    reading = shard.read()
    whole, op = shard, "sum"
    partial: tuple[tuple[int, int], ...] = ()
    if isinstance(reading, PartialGrad):
        partial = tuple((axis, shard.axis_index(axis)) for axis in reading.axes)
        op, whole = reading.op, _uncut(shard, reading.wide)
        reading = reading.tensor
    old = before.get(shard.name)
    same = old is not None and reading is not None and torch.equal(old, reading)
    if old is not None and (reading is None or old.shape != reading.shape):
        old = None
    holding = Holding(
        rank,
        position,
        shard.name,
        shard.global_shape,
        index_of(shard),
        digests is not None and shard.numel > 0 and _is_other(shard, digests),
        shard.witness().dtype,
        shard.holder.requires_grad,
        None if reading is None else digest(reading),
        None if reading is None else reading.dtype,
        index_of(whole),
        partial,
        op,
        same,
        old is not None,
    )
    return Held(holding, None if reading is None else reading.detach(), old)


def _is_other(shard: GradShard, digests: Mapping[Weight, str | None]) -> bool:
    piece = _weight_of(shard)
    if piece not in digests:
        raise DistnormError(
            f"parameter '{shard.name}': expected the piece {show(piece.index)} of {piece.dtype} to be there "
            "before the step too, found another one then; make the model as it is used first"
        )
    return digests[piece] is not None and digests[piece] != digest(shard.witness())


def _uncut(shard: GradShard, wide: Sequence[int]) -> GradShard:
    if not wide:
        return shard
    from torch.distributed.tensor import Replicate

    from distnorm.sources import dtensor

    assert isinstance(shard, dtensor.DTensorShard)  # the only source whose gradients may be wide
    placements = tuple(Replicate() if axis in wide else p for axis, p in enumerate(shard.placements))
    return replace(shard, placements=placements, shape=shard.wide_shape(tuple(wide)))


def index_of(shard: GradShard) -> Index:
    """Which elements of the parameter a shard holds."""
    if shard.is_flat or len(shard.piece) != len(shard.global_shape):
        run = shard.piece[0] if shard.piece else (0, 0)
        assert isinstance(run, tuple)
        return FlatRun(*run)
    return tuple(_runs(shard, dim) for dim in range(len(shard.global_shape)))


def _runs(shard: GradShard, dim: int) -> Runs:
    held = shard.indices(dim)
    if not len(held):
        return ()
    breaks = (held.diff() != 1).nonzero().flatten() + 1
    starts, stops = [0, *breaks.tolist()], [*breaks.tolist(), len(held)]
    return tuple((int(held[a]), int(held[b - 1]) + 1) for a, b in zip(starts, stops, strict=True))


def select(whole: Tensor, index: Index) -> Tensor:
    """A whole parameter's elements at an index, as a view where that can be."""
    if isinstance(index, FlatRun):
        return whole.reshape(-1)[index.start : index.stop]
    piece = whole
    for dim, runs in enumerate(index):
        parts = [piece.narrow(dim, low, high - low) for low, high in runs]
        piece = parts[0] if len(parts) == 1 else torch.cat(parts, dim) if parts else piece.narrow(dim, 0, 0)
    return piece


def count(index: Index) -> int:
    """Number of elements at an index."""
    if isinstance(index, FlatRun):
        return index.stop - index.start
    return math.prod(sum(high - low for low, high in runs) for runs in index)


def show(index: Index) -> str:
    """Write a piece as one writes an index: ``[0:4, 8:16]``."""
    if isinstance(index, FlatRun):
        return f"elements {index.start}:{index.stop}"
    return "[" + ", ".join("+".join(f"{a}:{b}" for a, b in runs) or "none" for runs in index) + "]"
