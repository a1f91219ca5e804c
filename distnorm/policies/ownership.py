"""Which of the model's parameters belong to which policy group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import Tensor

from distnorm.config import GroupConfig
from distnorm.errors import ConfigError
from distnorm.payload.indices import Indices
from distnorm.plan.model_table import ModelTable

_SHOWN = 3


class Ownership:
    """Gives every parameter to one group: the one whose patterns match it, or the last, without patterns.

    Args:
        table: the model's parameters.
        groups: those with patterns.
        is_whole: whether the table has the whole model; in torch's fake process group it hasn't, and then a
            pattern may match nothing.

    Raises:
        ConfigError: a pattern matches no parameter, or two groups the same one; on every rank alike.
    """

    def __init__(self, table: ModelTable, groups: Sequence[GroupConfig], *, is_whole: bool = True) -> None:
        self._names = table.names
        owners = self._owners(groups, is_whole)
        everybody = range(len(groups) + 1)
        self._slots = [[slot for slot, owner in enumerate(owners) if owner == group] for group in everybody]
        order = [slot for slots in self._slots for slot in slots]
        place = {slot: i for i, slot in enumerate(order)}
        owners_of_shards = [owners[slot] for slot in table.slots]
        self._shards = [[i for i, owner in enumerate(owners_of_shards) if owner == g] for g in everybody]
        self._indices = Indices()
        self._indices["numels"] = table.numels
        self._indices["places"] = [place[slot] for slot in table.slots]
        for group, slots in enumerate(self._slots):
            self._indices[group] = slots

    def _owners(self, groups: Sequence[GroupConfig], is_whole: bool) -> list[int]:
        """[parameters] the group of each."""
        owners = [len(groups)] * len(self._names)
        useless, twice = [], []
        for i, group in enumerate(groups):
            for pattern in group.params:
                found = list(self._matching(pattern))
                if not found:
                    useless.append(f"{pattern!r} of group {group.name!r}")
                for slot in found:
                    if owners[slot] not in (len(groups), i):
                        other = groups[owners[slot]].name
                        twice.append(f"{self._names[slot]!r} in {other!r} and {group.name!r}")
                    owners[slot] = min(owners[slot], i)
        if useless and is_whole:
            raise ConfigError(
                f"clip.groups: expected patterns that match parameters, found {_few(useless)}, which match "
                f"none; the model has {_few([repr(name) for name in self._names])}"
            )
        if twice:
            raise ConfigError(
                f"clip.groups: expected each parameter in one group at most, found {_few(twice)}"
            )
        return owners

    def _matching(self, pattern: str) -> Iterator[int]:
        return (slot for slot, name in enumerate(self._names) if fnmatchcase(name, pattern))

    def names(self, group: int) -> tuple[str, ...]:
        """Of a group's parameters, in the table's order."""
        return tuple(self._names[slot] for slot in self._slots[group])

    def count(self, group: int) -> int:
        """How many parameters a group has."""
        return len(self._slots[group])

    def members(self, group: int, like: Tensor) -> Tensor:
        """The places of a group's parameters in the table."""
        return self._indices.at(group, like)

    def numels(self, like: Tensor) -> Tensor:
        """The number of elements of each parameter of the table."""
        return self._indices.at("numels", like)

    def places(self, like: Tensor) -> Tensor:
        """For each of this rank's shards the place of its parameter among the members of all groups."""
        return self._indices.at("places", like)

    def shards(self, group: int) -> list[int]:
        """Positions, among this rank's shards, of those of a group's parameters."""
        return self._shards[group]


def _few(facts: Sequence[str]) -> str:
    more = len(facts) - _SHOWN
    return ", ".join(facts[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
