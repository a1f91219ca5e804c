"""Gradients that arrive as partial sums: agreed on when they first appear, then reduced in one collective a
step.

Tensor parallel with `SequenceParallel` leaves the gradients of replicated parameters ``Partial(sum)``.
Whether a rank takes part in their reduction can't depend on which gradients it happens to have in a
step, or a rank without them would leave the others waiting. So whenever a gradient is partial for the
first time, the ranks agree which shards may be partial; from then on the buffer has that length on every
rank.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distnorm import kernels
from distnorm.errors import CoverageError
from distnorm.plan.collectives import Ranks, ranks_of, reduce_partial_
from distnorm.plan.join import join
from distnorm.plan.plan import identity_rows, piece_groups, raise_named, spread
from distnorm.plan.terms import stable_hash
from distnorm.sources.shards import GradShard, PartialGrad, Reading

_MISSING, _COMPLETE = 1, 2
_AXIS_BIT, _MOST_AXES = 2, 16
_WIDE_BIT = _AXIS_BIT + _MOST_AXES
_DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128, torch.complex64

Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""The mesh axes over which a gradient is partial, and those along which it arrives uncut, though its
parameter is sharded there."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Shards whose gradients are reduced in one collective, on whichever meshes over the same ranks.

    Args:
        layouts: by the position of a shard, in the same order on every rank of the groups.
        groups: over which they are reduced, one after the other.
        dtype: of the gradients, and of the sum.
    """

    layouts: Mapping[int, Layout]
    groups: tuple[ProcessGroup, ...]
    dtype: torch.dtype

    def takes(self, i: int, arrived: PartialGrad) -> bool:
        """Whether this partial gradient of a shard is what was agreed on."""
        if i not in self.layouts or arrived.tensor.dtype != self.dtype:
            return False
        axes, wide = self.layouts[i]
        return set(arrived.axes) <= set(axes) and arrived.wide == wide

    def reduce(self, shards: Sequence[GradShard], readings: list[Reading], *, store: bool) -> None:
        """Replace this batch's readings by the reduced gradients, and store them if asked to.

        A rank without one of the gradients adds zeros, and counts its share of the sum all the same. It
        is not given the gradient: it can't know whether any rank had one.
        """
        shapes = [shards[i].wide_shape(wide) for i, (_, wide) in self.layouts.items()]
        sizes = [math.prod(shape) for shape in shapes]
        device = next(shards[i].local_device for i in self.layouts)
        buffer = torch.zeros(sum(sizes), dtype=self.dtype, device=device)
        slots = torch.split(buffer, sizes)
        for i, slot in zip(self.layouts, slots, strict=True):
            self._add(slot, i, shards[i], readings[i])
        reduce_partial_(buffer, self.groups)
        for i, slot, shape in zip(self.layouts, slots, shapes, strict=True):
            arrived = readings[i]
            if isinstance(arrived, Tensor) or (arrived is not None and not self.takes(i, arrived)):
                continue
            wide = self.layouts[i][1]
            reduced = shards[i].narrowed(slot.view(shape), wide)
            if store and arrived is not None:
                is_kept = not wide and _can_be_written(arrived.tensor)
                reduced = arrived.tensor.copy_(reduced) if is_kept else reduced.clone()
                shards[i].store(reduced)
            readings[i] = reduced

    def _add(self, slot: Tensor, i: int, shard: GradShard, arrived: Reading) -> None:
        axes, wide = self.layouts[i]
        if arrived is None or (wide and isinstance(arrived, Tensor)):
            return
        partial = arrived if isinstance(arrived, PartialGrad) else PartialGrad(arrived, (), "sum", wide)
        if not self.takes(i, partial):
            return
        if any(shard.axis_index(axis) for axis in axes if axis not in partial.axes):
            return  # complete along that axis: its first rank alone adds it
        slot.copy_(partial.tensor.reshape(-1))
        if partial.op == "avg":
            slot.div_(math.prod(shard.axis_group(axis).size() for axis in partial.axes))


