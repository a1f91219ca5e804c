"""Gradients that arrive as partial sums: agreed on once, then reduced in one collective a step.

Tensor parallel with `SequenceParallel` leaves the gradients of replicated parameters ``Partial(sum)``.
Whether a rank takes part in their reduction can't depend on which gradients it happens to have in a
step, or a rank without them would leave the others waiting. So the ranks agree, when gradients are
first seen, which shards may be partial; from then on the buffer has that length on every rank.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distnorm.errors import CoverageError, ReplicaError
from distnorm.measure.norms import norm
from distnorm.measure.readings import Reading
from distnorm.plan.collectives import Ranks, reduce_partial_
from distnorm.plan.plan import Share, identity_rows, piece_groups, raise_named, spread, stable_hash
from distnorm.sources.shards import GradShard, PartialGrad

_MISSING, _COMPLETE = 1, 2
_AXIS_BIT, _MOST_AXES = 2, 16
_WIDE_BIT = _AXIS_BIT + _MOST_AXES


@dataclass(frozen=True, slots=True)
class Batch:
    """Shards whose gradients are reduced in one collective.

    Args:
        members: positions of the shards, in the same order on every rank of the axes' groups.
        axes: the mesh axes to reduce over.
        wide: the mesh axes along which these gradients arrive uncut, though their parameters are sharded.
    """

    members: tuple[int, ...]
    axes: tuple[int, ...]
    wide: tuple[int, ...]

    def reduce(self, shards: Sequence[GradShard], readings: list[Reading], *, store: bool) -> None:
        """Replace this batch's readings by the reduced gradients, and store them if asked to.

        A rank without one of the gradients adds zeros, and counts its share of the sum all the same. It
        is not given the gradient: nobody can tell from here whether any rank had one.
        """
        first = shards[self.members[0]]
        like = first.witness()
        shapes = [shards[i].wide_shape(self.wide) for i in self.members]
        sizes = [math.prod(shape) for shape in shapes]
        buffer = torch.zeros(sum(sizes), dtype=like.dtype, device=like.device)
        slots = torch.split(buffer, sizes)
        for i, slot in zip(self.members, slots, strict=True):
            self._add(slot, shards[i], readings[i])
        reduce_partial_(buffer, [first.axis_group(axis) for axis in self.axes])
        for i, slot, shape in zip(self.members, slots, shapes, strict=True):
            arrived = readings[i]
            if isinstance(arrived, Tensor) or self._goes_too_far(arrived):
                continue
            reduced = shards[i].narrowed(slot.view(shape), self.wide)
            if store and arrived is not None:
                reduced = reduced.clone() if self.wide else arrived.tensor.copy_(reduced)
                shards[i].store(reduced)
            readings[i] = reduced

    def _add(self, slot: Tensor, shard: GradShard, arrived: Reading) -> None:
        if arrived is None or self._goes_too_far(arrived) or (self.wide and isinstance(arrived, Tensor)):
            return
        partial = arrived if isinstance(arrived, PartialGrad) else PartialGrad(arrived, ())
        if any(shard.axis_index(axis) for axis in self.axes if axis not in partial.axes):
            return  # complete along that axis: its first rank alone adds it
        slot.copy_(partial.tensor.reshape(-1))
        if partial.op == "avg":
            slot.div_(math.prod(shard.axis_group(axis).size() for axis in partial.axes))

    def _goes_too_far(self, arrived: Reading) -> bool:
        """Whether a gradient is partial over axes that nobody agreed on; it stays as it is, for refusal."""
        return isinstance(arrived, PartialGrad) and (
            not set(arrived.axes) <= set(self.axes) or arrived.wide != self.wide
        )


def agree_on_partials(
    ranks: Ranks, shares: Sequence[Share], shards: Sequence[GradShard], readings: Sequence[Reading]
) -> tuple[Batch, ...] | None:
    """Agree which shards may hold partial gradients, and that replicas hold the same gradient.

    Collective; called with the first gradients. Replicas may differ in the last bits (they may have
    computed the gradient each for itself), so their norms are compared to half of the dtype's digits.

    Returns:
        The batches, or `None` if no rank has any gradient yet: then it has to be called again.

    Raises:
        ReplicaError: replicas hold different gradients, or only some of them hold one.
        CoverageError: ranks of one mesh axis hold different sets of partial gradients.
    """
    identities = identity_rows(shards)
    norms = [
        _replica_norm(s, r, share.replicas) for s, r, share in zip(shards, readings, shares, strict=True)
    ]
    sizes = torch.tensor([[value, math.sqrt(tolerance)] for value, tolerance in norms], dtype=torch.float64)
    flags = [_flags(r, s.numel) for s, r in zip(shards, readings, strict=True)]
    flag_rows = torch.tensor(flags, dtype=torch.int64).view(-1, 1)
    rows = torch.cat([identities, flag_rows, sizes.view(-1, 2).view(torch.int64)], dim=1)
    replies = ranks.join(identities[:, 0], rows, _merge).tolist()
    _check_replicas(ranks, shards, readings, norms, [bool(differs) for _, differs in replies])
    merged = [flag for flag, _ in replies]
    seen = torch.tensor(
        [any(f > _MISSING for f in merged), any(f >> _AXIS_BIT for f in merged)], dtype=torch.int64
    )
    any_gradient, any_partial = ranks.all_reduce_(seen.to(ranks.device()), "max").tolist()
    if not any_gradient:
        return None
    batches = _batches(shards, merged, bool(any_partial))
    _check_members(ranks, shards, batches)
    return batches


def _replica_norm(shard: GradShard, reading: Reading, replicas: int) -> tuple[float, float]:
    """The L2 norm of a complete gradient that has replicas, and eps of its dtype; else NaN."""
    if replicas < 2 or not isinstance(reading, Tensor) or not reading.numel():
        return math.nan, 0.0
    l2 = norm(2)
    return float(l2.finalise(l2.statistic([reading], reading.device))), torch.finfo(reading.dtype).eps


def _flags(reading: Reading, numel: int) -> int:
    if isinstance(reading, PartialGrad) and reading.axes and reading.tensor.numel():
        axes = sum(1 << (_AXIS_BIT + axis) for axis in reading.axes)
        return axes + sum(1 << (_WIDE_BIT + axis) for axis in reading.wide)
    if not numel:
        return 0
    return _MISSING if reading is None else _COMPLETE


def _merge(rows: Tensor) -> Tensor:
    """[m, (name, piece, flags, norm, tolerance)] -> [m, (flags of all replicas, whether they differ)]."""
    of, count = piece_groups(rows)
    names, name_of = torch.unique(rows[:, 0], return_inverse=True)
    # Whether a gradient is there is a matter of each piece; how it is laid out, of the parameter.
    presence = _or(rows[:, 2] & (_MISSING | _COMPLETE), of, count)
    layout = _or(rows[:, 2] >> _AXIS_BIT << _AXIS_BIT, name_of, len(names))
    values, tolerance = rows[:, 3:].contiguous().view(torch.float64).unbind(1)
    known = values.isfinite()
    differs = torch.zeros(count, dtype=torch.bool)
    if known.any():
        most = values.new_zeros(count).scatter_reduce_(0, of[known], values[known], "amax")
        allowed = most * tolerance.new_zeros(count).scatter_reduce_(0, of[known], tolerance[known], "amax")
        differs |= spread(values[known], of[known], count) > allowed
    some_only = (presence == (_MISSING | _COMPLETE))[of] & (layout == 0)[name_of]
    return torch.stack([presence[of] | layout[name_of], (differs[of] | some_only).long()], dim=1)


def _or(flags: Tensor, group_of: Tensor, groups: int) -> Tensor:
    """The bitwise or of each group's flags."""
    merged = torch.zeros(groups, dtype=torch.int64)
    for bit in range(_WIDE_BIT + _MOST_AXES):
        merged |= torch.zeros_like(merged).scatter_reduce_(0, group_of, (flags >> bit) & 1, "amax") << bit
    return merged


