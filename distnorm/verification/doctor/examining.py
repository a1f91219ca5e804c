"""What of a wrong gradient is fetched to explain it, one parameter at a time.

Small parameters are fetched whole. Of large ones it is, of each piece, the block in which it differs most:
a sum that is missing, or a factor, shows in any block. What no block explains is fetched whole after all, if
that fits into memory beside the blocks of the reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from distnorm.plan.collectives import Ranks
from distnorm.verification.doctor.blocks import Block, cut, overlap, shape_of, whole_block
from distnorm.verification.doctor.explaining import Copy, Piece
from distnorm.verification.doctor.holdings import Held, Index, select
from distnorm.verification.doctor.meeting import Alike, Case, give, pieces_held, value_of, wants_of
from distnorm.verification.doctor.posting import Want, pull
from distnorm.verification.doctor.reference import Reference

WHOLE = 1 << 18
"""Elements, at most, of a parameter that is fetched whole."""
LATER = 1 << 20
"""Elements, at most, of one that is fetched whole where no block explains it, if ranks hold less each."""
_BLOCKS = 16  # of a larger one that are fetched
_COPIES = 20  # elements of fp32 that an element takes while a whole parameter is explained, and some to spare


def is_large(shape: tuple[int, ...]) -> bool:
    """Whether some blocks of a parameter stand for it."""
    return prod(shape) > WHOLE


def note_on_large() -> str:
    """What has to be said of large parameters that are wrong."""
    return (
        f"parameters of more than {WHOLE:,} elements are explained by the block of each piece in which it "
        "differs most"
    )


def fits_whole(shape: tuple[int, ...], reference: Reference) -> bool:
    """Whether a large parameter can be explained whole in as much memory as a rank's part of the model."""
    total = sum(prod(known.shape) for known in reference.known.values())
    return prod(shape) <= max(LATER, total // reference.size // _COPIES)


def to_fetch(
    ranks: Ranks, reference: Reference, cases: Mapping[str, Case], names: Sequence[str]
) -> dict[str, list[Block]]:
    """The blocks of wrong parameters that `examine` fetches at first. Collective.

    Args:
        ranks: who takes part.
        reference: the other side.
        cases: those that this rank judges, by name.
        names: of the wrong ones of all ranks.
    """
    mine = {}
    for name in (name for name in names if name in cases):
        shape = reference.known[name].shape
        mine[name] = _blocks(shape, [region for _, region, _ in _regions(cases[name], shape, False)])
    found: dict[str, list[Block]] = {}
    for theirs in ranks.gather(mine):
        found |= theirs
    return {name: found[name] for name in names}


def _blocks(shape: tuple[int, ...], regions: Iterable[Block]) -> list[Block]:
    """The reference's blocks that make up the regions."""
    wholes = set(regions)
    return list(cut(shape)) if wholes == {whole_block(shape)} else sorted(wholes)


def examine(
    ranks: Ranks,
    held: Sequence[Held],
    reference: Reference,
    cases: Mapping[str, Case],
    names: Sequence[str],
    whole: bool,
) -> Iterator[tuple[Case, list[Piece]]]:
    """Fetch what explains wrong gradients. Collective: every rank must use up the iterator.

    Args:
        ranks: who takes part.
        held: what this rank holds.
        reference: the other side.
        cases: those that this rank judges, by name.
        names: of the wrong ones of all ranks.
        whole: whether large ones are fetched whole too.
    """
    mine = [cases[name] for name in names if name in cases]
    for turn in range(max(ranks.gather(len(mine)))):
        examined = _Examined(mine[turn], reference, ranks, whole) if turn < len(mine) else None
        wants = [] if examined is None else examined.wants
        values = pull(ranks, wants, lambda key: give(held, reference, key))
        if examined is not None:
            yield mine[turn], examined.pieces(values)
        for _ in values:  # the other ranks' rounds
            pass


class _Examined:
    """What is fetched of one parameter, and how its pieces are put together."""

    def __init__(self, case: Case, reference: Reference, ranks: Ranks, whole: bool) -> None:
        known = reference.known[case.name]
        self._shape, self._dtype = known.shape, known.gradient or known.dtype
        self._regions: list[tuple[Index, Block, list[Alike]]] = _regions(case, self._shape, whole)
        self._parts = [i for i, names in enumerate(reference.part_names) if case.name in names]
        self._blocks = _blocks(self._shape, (region for _, region, _ in self._regions))
        self.wants: list[Want] = []
        for block in self._blocks:
            owner = reference.spread.owner(case.name, block)
            keys = [("expected", case.name, block), *(("part", i, case.name, block) for i in self._parts)]
            self.wants += [Want(owner, key, shape_of(block), self._dtype) for key in keys]
        for index, region, alikes in self._regions:
            common = overlap(index, region, self._shape)
            assert common is not None
            for alike in alikes:
                self.wants += wants_of(alike, index, region, common, ranks.rank)
                holder = alike.summands[0][0]
                if holder.has_before and holder.gradient_dtype is not None:
                    key = ("before", holder.position, index, region)
                    self.wants.append(Want(holder.rank, key, common.shape, holder.gradient_dtype))

    def pieces(self, values: Iterator[tuple[Want, Tensor]]) -> list[Piece]:
        """The pieces, of what was asked for."""
        expected, *parts = self._reference(values)
        pieces = []
        for index, region, alikes in self._regions:
            common = overlap(index, region, self._shape)
            assert common is not None
            copies = []
            for alike in alikes:
                value, holder = value_of(alike, values), alike.summands[0][0]
                has_before = holder.has_before and holder.gradient_dtype is not None
                before = next(values)[1] if has_before else None
                copies.append(Copy(alike.ranks, value, before, alike.stale))
            right = select(expected[region], common.in_block).double()
            cuts = [select(part[region], common.in_block) for part in parts]
            pieces.append(Piece(common.whole, right, copies, cuts if len(cuts) > 1 else []))
        return pieces

    def _reference(self, values: Iterator[tuple[Want, Tensor]]) -> list[dict[Block, Tensor]]:
        """By region, the reference's gradient, and those of the parts of the batch."""
        found: list[dict[Block, Tensor]] = [{} for _ in range(1 + len(self._parts))]
        whole = whole_block(self._shape)
        is_whole = {region for _, region, _ in self._regions} == {whole}
        for block in self._blocks:
            for one in found:
                value = next(values)[1]
                if is_whole:
                    if whole not in one:
                        one[whole] = torch.empty(self._shape, dtype=self._dtype, device="cpu")
                    select(one[whole], tuple((limits,) for limits in block)).copy_(value)
                else:
                    one[block] = value
        return found


def _regions(case: Case, shape: tuple[int, ...], whole: bool) -> list[tuple[Index, Block, list[Alike]]]:
    """The pieces that are fetched, each with the block that is fetched of it."""
    pieces = pieces_held(case.holdings)
    if whole or not is_large(shape):
        return [(index, whole_block(shape), alikes) for index, alikes in pieces.items()]
    found = []
    for index, alikes in pieces.items():
        worst = max(case.measured[index].values(), key=lambda sums: sums.worst)
        if worst.block is not None:
            found.append((worst.worst, index, worst.block, alikes))
    found.sort(key=lambda one: -one[0])
    return [one[1:] for one in found[:_BLOCKS]]
