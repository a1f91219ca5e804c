"""Recorded steps whose values are still on their way to the host, and their reports to a monitor."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from distnorm.kernels import AsyncHostCopy
from distnorm.monitor.monitor import Monitor, callbacks_held
from distnorm.monitor.snapshot import LayerSnapshot
from distnorm.payload.noise import NoiseScale

KeyPath = tuple[str, ...]
Where = Sequence[tuple[str, int]]

_KEYS = {"total_norm": "grad_norm", "was_clipped": "clipped", "is_finite": "finite"}
"""Fields of a result that have another name in a row."""
_FIRST = (
    *("loss", "grad_norm", "clip_coef", "clipped_norm", "threshold", "clipped", "finite", "skipped"),
    "tokens_per_second",
)


@dataclass(slots=True)
class PendingStep:
    """A step whose values are on their way to the host.

    Args:
        step: its number, from 1.
        flags: whether a number is a truth value, by the path of its keys in the row; in the copy's order.
        copy: the numbers, and after them what the snapshot's payload was reduced to.
        snapshot: reads the latter; `None` in steps that are not monitored.
        facts: what else the row holds.
        where: (parameter, rank) pairs whose gradient is not finite, as far as they are known.
        loss_scale: what the snapshot's gradients are multiplied by.
    """

    step: int
    flags: Mapping[KeyPath, bool]
    copy: AsyncHostCopy
    snapshot: LayerSnapshot | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    where: Where = ()
    loss_scale: float = 1.0

    def row(self) -> dict[str, Any]:
        """The step's row of metrics.jsonl. Waits for the device."""
        found: dict[str, Any] = {}
        for (path, is_flag), number in zip(self.flags.items(), self.copy.values().tolist(), strict=False):
            into = found
            for part in path[:-1]:
                into = into.setdefault(part, {})
            into[_KEYS.get(path[-1], path[-1])] = bool(number) if is_flag else number
        found |= self.facts
        return {"step": self.step, **{key: found.get(key) for key in _FIRST}, **found}


class PendingSteps:
    """Steps on their way to a monitor, which are reported to it in their order.

    A callback of an alert may call anything of the clipper: it runs when its step is reported completely.

    Args:
        monitor: gets the reports.
    """

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self._steps: deque[PendingStep] = deque()
        self._newest: dict[str, Any] | None = None
        self._noise = NoiseScale()

    def add(self, pending: PendingStep) -> None:
        """Add the newest step."""
        self._steps.append(pending)

    def report_arrived(self) -> None:
        """Report the steps that have arrived, but for the newest, which a flush may add facts to."""
        while len(self._steps) > 1 and self._steps[0].copy.has_arrived:
            self._report(self._steps.popleft())

    def not_finite_until(self, step: int) -> int:
        """How many steps in a row up to the given one had a norm that is not finite. Waits for the device."""
        count = self.monitor.non_finite_in_a_row
        for pending in self._steps:
            if pending.step <= step:
                count = 0 if pending.row()["finite"] else count + 1
        return count

    def flush(self, facts: Mapping[str, Any]) -> dict[str, Any] | None:
        """Report all steps; see `GradClipper.flush`. Waits for the device."""
        if self._steps:
            self._steps[-1].facts.update(facts)
        while self._steps:
            self._report(self._steps.popleft())
        return self._newest

    def close(self) -> None:
        """Report all steps, and close the monitor."""
        with suppress(RuntimeError):  # of a device that has failed, after which a process ends
            self.flush({})
        self.monitor.close()

    def state_dict(self) -> dict[str, Any]:
        """The monitor's state after all steps up to now. Waits for the device."""
        self.flush({})
        return {**self.monitor.state_dict(), "noise": self._noise.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._steps.clear()
        self.monitor.load_state_dict(state)
        self._noise.load(state.get("noise", (0.0, 0.0)))

    def _report(self, pending: PendingStep) -> None:
        row, rows = pending.row(), None
        name, ranks = first_of(pending.where)
        if pending.snapshot is not None:
            rows = pending.snapshot.read(pending.copy.values()[len(pending.flags) :], pending.loss_scale)
            row |= rows.model
            if rows.first_nonfinite is not None:
                name, rank = rows.first_nonfinite
                ranks = None if rank is None else [rank]
            if rows.own_squares is not None:
                self._noise.add(pending.snapshot.data_ranks, rows.own_squares, row["grad_norm"] ** 2)
        if (scale := self._noise.value) is not None:
            row["noise_scale"] = scale
        with callbacks_held(self.monitor):
            self._newest = self.monitor.step(row, parameter=name, ranks=ranks)
            if rows is not None:
                self.monitor.layers(pending.step, rows.layers)
                for divergence in rows.divergences:
                    self.monitor.diverged(pending.step, divergence.name, divergence.ranks)


def first_of(where: Where) -> tuple[str | None, list[int] | None]:
    """The parameter that the lowest rank names first, and all ranks that name it."""
    if not where:
        return None, None
    name = where[0][0]
    return name, [rank for other, rank in where if other == name]
