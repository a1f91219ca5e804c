"""Both sides' gradients meet, block by block: on the rank that has the reference's block.

Of replicas with the same bits one sends its own, and of the others their digests are known. What a rank finds
of its blocks goes, as sums, to the rank that the hash of the parameter's name chooses: that one judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isnan, prod
from typing import Any

import torch
from torch import Tensor

from distnorm.plan.collectives import Ranks
from distnorm.plan.terms import stable_hash
from distnorm.verification.doctor.blocks import Block, Overlap, overlap
from distnorm.verification.doctor.holdings import FlatRun, Held, Holding, Index, count, select
from distnorm.verification.doctor.posting import Want, deliver, pull
from distnorm.verification.doctor.reference import Reference

Bits = tuple[str | None, ...]
"""What ranks hold of a piece, by digests: of a gradient, of several summands, or of none."""


@dataclass(slots=True)
class Alike:
    """Ranks whose gradients of a piece, or the sums of whose partial ones, have the same bits.

    Args:
        ranks: who they are.
        summands: for each summand those that hold it; one for a gradient that is not partial.
        op: how summands are put together.
        stale: whether these are the bits of before the step.
    """

    ranks: tuple[int, ...]
    summands: list[list[Holding]]
    op: str
    stale: bool

    @property
    def bits(self) -> Bits:
        """By what they are known."""
        return tuple(holders[0].gradient for holders in self.summands)

    def put_together(self, values: Sequence[Tensor]) -> Tensor:
        """The value of its summands, in fp64 where there are several."""
        if len(values) == 1:
            return values[0]
        total = torch.stack([value.double() for value in values]).sum(0)
        return total / len(values) if self.op == "avg" else total


def pieces_held(holdings: Sequence[Holding]) -> dict[Index, list[Alike]]:
    """The pieces of one parameter's gradient, and who holds them alike."""
    groups: dict[Index, list[Holding]] = {}
    for holding in holdings:
        index = holding.index if holding.gradient is None else holding.gradient_index
        if count(index):
            groups.setdefault(index, []).append(holding)
    return {index: _alike(group) for index, group in groups.items()}


def _alike(holdings: Sequence[Holding]) -> list[Alike]:
    by_bits: dict[str | None, list[Holding]] = {}
    partial: dict[tuple[tuple[int, int], ...], list[Holding]] = {}
    for holding in holdings:
        if holding.partial:
            partial.setdefault(holding.partial, []).append(holding)
        else:
            by_bits.setdefault(holding.gradient, []).append(holding)
    found = [
        Alike(tuple(h.rank for h in theirs), [theirs], "sum", all(h.stale for h in theirs))
        for theirs in by_bits.values()
    ]
    sums: dict[Bits, Alike] = {}
    for summands in zip(*partial.values(), strict=False):  # by rank: one replica's summands after another's
        bits = tuple(summand.gradient for summand in summands)
        alike = sums.setdefault(bits, Alike((), [[] for _ in summands], summands[0].op, False))
        alike.ranks = tuple(sorted({*alike.ranks, *(summand.rank for summand in summands)}))
        for holders, summand in zip(alike.summands, summands, strict=True):
            holders.append(summand)
    return [*found, *sums.values()]


@dataclass(slots=True)
class Sums:
    """Of what ranks hold alike of a piece, ``v``, and the reference's, ``e``: sums over all elements.

    Args:
        ours: of ``v * v``.
        theirs: of ``e * e``.
        both: of ``v * e``.
        apart: of ``(v - e) ** 2``; infinite where that is not a number.
        worst: the largest part of `apart` that is one block's.
        block: that block.
    """

    ours: float = 0.0
    theirs: float = 0.0
    both: float = 0.0
    apart: float = 0.0
    worst: float = -1.0
    block: Block | None = None

    def add(self, other: Sums) -> None:
        """Add the sums over other elements."""
        self.ours += other.ours
        self.theirs += other.theirs
        self.both += other.both
        self.apart += other.apart
        if other.worst > self.worst:
            self.worst, self.block = other.worst, other.block

    @classmethod
    def of(cls, value: Tensor | None, expected: Tensor, block: Block) -> Sums:
        """The sums over one block; without a value, of zeros."""
        expected = expected.double()
        square = float((expected * expected).sum())
        if value is None:
            return cls(0.0, square, 0.0, square, square, block)
        value = value.reshape(expected.shape).double()
        ours, both = float((value * value).sum()), float((value * expected).sum())
        rest = value - expected
        apart = float((rest * rest).sum())
        apart = inf if isnan(apart) else apart
        return cls(ours, square, both, apart, apart, block)


Measured = dict[Index, dict[Bits, Sums]]


@dataclass(slots=True)
class Case:
    """One parameter with what is known of both sides of it, on the rank that judges it.

    Args:
        name: the parameter's name.
        holdings: every rank's piece of it, by rank.
        measured: by piece and by what ranks hold alike.
    """

    name: str
    holdings: list[Holding]
    measured: Measured = field(default_factory=dict)


