"""Many ranks in one process: each does all that a rank does, one at a time, until it meets the others.

A rank is a thread, and only one thread runs. Where a rank needs the others, it says what it brings, and
waits; when all of them wait, the calling thread combines what they brought. So the code of a rank is the code
of a process of its own, and collectives are issued where the caller's modes see them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from distnorm.errors import DistnormError

T = TypeVar("T")
Combine = Callable[[Mapping[int, Any]], Mapping[int, Any]]
"""From what each rank brings to what each of them gets. The calling thread calls it, once for all of them."""


class _Abandoned(BaseException):
    """Ends a rank that waits for others that have ended."""


@dataclass(frozen=True, slots=True)
class _Meeting:
    """What a rank waits for: `combine` is one for all ranks that have one key; `members` must be there."""

    key: object
    members: tuple[int, ...]
    value: Any
    combine: Combine


class _Turns(threading.Thread, Generic[T]):
    """One rank."""

    def __init__(self, work: Callable[[], T]) -> None:
        super().__init__(daemon=True)
        self._work, self._go, self._back = work, threading.Semaphore(0), threading.Semaphore(0)
        self._reply: Any = None
        self._is_abandoned = False
        self.meeting: _Meeting | None = None
        self.result: T | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        self._go.acquire()
        try:
            self.result = self._work()
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = error
        self.meeting = None
        self._back.release()

    def resume(self, reply: Any = None, *, abandon: bool = False) -> None:
        """Let the rank run, from the calling thread, until it waits for others again or ends."""
        self._reply, self._is_abandoned = reply, abandon
        self._go.release()
        self._back.acquire()

    def wait(self, meeting: _Meeting) -> Any:
        """Wait for the others, from the rank's own thread."""
        self.meeting = meeting
        self._back.release()
        self._go.acquire()
        if self._is_abandoned:
            raise _Abandoned
        reply, self._reply = self._reply, None
        return reply


class Lockstep:
    """Runs functions of a rank on all ranks, one at a time."""

    def __init__(self) -> None:
        self._turns: dict[int, _Turns[Any]] = {}

    def run(
        self,
        ranks: Sequence[int],
        work: Callable[[int], T],
        alone: Callable[[], AbstractContextManager[object]],
    ) -> dict[int, T]:
        """Run a function on each rank, and return what it returns there.

        Args:
            ranks: by their numbers.
            work: what is run, of the number of a rank.
            alone: gives the context that each rank's own code runs in.

        Raises:
            Exception: of the lowest rank that raised one.
            DistnormError: no rank has, and some wait for others that don't come.
        """

        def of_rank(rank: int) -> Callable[[], T]:
            def run() -> T:
                with alone():
                    return work(rank)

            return run

        turns: dict[int, _Turns[T]] = {rank: _Turns(of_rank(rank)) for rank in ranks}
        self._turns = turns
        try:
            for one in turns.values():
                one.start()
                one.resume()
            while self._meet():
                pass
        finally:
            waiting = {rank: one.meeting.key for rank, one in turns.items() if one.meeting is not None}
            for rank in waiting:
                turns[rank].resume(abandon=True)
            self._turns = {}
        for one in turns.values():
            if one.error is not None:
                raise one.error
        if waiting:
            raise DistnormError(f"expected all ranks in one collective, found ranks that wait in {waiting}")
        return {rank: one.result for rank, one in turns.items()}  # type: ignore[misc]

    def meet(self, rank: int, key: object, members: tuple[int, ...], value: Any, combine: Combine) -> Any:
        """Meet the other members, from a rank's own code; every member must call it with the same key."""
        return self._turns[rank].wait(_Meeting(key, members, value, combine))

    def _meet(self) -> bool:
        """Let all go on whose members wait for one another; false if there are none."""
        keys = {rank: one.meeting.key for rank, one in self._turns.items() if one.meeting is not None}
        by_key: dict[object, dict[int, _Meeting]] = {}
        for rank, one in self._turns.items():
            found = one.meeting
            if found is not None and all(keys.get(member) == found.key for member in found.members):
                by_key.setdefault(found.key, {})[rank] = found
        for meetings in by_key.values():
            combine = next(iter(meetings.values())).combine
            replies = combine({rank: found.value for rank, found in meetings.items()})
            for rank in meetings:
                self._turns[rank].resume(replies[rank])
        return bool(by_key)


@dataclass(frozen=True, slots=True)
class SimulatedGroup:
    """The group of one rank along one axis of a mesh, in place of a process group.

    Args:
        ranks: its members, by their ranks in the world.
        meet: meets the members, and adds up a tensor of each, in place.
    """

    ranks: tuple[int, ...]
    meet: Callable[[Tensor, tuple[int, ...]], Tensor]

    def size(self) -> int:
        """How many members it has."""
        return len(self.ranks)

    def add_up_(self, buffer: Tensor) -> None:
        """Add up a tensor over the members, in place."""
        self.meet(buffer, self.ranks)


def local_tensor_mode() -> Any:
    """torch's `LocalTensorMode` that is in force here; `None` if there is none."""
    module = sys.modules.get("torch.distributed._local_tensor")
    return None if module is None else module.enabled_local_tensor_mode()


def refuse_local_tensors() -> None:
    """Refuse to be one rank where torch simulates all of them.

    Raises:
        DistnormError: torch's `LocalTensorMode` is in force, or this is code of one of its ranks.
    """
    if local_tensor_mode() is not None or isinstance(threading.current_thread(), _Turns):
        raise DistnormError(
            "expected one rank in this process, found torch's LocalTensorMode, which runs all of them; there "
            "GradClipper, get_total_norm, clip_grad_norm_ and clip_grads_with_norm_ work. Use torch's fake "
            "process group, or FakeTensorMode, for a dry run of anything else"
        )