def _can_be_written(tensor: Tensor) -> bool:
    """Whether values can be copied into it, one for each element."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return False
    try:
        return kernels.memory_of(tensor).numel() == tensor.numel()
    except ValueError:
        return False


def misfit(arrived: PartialGrad) -> str | None:
    """Why a partial gradient can't be reduced, if it can't."""
    if not arrived.axes or arrived.tensor.dtype in _DTYPES:
        return None
    return f"expected a dtype that can be added up, found Partial of {arrived.tensor.dtype}"


def is_agreed(batches: Sequence[Batch], i: int, reading: Reading) -> bool:
    """Whether the ranks have agreed to reduce this reading, if it has to be."""
    if not isinstance(reading, PartialGrad) or not reading.axes or not reading.tensor.numel():
        return True
    return any(batch.takes(i, reading) for batch in batches)


def agree_on_partials(
    ranks: Ranks, shards: Sequence[GradShard], readings: Sequence[Reading], batches: Sequence[Batch] = ()
) -> tuple[Batch, ...] | None:
    """Agree which shards may hold partial gradients. Collective: every rank must call it.

    Args:
        ranks: who takes part.
        shards: what this rank holds.
        readings: this step's gradients.
        batches: what was agreed on before, which stays.

    Returns:
        The batches, or `None` if no rank has any gradient yet: then it has to be called again.

    Raises:
        CoverageError: ranks of one mesh axis hold different sets of partial gradients.
    """
    with kernels.plain_operators():
        before = {i: (layout, batch.dtype) for batch in batches for i, layout in batch.layouts.items()}
        identities = identity_rows(shards)
        facts = [_facts(shard, readings[i], before.get(i)) for i, shard in enumerate(shards)]
        own = torch.tensor(facts, dtype=torch.int64, device="cpu").view(-1, 2)
        merged = join(ranks, torch.cat([identities, own], dim=1), _merge).tolist()
        any_gradient, any_partial = ranks.any(
            any(flags > _MISSING for flags, _ in merged), any(flags >> _AXIS_BIT for flags, _ in merged)
        )
        if not any_gradient:
            return None
        agreed = _batches(shards, merged, any_partial)
        _check_members(ranks, shards, agreed)
        return agreed


def _facts(shard: GradShard, reading: Reading, before: tuple[Layout, torch.dtype] | None) -> tuple[int, int]:
    """Flags of how a gradient arrived and of what was agreed on, and its dtype as a number."""
    flags, dtype = 0, shard.holder.dtype
    if before is not None:
        (axes, wide), dtype = before
        flags |= _layout_flags(axes, wide)
    if isinstance(reading, PartialGrad) and reading.axes and reading.tensor.numel():
        flags |= _layout_flags(reading.axes, reading.wide)
        dtype = reading.tensor.dtype
    elif shard.numel:
        flags |= _MISSING if reading is None else _COMPLETE
    return flags, _DTYPES.index(dtype) if dtype in _DTYPES else len(_DTYPES)


def _layout_flags(axes: Sequence[int], wide: Sequence[int]) -> int:
    return sum(1 << (_AXIS_BIT + axis) for axis in axes) + sum(1 << (_WIDE_BIT + axis) for axis in wide)


def _merge(rows: Tensor) -> Tensor:
    """[m, (name, piece, flags, dtype)] -> [m, (flags of all replicas, dtype of those that are partial)]."""
    of, count = piece_groups(rows)
    names, name_of = torch.unique(rows[:, 0], return_inverse=True)
    # Whether a gradient is there is a matter of each piece; how it is laid out, of the parameter.
    presence = _or(rows[:, 2] & (_MISSING | _COMPLETE), of, count)
    layout = _or(rows[:, 2] >> _AXIS_BIT << _AXIS_BIT, name_of, len(names))
    is_partial = rows[:, 2] >> _AXIS_BIT > 0
    dtypes = torch.full((len(names),), -1, dtype=torch.int64, device="cpu")
    dtypes.scatter_reduce_(0, name_of, torch.where(is_partial, rows[:, 3], -1), "amax")
    dtype = torch.where(dtypes[name_of] < 0, rows[:, 3], dtypes[name_of])
    return torch.stack([presence[of] | layout[name_of], dtype], dim=1)


def _or(flags: Tensor, group_of: Tensor, groups: int) -> Tensor:
    """The bitwise or of each group's flags."""
    merged = torch.zeros(groups, dtype=torch.int64, device="cpu")
    for bit in range(_WIDE_BIT + _MOST_AXES):
        merged |= torch.zeros_like(merged).scatter_reduce_(0, group_of, (flags >> bit) & 1, "amax") << bit
    return merged


