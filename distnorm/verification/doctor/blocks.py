"""Parameters cut into blocks of a bounded size, which lie evenly on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

from distnorm.verification.doctor.holdings import FlatRun, Index, Runs

Block = tuple[tuple[int, int], ...]
"""For each dim of a parameter ``(start, stop)``; its elements follow each other in a contiguous parameter."""

ELEMENTS = 1 << 16
"""Elements of a block at most."""


def cut(shape: tuple[int, ...]) -> Iterator[Block]:
    """Cut the shape of a whole parameter into blocks, in the order of memory."""
    size, most = prod(shape), ELEMENTS
    whole = tuple((0, length) for length in shape)
    if size <= most:
        yield from (whole,) if size else ()
        return
    rows = most * shape[0] // size
    if rows:
        for start in range(0, shape[0], rows):
            yield ((start, min(start + rows, shape[0])), *whole[1:])
        return
    for row in range(shape[0]):
        for rest in cut(shape[1:]):
            yield ((row, row + 1), *rest)


def whole_block(shape: tuple[int, ...]) -> Block:
    """All of a parameter."""
    return tuple((0, length) for length in shape)


def is_run(blocks: Sequence[Block]) -> bool:
    """Whether blocks follow each other along the first dim, and are all of the others."""
    return all(
        bool(one) and one[0][1] == other[0][0] and one[1:] == other[1:] for one, other in pairwise(blocks)
    )


def shape_of(block: Block) -> tuple[int, ...]:
    """The shape of a block."""
    return tuple(stop - start for start, stop in block)


def start_of(block: Block, shape: tuple[int, ...]) -> int:
    """The place of a block's first element among the parameter's, as they lie in memory."""
    place = 0
    for (start, _), length in zip(block, shape, strict=True):
        place = place * length + start
    return place


@dataclass(frozen=True, slots=True)
class Overlap:
    """What a piece and a block have in common.

    Args:
        whole: which elements of the parameter.
        in_block: which of the block.
        in_piece: which of the piece.
        shape: the shape of what they have in common.
    """

    whole: Index
    in_block: Index
    in_piece: Index
    shape: tuple[int, ...]


def overlap(index: Index, block: Block, shape: tuple[int, ...]) -> Overlap | None:
    """What a piece and a block have in common; `None` where that is nothing.

    Args:
        index: which elements the piece holds.
        block: the block.
        shape: of the whole parameter.
    """
    if isinstance(index, FlatRun):
        first = start_of(block, shape)
        start = max(first, index.start)
        stop = min(first + prod(shape_of(block)), index.stop)
        if start >= stop:
            return None
        flat = [FlatRun(start - at, stop - at) for at in (0, first, index.start)]
        return Overlap(flat[0], flat[1], flat[2], (stop - start,))
    dims = [_overlap(runs, *limits) for runs, limits in zip(index, block, strict=True)]
    if not all(whole for whole, _, _ in dims):
        return None
    lengths = tuple(sum(stop - start for start, stop in whole) for whole, _, _ in dims)
    whole, in_block, in_piece = (tuple(dim[i] for dim in dims) for i in range(3))
    return Overlap(whole, in_block, in_piece, lengths)


def block_around(index: Index, shape: tuple[int, ...]) -> Block:
    """The least block, but for a flat run, that holds a piece which is not empty.

    Args:
        index: which elements the piece holds.
        shape: of the whole parameter.
    """
    if not isinstance(index, FlatRun):
        return tuple((runs[0][0], runs[-1][1]) if runs else (0, 0) for runs in index)
    if not shape:
        return ()
    inner = max(1, prod(shape[1:]))
    return ((index.start // inner, -(-index.stop // inner)), *((0, length) for length in shape[1:]))


def _overlap(runs: Runs, low: int, high: int) -> tuple[Runs, Runs, Runs]:
    whole, in_piece, held = [], [], 0
    for start, stop in runs:
        first, last = max(start, low), min(stop, high)
        if first < last:
            whole.append((first, last))
            in_piece.append((held + first - start, held + last - start))
        held += stop - start
    return tuple(whole), tuple((a - low, b - low) for a, b in whole), tuple(in_piece)


class Spread:
    """Which rank has which blocks: all of them about as many elements, in the order of the parameters.

    Args:
        shapes: of the parameters, alike on every rank.
        size: number of ranks.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], size: int) -> None:
        sums = list(accumulate((prod(shape) for shape in shapes.values()), initial=0))
        self._shapes, self._size = shapes, size
        self._starts, self._total = dict(zip(shapes, sums, strict=False)), max(1, sums[-1])

    def owner(self, name: str, block: Block) -> int:
        """The rank that has a block."""
        return self._at(self._starts[name] + start_of(block, self._shapes[name]))

    def owners(self, name: str) -> range:
        """The ranks that may have blocks of a parameter."""
        start, count = self._starts[name], prod(self._shapes[name])
        return range(self._at(start), self._at(start + count - 1) + 1) if count else range(0)

    def blocks(self, rank: int) -> Iterator[tuple[str, Block]]:
        """The blocks that a rank has."""
        for name, shape in self._shapes.items():
            if rank in self.owners(name):
                yield from ((name, block) for block in cut(shape) if self.owner(name, block) == rank)

    def _at(self, element: int) -> int:
        return element * self._size // self._total
