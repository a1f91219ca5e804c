"""Who holds what: made once for a set of shards, by one exchange between the ranks.

Every rank publishes, for each of its shards, a hash of its identity (name and piece) and its number of
elements. Ranks that publish the same identity are replicas; the distinct pieces of one name must add up
to the parameter's number of elements. No rule about any mesh axis is needed.

The exchange is a distributed hash join: all rows of one name meet on one rank, which alone sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.errors import CoverageError, DistnormError, ReplicaError
from distnorm.plan.collectives import Ranks
from distnorm.plan.join import join
from distnorm.plan.terms import agree_on_terms, stable_hash
from distnorm.plan.wording import SHARDED, name_ranks, shown
from distnorm.sources.declared import DeclaredShard
from distnorm.sources.shards import Extent, GradShard, Source

_NAMED_IN_ERRORS = 3
_DOUBLE = (torch.float64, torch.complex128)


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank counts of one of its shards: elements ``start`` to ``stop`` of the flat shard.

    Args:
        start: first element, of the shard in logical (row-major) order.
        stop: end of the elements.
        replicas: number of shards of this identity over all ranks.
        index: which of them this one is.
        key: hash of the identity, the same on all ranks.
    """

    start: int
    stop: int
    replicas: int
    index: int
    key: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The shares of a set of shards, in their order.

    Args:
        shares: one for each shard.
        ident: the same number on all ranks, and another for another plan.
        has_replicas: whether some rank holds a shard that has replicas.
        is_double: whether some rank holds a tensor of float64 or complex128.
        has_declared: whether some rank holds a piece that the caller declared to be one.
    """

    shares: tuple[Share, ...]
    ident: int
    has_replicas: bool
    is_double: bool
    has_declared: bool


def make_plan(
    ranks: Ranks,
    shards: Sequence[GradShard],
    terms: Mapping[str, object],
    *,
    replicas_share: bool,
    check_names: Callable[[], None] | None = None,
) -> Plan:
    """Plan who counts what. Collective: every rank must call it.

    Args:
        ranks: who takes part.
        shards: what this rank holds.
        terms: what all ranks must have alike (threshold, norm type, tied names, ...), by name.
        replicas_share: whether replicas share the work of a shard, or each counts all of it.
        check_names: refuses names that nobody holds, when terms, which have them, are agreed on. Collective.

    Raises:
        DisagreementError: the terms differ between ranks; the term and the ranks are named.
        CoverageError: pieces of a parameter are missing, or overlap.
        ReplicaError: shards that claim to be replicas hold other parameter values.
    """
    with kernels.plain_operators():
        agree_on_terms(ranks, terms)
        if check_names is not None:
            check_names()
        return _make_plan(ranks, shards, terms, replicas_share)


def _make_plan(
    ranks: Ranks, shards: Sequence[GradShard], terms: Mapping[str, object], replicas_share: bool
) -> Plan:
    ranks.agree_on_device([shard.holder.device for shard in shards])
    rows = identity_rows(shards)
    numels = torch.tensor([s.numel for s in shards], dtype=torch.int64, device="cpu").view(-1, 1)
    replies = join(ranks, torch.cat([rows, numels], dim=1), _holders).tolist()
    if not ranks.is_simulated:
        _check_coverage(ranks, shards, replies)
    keys = (rows[:, 0] ^ rows[:, 1]).tolist()
    shares = []
    for shard, key, (replicas, index, _) in zip(shards, keys, replies, strict=True):
        if not shard.numel:  # nothing to count, nothing to claim
            replicas, index = 1, 0
        parts, which = (replicas, index) if replicas_share else (1, 0)
        start, stop = (shard.numel * i // parts for i in (which, which + 1))
        shares.append(Share(start, stop, replicas, index, key))
    has_replicas, is_double, has_declared = ranks.any(
        any(share.replicas > 1 for share in shares),
        any(shard.holder.dtype in _DOUBLE for shard in shards),
        any(isinstance(shard, DeclaredShard) for shard in shards),
    )
    if has_replicas:
        _check_values(ranks, shards, rows, shares)
    return Plan(tuple(shares), _ident(ranks, shards, terms), has_replicas, is_double, has_declared)


def identity_rows(shards: Sequence[GradShard]) -> Tensor:
    """Hashes of every shard's name and piece, [n, 2] int64."""
    rows = [[stable_hash(s.name), piece_hash(s.piece, s.global_shape, s.numel)] for s in shards]
    return torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 2)