def home_of(name: str, size: int) -> int:
    """The rank that judges a parameter."""
    return stable_hash(name) % size


def meet(ranks: Ranks, held: Sequence[Held], reference: Reference) -> list[Case]:
    """Bring both sides of every parameter together; returns those that this rank judges. Collective.

    Args:
        ranks: who takes part.
        held: what this rank holds.
        reference: the other side.
    """
    outgoing: list[list[Holding]] = [[] for _ in range(ranks.size)]
    for holding in (mine.holding for mine in held):
        owners = reference.spread.owners(holding.name) if holding.name in reference.known else ()
        for rank in {home_of(holding.name, ranks.size), *owners}:
            outgoing[rank].append(holding)
    by_name: dict[str, list[Holding]] = {}
    for holding in (holding for theirs in deliver(ranks, outgoing) for holding in theirs):
        by_name.setdefault(holding.name, []).append(holding)
    cases = {
        name: Case(name, by_name.get(name, []))
        for name in dict.fromkeys([*by_name, *reference.known])
        if home_of(name, ranks.size) == ranks.rank
    }
    mail: list[list[tuple[str, Index, Bits, Sums]]] = [[] for _ in range(ranks.size)]
    for (name, index, bits), sums in _measure(ranks, by_name, held, reference).items():
        mail[home_of(name, ranks.size)].append((name, index, bits, sums))
    for name, index, bits, sums in (row for rows in deliver(ranks, mail) for row in rows):
        cases[name].measured.setdefault(index, {}).setdefault(bits, Sums()).add(sums)
    return list(cases.values())


def comparable(holdings: Sequence[Holding], shape: tuple[int, ...]) -> bool:
    """Whether gradients can be compared at all: weights are alike in shape and bits."""
    return all(h.global_shape in (shape, (prod(shape),)) and not h.has_other_weight for h in holdings)


def _measure(
    ranks: Ranks, by_name: Mapping[str, Sequence[Holding]], held: Sequence[Held], reference: Reference
) -> dict[tuple[str, Index, Bits], Sums]:
    """Compare what all ranks hold of the blocks that this rank has."""
    wants: list[Want] = []
    items: list[tuple[str, Block, Index, Alike, Overlap]] = []
    pieces = {
        name: pieces_held(theirs)
        for name, theirs in by_name.items()
        if name in reference.known and comparable(theirs, reference.known[name].shape)
    }
    for name, block in reference.spread.blocks(ranks.rank):
        for index, alikes in pieces.get(name, {}).items():
            common = overlap(index, block, reference.known[name].shape)
            for alike in alikes if common is not None else ():
                assert common is not None
                items.append((name, block, index, alike, common))
                wants += wants_of(alike, index, block, common, ranks.rank)
    found: dict[tuple[str, Index, Bits], Sums] = {}
    values = pull(ranks, wants, lambda key: give(held, reference, key))
    for name, block, index, alike, common in items:
        value = value_of(alike, values)
        expected = select(reference.block(name, block), common.in_block)
        sums = Sums.of(value, expected, block)
        found.setdefault((name, index, alike.bits), Sums()).add(sums)
    for _ in values:  # the other ranks' rounds
        pass
    return found


def wants_of(alike: Alike, index: Index, block: Block, common: Overlap, rank: int) -> list[Want]:
    """What a rank has to ask for to get what is held alike of a block: its own, where it holds it."""
    wants = []
    for holders in alike.summands:
        holder = next((holder for holder in holders if holder.rank == rank), holders[0])
        if holder.gradient_dtype is not None:
            key = ("gradient", holder.position, index, block)
            wants.append(Want(holder.rank, key, common.shape, holder.gradient_dtype))
    return wants


def value_of(alike: Alike, values: Iterator[tuple[Want, Tensor]]) -> Tensor | None:
    """What is held alike, of what was asked for next; `None` where there is no gradient."""
    found = [next(values)[1] for bits in alike.bits if bits is not None]
    return alike.put_together(found) if found else None


def give(held: Sequence[Held], reference: Reference, key: Any) -> Tensor:
    """A tensor that another rank asks for: a block of what is held, or of the reference's gradient."""
    kind, *rest = key
    if kind == "expected":
        return reference.block(*rest)
    if kind == "part":
        part, name, block = rest
        found: Tensor = reference.parts[part][name, block]
        return found
    position, index, block = rest
    mine = held[position]
    tensor = mine.gradient if kind == "gradient" else mine.before
    known = reference.known[mine.holding.name]
    common = overlap(index, block, known.shape)
    assert tensor is not None and common is not None
    return select(tensor.reshape(_lengths(index)), common.in_piece)


def _lengths(index: Index) -> tuple[int, ...]:
    if isinstance(index, FlatRun):
        return (index.stop - index.start,)
    return tuple(sum(high - low for low, high in runs) for runs in index)
