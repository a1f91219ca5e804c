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

from distnorm.collectives import Ranks, reduce_partial_
from distnorm.errors import CoverageError, ReplicaError
from distnorm.norms import norm
from distnorm.plan import Share, identity_rows, piece_groups, raise_named, spread, stable_hash
from distnorm.shards import GradShard, PartialGrad

Reading = Tensor | PartialGrad | None
"""A local gradient as it was found, or `None` where this rank has none in this step."""

_MISSING, _COMPLETE = 1, 2
_AXIS_BIT, _MOST_AXES = 2, 16


@dataclass(frozen=True, slots=True)
class Batch:
    """Shards whose gradients are reduced in one collective.

    Args:
        members: positions of the shards, in the same order on every rank of the axes' groups.
        axes: the mesh axes to reduce over.
    """

    members: tuple[int, ...]
    axes: tuple[int, ...]

    def reduce(self, shards: Sequence[GradShard], readings: list[Reading], *, store: bool) -> None:
        """Replace this batch's readings by the reduced gradients, and store them if asked to.

        A rank without one of the gradients adds zeros, and counts its share of the sum all the same. It
        is not given the gradient: nobody can tell from here whether any rank had one.
        """
        first = shards[self.members[0]]
        like = first.witness()
        sizes = [shards[i].numel for i in self.members]
        buffer = torch.zeros(sum(sizes), dtype=like.dtype, device=like.device)
        slots = torch.split(buffer, sizes)
        for i, slot in zip(self.members, slots, strict=True):
            self._add(slot, shards[i], readings[i])
        reduce_partial_(buffer, [first.axis_group(axis) for axis in self.axes])
        for i, slot in zip(self.members, slots, strict=True):
            arrived, reduced = readings[i], slot.view(shards[i].shape)
            if isinstance(arrived, Tensor) or self._goes_too_far(arrived):
                continue
            if store and arrived is not None:
                reduced = arrived.tensor.copy_(reduced)
                shards[i].store(reduced)
            readings[i] = reduced

    def _add(self, slot: Tensor, shard: GradShard, arrived: Reading) -> None:
        if arrived is None or self._goes_too_far(arrived):
            return
        partial = arrived if isinstance(arrived, PartialGrad) else PartialGrad(arrived, (), "sum")
        if any(shard.axis_index(axis) for axis in self.axes if axis not in partial.axes):
            return  # complete along that axis: its first rank alone adds it
        slot.copy_(partial.tensor.reshape(-1))
        if partial.op == "avg":
            slot.div_(math.prod(shard.axis_group(axis).size() for axis in partial.axes))

    def _goes_too_far(self, arrived: Reading) -> bool:
        """Whether a gradient is partial over axes that nobody agreed on; it stays as it is, for refusal."""
        return isinstance(arrived, PartialGrad) and not set(arrived.axes) <= set(self.axes)


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
    flags = [_flags(r) if s.numel else 0 for s, r in zip(shards, readings, strict=True)]
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


def _flags(reading: Reading) -> int:
    if reading is None:
        return _MISSING
    if isinstance(reading, Tensor):
        return _COMPLETE
    return sum(1 << (_AXIS_BIT + axis) for axis in reading.axes)


def _merge(rows: Tensor) -> Tensor:
    """[m, (name, piece, flags, norm, tolerance)] -> [m, (flags of all replicas, whether they differ)]."""
    of, count = piece_groups(rows)
    flags = torch.zeros(count, dtype=torch.int64)
    for bit in range(_AXIS_BIT + _MOST_AXES):
        has_bit = (rows[:, 2] >> bit) & 1
        flags |= flags.new_zeros(count).scatter_reduce_(0, of, has_bit, "amax") << bit
    values, tolerance = rows[:, 3:].contiguous().view(torch.float64).unbind(1)
    known = values.isfinite()
    differs = torch.zeros(count, dtype=torch.bool)
    if known.any():
        most = values.new_zeros(count).scatter_reduce_(0, of[known], values[known], "amax")
        allowed = most * tolerance.new_zeros(count).scatter_reduce_(0, of[known], tolerance[known], "amax")
        differs |= spread(values[known], of[known], count) > allowed
    some_only = (flags & (_MISSING | _COMPLETE)) == (_MISSING | _COMPLETE)
    differs |= some_only & (flags >> _AXIS_BIT == 0)
    return torch.stack([flags, differs.long()], dim=1)[of]


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
    axes_of: dict[int, tuple[int, ...]] = {}
    for i, (shard, flag) in enumerate(zip(shards, flags, strict=True)):
        axes = tuple(axis for axis in range(_MOST_AXES) if flag >> _AXIS_BIT >> axis & 1)
        if any_partial and flag == _MISSING and shard.holder.requires_grad:
            axes = shard.replicated_axes
        if axes and shard.numel:
            axes_of[i] = axes
    for i in sorted(axes_of, key=lambda i: shards[i].name):
        like = shards[i].witness()
        groups = tuple(id(shards[i].axis_group(axis)) for axis in axes_of[i])
        grouped[groups, like.dtype, like.device].append(i)
    return tuple(Batch(tuple(members), axes_of[members[0]]) for members in grouped.values())


def _check_members(ranks: Ranks, shards: Sequence[GradShard], batches: Sequence[Batch]) -> None:
    """All ranks of an axis must reduce the same gradients, or the reduction would hang or mix them."""
    rows, facts = [], []
    for batch in batches:
        first, held = shards[batch.members[0]], [(shards[i].name, shards[i].shape) for i in batch.members]
        for axis in batch.axes:
            group = first.axis_group(axis)
            meeting = (dist.get_process_group_ranks(group), batch.axes, first.witness().dtype)
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