def _check_replicas(
    ranks: Ranks,
    shards: Sequence[GradShard],
    readings: Sequence[Reading],
    norms: Sequence[tuple[float, float]],
    differs: Sequence[bool],
) -> None:
    facts = [
        (shard.name, "no gradient" if reading is None else f"a gradient of norm {value:.9g}")
        for shard, reading, (value, _), bad in zip(shards, readings, norms, differs, strict=True)
        if bad
    ]
    raise_named(
        ranks,
        facts,
        ReplicaError,
        "the same gradient on every replica",
        "Replicas' gradients must be reduced (by DDP, FSDP, or an all-reduce of your own) before they are "
        "measured; for parameters that are no replicas give whole-model names, or pp_mesh.",
    )


def _batches(shards: Sequence[GradShard], flags: Sequence[int], any_partial: bool) -> tuple[Batch, ...]:
    """Group what may be partial: what is on some rank, and, in a model that has partial gradients, what
    no rank has a gradient of yet."""
    grouped: dict[tuple[object, ...], list[int]] = defaultdict(list)
    layouts: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for i, (shard, flag) in enumerate(zip(shards, flags, strict=True)):
        axes = tuple(axis for axis in shard.mesh_axes if flag >> _AXIS_BIT >> axis & 1)
        wide = tuple(axis for axis in shard.mesh_axes if flag >> _WIDE_BIT >> axis & 1)
        if any_partial and flag == _MISSING and shard.holder.requires_grad:
            axes = shard.replicated_axes
        numel = math.prod(shard.wide_shape(wide))
        if axes and numel:
            layouts[i] = axes, wide
    for i in sorted(layouts, key=lambda i: shards[i].name):
        like = shards[i].witness()
        groups = tuple(id(shards[i].axis_group(axis)) for axis in layouts[i][0])
        grouped[groups, layouts[i], like.dtype, like.device].append(i)
    return tuple(Batch(tuple(members), *layouts[members[0]]) for members in grouped.values())


def _check_members(ranks: Ranks, shards: Sequence[GradShard], batches: Sequence[Batch]) -> None:
    """All ranks of an axis must reduce the same gradients, or the reduction would hang or mix them."""
    rows, facts = [], []
    for batch in batches:
        first = shards[batch.members[0]]
        held = [(shards[i].name, shards[i].wide_shape(batch.wide)) for i in batch.members]
        for axis in batch.axes:
            group = first.axis_group(axis)
            meeting = (dist.get_process_group_ranks(group), batch.axes, batch.wide, first.witness().dtype)
            rows.append([stable_hash(repr(meeting)), stable_hash(repr(held)), group.size()])
            facts.append((first.name, f"{len(held)} partial gradients from this one on"))
    mine = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
    wrong = ranks.join(mine[:, 0], mine, _unequal_members).view(-1).tolist()
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
