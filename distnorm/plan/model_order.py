"""One order of the model's parameters out of the orders in which its ranks hold them.

Every list is cut into blocks, such as all of ``blocks.2.``: a block's family is what stands before the first
number of a name, and its number is that number. Lists are taken in the order of their ranks, and within a
list every block comes after the one before it. A block whose family is known goes where its number belongs,
so that interleaved pipeline stages (0, 1, 4, 5 and 2, 3, 6, 7) give 0 to 7; another stays beside the blocks
that it stands beside in its list.
"""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

_FIRST_NUMBER = re.compile(r"((?:pp[0-9]+\.)?.*?)([0-9]+)")  # a pp_mesh puts the stage before a name

_Key = tuple[str, int]
_Block = tuple[_Key, list[str]]
_Position = tuple[int, int]
"""Where a block is: its place before a list is added, and its number among the blocks added behind it."""

_NOWHERE = (-2, 0)


def merged(lists: Iterable[Sequence[str]]) -> Iterator[str]:
    """All names, in an order that keeps that of each list.

    Args:
        lists: of names, by rank; no name is in two of them.
    """
    order = _Blocks()
    for names in lists:
        order.take(names)
    for block in order.blocks:
        yield from block[1]


class _Blocks:
    """The blocks up to now, each with its key and its names.

    A list that only adds to blocks, or behind the last one, costs its own length; any other also costs the
    number of blocks.
    """

    def __init__(self) -> None:
        self.blocks: list[_Block] = []
        self._at: dict[_Key, _Position] = {}
        self._numbers: dict[str, list[int]] = {}  # of each family, ascending

    def take(self, names: Sequence[str]) -> None:
        """Take in the names of one more rank, in its order."""
        blocks = [(key, list(run)) for key, run in groupby(names, _key)]
        known = [i for i, (key, _) in enumerate(blocks) if key[0] in self._numbers]
        # What leads the list goes with what it leads to.
        before = self._place(blocks[known[0]][0]) if known else (len(self.blocks) - 1, 0)
        new: list[tuple[_Position, _Block]] = []
        for i, (key, run) in enumerate(blocks):
            there = self._at.get(key, _NOWHERE)
            if there >= before and there[1] == 0:
                self.blocks[there[0]][1].extend(run)
                before = there
            else:
                place = before
                if key[0] in self._numbers:
                    place = self._place(key)
                elif known and i > known[-1]:
                    place = self._behind(before, blocks[i - 1][0][0])
                before = max(place, before)[0], len(new) + 1
                new.append((before, (key, run)))
                self._note(key, before)
        self._put(new)

    def _place(self, key: _Key) -> _Position:
        """The position behind which a block of a known family belongs by its number."""
        family, number = key
        numbers = self._numbers[family]
        if i := bisect_left(numbers, number):
            return self._at[family, numbers[i - 1]]
        return self._at[family, numbers[0]][0] - 1, 0

    def _behind(self, position: _Position, family: str) -> _Position:
        """Behind what goes on with a family there: the last stage's norm comes after all layers."""
        last = position[0]
        while last + 1 < len(self.blocks) and self.blocks[last + 1][0][0] == family:
            last += 1
        return last, 0

    def _note(self, key: _Key, position: _Position) -> None:
        family, number = key
        if key not in self._at and number >= 0:
            insort(self._numbers.setdefault(family, []), number)
        self._at[key] = position

    def _put(self, new: list[tuple[_Position, _Block]]) -> None:
        end = len(self.blocks)
        if all(position[0] == end - 1 for position, _ in new):
            self.blocks += [block for _, block in new]
            self._at.update((key, (end + i, 0)) for i, (_, (key, _)) in enumerate(new))
            return
        old = [((i, 0), block) for i, block in enumerate(self.blocks)]
        self.blocks = [block for _, block in sorted(old + new, key=lambda one: one[0])]
        self._at = {key: (i, 0) for i, (key, _) in enumerate(self.blocks)}


def _key(name: str) -> _Key:
    found = _FIRST_NUMBER.match(name)
    return (name, -1) if found is None else (found[1], int(found[2]))