def piece_hash(piece: tuple[Extent, ...], global_shape: tuple[int, ...], numel: int) -> int:
    """Hash of a piece of a parameter; pieces of no elements are all alike."""
    return stable_hash(repr((piece, global_shape)) if numel else "empty")


def _holders(rows: Tensor) -> Tensor:
    """[m, (name, piece, numel)] -> [m, (replicas, index, elements that all pieces of the name cover)]."""
    names, name_of = torch.unique(rows[:, 0], return_inverse=True)
    _, piece_of, replicas = torch.unique(rows[:, :2], dim=0, return_inverse=True, return_counts=True)
    order = piece_of.argsort(stable=True)
    first_row = replicas.cumsum(0) - replicas
    index = torch.empty_like(order)
    index[order] = torch.arange(len(rows), device=rows.device) - first_row[piece_of[order]]
    first = index == 0
    covered = torch.zeros_like(names).index_add_(0, name_of[first], rows[first, 2])
    return torch.stack([replicas[piece_of], index, covered[name_of]], dim=1)


def piece_groups(rows: Tensor) -> tuple[Tensor, int]:
    """Number the identities in rows that begin with (name, piece): [m] numbers, and how many there are."""
    identities, of = torch.unique(rows[:, :2], dim=0, return_inverse=True)
    return of, len(identities)


def spread(values: Tensor, group_of: Tensor, groups: int) -> Tensor:
    """The largest less the smallest value of each group."""
    most = values.new_zeros(groups).scatter_reduce_(0, group_of, values, "amax", include_self=False)
    least = values.new_zeros(groups).scatter_reduce_(0, group_of, values, "amin", include_self=False)
    return most - least


def _check_coverage(ranks: Ranks, shards: Sequence[GradShard], replies: list[list[int]]) -> None:
    # Ranks with unlike ideas of a parameter's size can't all find that it is covered.
    wrong = {
        shard.name: covered
        for shard, (_, _, covered) in zip(shards, replies, strict=True)
        if covered != shard.global_numel
    }

    def fact(shard: GradShard) -> str:
        covered, total = wrong[shard.name], shard.global_numel
        verdict = f"{total - covered} missing" if covered < total else f"{covered - total} counted twice"
        shape = list(shard.global_shape)
        return f"{covered} of {total} elements ({verdict}; shape {shape}) with {piece_of(shard)}"

    raise_named(
        ranks,
        [(shard.name, fact(shard)) for shard in shards if shard.name in wrong],
        CoverageError,
        "pieces that add up to its number of elements",
        "Give every rank all the pieces that it holds, a group of all the ranks that hold the model, and "
        "whole-model names (or pp_mesh, where stages use the same names for other parameters). Plain tensors "
        f"that are pieces of a parameter are declared by {SHARDED}.",
    )


