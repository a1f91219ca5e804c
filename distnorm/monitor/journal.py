"""Steps that were made, on their way to a monitor: told in their order, once their values are on the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from distnorm.monitor import Monitor
from distnorm.monitor.host_copy import Fetch
from distnorm.monitor.snapshot import Look
from distnorm.payload.noise import NoiseScale
from distnorm.plan.model_table import natural

Path = tuple[str, ...]

_KEYS = {"total_norm": "grad_norm", "was_clipped": "clipped", "is_finite": "finite"}
"""Fields of a result that have another name in a row."""
_FIRST = (
    "loss",
    "grad_norm",
    "clip_coef",
    "clipped_norm",
    "threshold",
    "clipped",
    "finite",
    "skipped",
    "tokens_per_second",
)


@dataclass(slots=True)
class Entry:
    """A step.

    Args:
        step: its number, from 1.
        numbers: 0-d tensors, by the path of their keys in the row; flags are bool.
        lanes: what a look's lanes were reduced to; `None` in other steps.
        look: which reads them.
        facts: what else stands in the row.
        where: the parameters that aren't finite, with a rank of each, so far as they are known.
        loss_scale: what the look's gradients are multiplied by.
    """

    step: int
    numbers: Mapping[Path, Tensor]
    lanes: Tensor | None = None
    look: Look | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    where: Sequence[tuple[str, int]] = ()
    loss_scale: float = 1.0
    is_counted: bool = False
    _flags: frozenset[Path] = frozenset()
    _fetch: Fetch | None = None

    def send(self) -> None:
        """Start the copy to the host."""
        self._flags = frozenset(path for path, number in self.numbers.items() if number.dtype == torch.bool)
        values = torch.stack([number.double() for number in self.numbers.values()])
        self._fetch = Fetch(values if self.lanes is None else torch.cat([values, self.lanes]))
        self.lanes = None

    @property
    def has_arrived(self) -> bool:
        assert self._fetch is not None
        return self._fetch.has_arrived

    def values(self) -> Tensor:
        assert self._fetch is not None
        return self._fetch.values()

    def row(self) -> dict[str, Any]:
        """The step's row of metrics.jsonl."""
        found: dict[str, Any] = {}
        for path, number in zip(self.numbers, self.values().tolist(), strict=False):
            into = found
            for part in path[:-1]:
                into = into.setdefault(part, {})
            into[_KEYS.get(path[-1], path[-1])] = bool(number) if path in self._flags else number
        found |= self.facts
        return {"step": self.step, **{key: found.get(key) for key in _FIRST}, **found}


class Journal:
    """Tells a monitor of steps, each when the next has been made, or at a flush.

    Args:
        monitor: who is told.
    """

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self._entries: deque[Entry] = deque()
        self._newest: dict[str, Any] | None = None
        self.in_a_row, self.noise = 0, NoiseScale()

    def add(self, entry: Entry) -> None:
        """Note a step, and tell what has arrived of those before."""
        while self._entries and self._entries[0].has_arrived:
            self._tell(self._entries.popleft())
        entry.send()
        self._entries.append(entry)

    def not_finite_until(self, step: int) -> int:
        """How many steps in a row weren't finite, the given one the last of them. Waits for the device."""
        for entry in self._entries:
            if entry.step <= step:
                self._count(entry)
        return self.in_a_row

    def flush(self, facts: Mapping[str, Any]) -> dict[str, Any] | None:
        """Tell everything. Waits for the device.

        Args:
            facts: what else stands in the newest step's row, where that hasn't been told yet.

        Returns:
            The newest step's row; `None` before the first.
        """
        if self._entries:
            self._entries[-1].facts.update(facts)
        while self._entries:
            self._tell(self._entries.popleft())
        return self._newest

    def close(self) -> None:
        """Tell everything, and close the monitor's sinks."""
        with suppress(RuntimeError):  # of a device that has failed, after which a process ends
            self.flush({})
        self.monitor.close()

    def state_dict(self) -> dict[str, Any]:
        """The monitor's state after all steps up to now. Waits for the device."""
        self.flush({})
        return {**self.monitor.state_dict(), "noise": self.noise.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._entries.clear()
        self.monitor.load_state_dict(state)
        self.noise.load(state.get("noise", (0.0, 0.0)))
        self.in_a_row = self.monitor.non_finite_in_a_row

    def _count(self, entry: Entry) -> None:
        if not entry.is_counted:
            entry.is_counted = True
            self.in_a_row = 0 if entry.row()["finite"] else self.in_a_row + 1

    def _tell(self, entry: Entry) -> None:
        self._count(entry)
        row, found = entry.row(), None
        if entry.look is not None:
            found = entry.look.read(entry.values()[len(entry.numbers) :], entry.loss_scale)
        name, ranks = _named(entry.where, None if found is None else found.first_bad)
        if found is not None and found.small is not None and entry.look is not None:
            assert entry.look.noise is not None
            self.noise.add(entry.look.noise.replicas, found.small, row["grad_norm"] ** 2)
        if (scale := self.noise.value) is not None:
            row["noise_scale"] = scale
        self._newest = self.monitor.step(row, parameter=name, ranks=ranks)
        if found is not None:
            self.monitor.layers(entry.step, found.rows)
            for divergence in found.diverged:
                self.monitor.diverged(entry.step, divergence.name, divergence.ranks)


def numbers_of(found: object, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """The tensors of a result and of what it holds, by the path of their names."""
    if isinstance(found, Tensor):
        yield path, found
    elif isinstance(found, Mapping):
        for name, inner in found.items():
            yield from numbers_of(inner, (*path, name))
    elif is_dataclass(found):
        for each in fields(found):
            yield from numbers_of(getattr(found, each.name), (*path, each.name))


def first_of(where: Sequence[tuple[str, int]]) -> tuple[str | None, list[int] | None]:
    """The first in natural order of parameters that each come with a rank, and its ranks."""
    if not where:
        return None, None
    name = min((name for name, _ in where), key=natural)
    return name, [rank for other, rank in where if other == name]


def _named(
    where: Sequence[tuple[str, int]], first_bad: tuple[str, int | None] | None
) -> tuple[str | None, list[int] | None]:
    if first_bad is None:
        return first_of(where)
    name, rank = first_bad
    return name, None if rank is None else [rank]
