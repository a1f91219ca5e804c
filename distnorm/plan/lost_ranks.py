"""Who did not come to a collective, in place of what a backend says of its own connections.

Nothing is published while all goes well: a collective that succeeded says that every rank came to it. A rank
whose collective failed says in the group's store where it is, and reads there who else does; a rank that is
gone, stopped, or waits elsewhere doesn't.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from distnorm.errors import LostRankError
from distnorm.plan.wording import name_ranks, shown

_LOST = re.compile(
    r"gloo|nccl.*(remote|abort)|remote process|timed? ?out|connection|broken pipe|store",
    re.IGNORECASE | re.DOTALL,
)
_GRACE = 3.0  # seconds; a backend that gives up closes its connections, so the others give up then too
_PATIENCE = 2.0  # seconds more for a store that may be lost as well
_PAUSE = 0.05
_SHOWN = 8


@dataclass(slots=True)
class Place:
    """Where a rank is in the steps that all ranks make.

    Attributes:
        step: what it measures; `None` outside of steps.
        last: the newest step that all ranks have measured; `None` before the first.
    """

    step: float | None = None
    last: float | None = None

    def passed(self) -> None:
        """All ranks have measured the step."""
        self.step, self.last = None, self.step

    def __str__(self) -> str:
        return "the norm" if self.step is None else f"step {self.step}'s norm"


def raise_if_lost(
    error: RuntimeError, group: ProcessGroup | None, rank: int, size: int, place: Place, waited: float
) -> None:
    """Raise what says who did not come, if an error is that of a collective that lost a rank.

    Args:
        error: what the collective raised.
        group, rank, size: the group, and this rank in it.
        place: where this rank is.
        waited: seconds in the collective.

    Raises:
        LostRankError: it is.
    """
    reason = (str(error).splitlines() or [""])[0].split(". ")[0][:200]
    if isinstance(error, LostRankError) or not _LOST.search(str(error)):
        return
    said = _Questions(group, rank, size, str(place)).answers()
    missing = tuple(other for other, answer in said.items() if answer is None)
    raise LostRankError(
        f"{_finding(said, missing, place)}; rank {rank} waited {waited:.0f} s ({reason})", missing
    ) from error


def _finding(said: dict[int, str | None], missing: tuple[int, ...], place: Place) -> str:
    facts = []
    if missing:
        last = "at none before" if place.last is None else f"last at step {place.last}'s norm"
        facts.append(f"{_named(missing)} did not come to {place}: {last}")
    elsewhere: dict[str, list[int]] = {}
    for other, answer in said.items():
        if answer is not None and answer != str(place):
            elsewhere.setdefault(answer, []).append(other)
    facts += shown([f"{_named(who)} waited at {answer}" for answer, who in elsewhere.items()])
    if facts:
        return "; ".join(facts)
    if not said:
        return f"expected every rank at {place}, found that one was lost, and the group's store with it"
    return f"every rank had come to {place}, and one of them, or the network, was lost in it"


def _named(ranks: Sequence[int]) -> str:
    more = len(ranks) - _SHOWN
    return name_ranks(ranks[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


class _Questions(threading.Thread):
    """Asks the store where the other ranks are: in a thread, as a store that is lost may never answer."""

    def __init__(self, group: ProcessGroup | None, rank: int, size: int, place: str) -> None:
        super().__init__(daemon=True)
        self._group, self._rank, self._size, self._place = group, rank, size, place
        self._answers: dict[int, str | None] = {}

    def answers(self) -> dict[int, str | None]:
        """Where each rank is that could be asked for, this one among them; `None` for a rank that gave no
        sign. Empty if the store doesn't answer."""
        self.start()
        self.join(_GRACE + _PATIENCE)
        return dict(self._answers)

    def run(self) -> None:
        with suppress(RuntimeError, KeyError):  # it is lost too, or was never there
            store = _store_of(self._group)
            self._ask(dist.PrefixStore("distnorm/lost", store))  # type: ignore[attr-defined]

    def _ask(self, store: Any) -> None:
        store.set(str(self._rank), self._place)
        waiting = [rank for rank in range(self._size) if rank != self._rank]
        until = time.monotonic() + _GRACE
        while not store.check([str(rank) for rank in waiting]) and time.monotonic() < until:
            time.sleep(_PAUSE)
        self._answers[self._rank] = self._place
        for rank in waiting:
            key = str(rank)
            self._answers[rank] = store.get(key).decode() if store.check([key]) else None


def _store_of(group: ProcessGroup | None) -> Any:
    return dist.distributed_c10d._world.pg_map[group][1]  # type: ignore[index]