def _check_values(ranks: Ranks, shards: Sequence[GradShard], rows: Tensor, shares: Sequence[Share]) -> None:
    """Check that shards of one identity are replicas, by the bits of the parameters.

    Frozen parameters are not read: they may be quantised, or have no values. If one gets a gradient, the
    gradients of its replicas are compared as in every step.
    """
    claims = [
        i
        for i, (shard, share) in enumerate(zip(shards, shares, strict=True))
        if share.replicas > 1 and shard.source is Source.GRADIENT and has_values(shard)
    ]
    sums = to_host([kernels.checksum(shards[i].witness()) for i in claims])
    values = torch.tensor(sums, dtype=torch.int64, device="cpu").view(-1, 1)
    mine = rows[claims]
    differs = join(ranks, torch.cat([mine, values], dim=1), differing).view(-1).tolist()
    facts = [
        (shards[i].name, f"checksum {value & 0xFFFFFFFFFFFFFFFF:016x} of {piece_of(shards[i])}")
        for i, value, bad in zip(claims, sums, differs, strict=True)
        if bad
    ]

    raise_named(
        ranks,
        facts,
        ReplicaError,
        "replicas with the same values",
        "Ranks that hold the same name and piece are taken for replicas. If these are other parameters, "
        f"give them whole-model names, or pp_mesh; if they are pieces of one, declare them by {SHARDED}; if "
        "they are replicas, they have drifted apart.",
    )


def has_values(shard: GradShard) -> bool:
    """Whether the parameter is trained, and has values that can be compared by their bits."""
    holder = shard.holder
    return holder.requires_grad and not holder.is_meta and type(shard.witness()) in kernels.PLAIN


def differing(rows: Tensor) -> Tensor:
    """[m, (name, piece, value)] -> [m, 1]: whether rows of one identity have other values."""
    of, count = piece_groups(rows)
    low, high = rows[:, 2] & 0xFFFFFFFF, rows[:, 2] >> 32  # halves, whose differences can't overflow
    differs = (spread(low, of, count) != 0) | (spread(high, of, count) != 0)
    return differs[of].long().view(-1, 1)


def raise_named(
    ranks: Ranks,
    facts: Sequence[tuple[str, str]],
    kind: type[DistnormError],
    expected: str,
    advice: str,
) -> None:
    """Raise one error on every rank if any rank has facts, as (parameter, what was found). Collective."""
    lines = described(ranks, facts, expected)
    if lines:
        raise kind("\n".join([*lines, advice]))


def described(ranks: Ranks, facts: Sequence[tuple[str, str]], expected: str) -> list[str]:
    """A line for each of the first parameters that a rank has facts of; the same on all ranks. Collective."""
    if not ranks.any(bool(facts))[0]:
        return []
    by_name: dict[str, dict[str, list[int]]] = {}
    shortened = [
        [ranks.shortened(text, 2 * _NAMED_IN_ERRORS) for text in fact] for fact in facts[:_NAMED_IN_ERRORS]
    ]
    for rank, theirs in enumerate(ranks.gather(shortened)):
        for name, fact in theirs:
            by_name.setdefault(name, {}).setdefault(fact, []).append(rank)
    return [
        f"parameter '{name}': expected {expected}, found "
        + "; ".join(shown([f"{fact} on {name_ranks(who)}" for fact, who in by_name[name].items()]))
        for name in sorted(by_name)[:_NAMED_IN_ERRORS]
    ]


def to_host(scalars: Sequence[Tensor]) -> list[int]:
    """Read 0-d int64 tensors of any devices with one copy a device."""
    values: list[int] = [0] * len(scalars)
    for device in {scalar.device for scalar in scalars}:
        here = [i for i, scalar in enumerate(scalars) if scalar.device == device]
        for i, value in zip(here, torch.stack([scalars[i] for i in here]).tolist(), strict=True):
            values[i] = value
    return values


def _ident(ranks: Ranks, shards: Sequence[GradShard], terms: Mapping[str, object]) -> int:
    mine = stable_hash(repr([(s.name, s.piece, s.global_shape) for s in shards] + sorted(terms.items())))
    total = torch.tensor([mine >> 20], dtype=torch.int64, device=ranks.device())
    return int(ranks.all_reduce_(total, "sum").item())


def piece_of(shard: GradShard) -> str:
    """Which piece it is, for errors."""
    extents = (f"{e[0]}:{e[1]}" if isinstance(e, tuple) else e for e in shard.piece)
    return f"[{', '.join(extents)}]"