def _batches(
    shards: Sequence[GradShard], merged: Sequence[Sequence[int]], any_partial: bool
) -> tuple[Batch, ...]:
    """Group what may be partial: what is on some rank, and, in a model that has partial gradients, what
    no rank has a gradient of yet."""
    layouts: dict[int, Layout] = {}
    for i, (shard, (flags, dtype)) in enumerate(zip(shards, merged, strict=True)):
        axes = tuple(axis for axis in shard.mesh_axes if flags >> _AXIS_BIT >> axis & 1)
        wide = tuple(axis for axis in shard.mesh_axes if flags >> _WIDE_BIT >> axis & 1)
        if any_partial and flags == _MISSING and shard.holder.requires_grad:
            axes = shard.replicated_axes
        if axes and all(shard.wide_shape(wide)) and dtype < len(_DTYPES):
            layouts[i] = axes, wide
    grouped: dict[object, dict[int, Layout]] = defaultdict(dict)
    groups: dict[object, tuple[ProcessGroup, ...]] = {}
    dtypes: dict[object, torch.dtype] = {}
    for i in sorted(layouts, key=lambda i: shards[i].name):
        over = tuple(shards[i].axis_group(axis) for axis in layouts[i][0])
        added = _DTYPES[merged[i][1]]
        # Groups of the same ranks are one, whichever mesh made them.
        key = tuple(map(ranks_of, over)), added, shards[i].local_device.type
        grouped[key][i] = layouts[i]
        groups.setdefault(key, over)
        dtypes[key] = added
    return tuple(Batch(members, groups[key], dtypes[key]) for key, members in grouped.items())


def _check_members(ranks: Ranks, shards: Sequence[GradShard], batches: Sequence[Batch]) -> None:
    """All ranks of a group must reduce the same gradients, or the reduction would hang or mix them."""
    rows, facts = [], []
    for batch in batches:
        held = [(shards[i].name, shards[i].wide_shape(wide)) for i, (_, wide) in batch.layouts.items()]
        first = shards[next(iter(batch.layouts))].name
        for place, group in enumerate(batch.groups):
            meeting = (ranks_of(group), place, len(batch.groups), batch.dtype)
            rows.append([stable_hash(repr(meeting)), stable_hash(repr(held)), group.size()])
            facts.append((first, f"{len(held)} partial gradients from this one on"))
    mine = torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 3)
    wrong = join(ranks, mine, _unequal_members).view(-1).tolist()
    raise_named(
        ranks,
        [fact for fact, bad in zip(facts, wrong, strict=True) if bad],
        CoverageError,
        "the same partial gradients on all ranks of a mesh axis",
        "Give every rank of a tensor-parallel group the same parameters, and a group that holds them all.",
    )


def _unequal_members(rows: Tensor) -> Tensor:
    """[m, (meeting, members, ranks expected)] -> [m, 1]: whether a rank is missing or has other members."""
    meetings, of, came = torch.unique(rows[:, 0], return_inverse=True, return_counts=True)
    wrong = (spread(rows[:, 1], of, len(meetings)) != 0)[of]
    wrong |= came[of] != rows[:, 2]
    return wrong.long().view(-1, 1)
