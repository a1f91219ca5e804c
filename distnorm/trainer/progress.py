"""What every rank does at the moment, in the process group's store, so that errors say who did not come."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import torch.distributed as dist

from distnorm import DistnormError, LostRankError

_LOST = re.compile(r"gloo|nccl|timed? ?out|connection|broken pipe|store", re.IGNORECASE)
_PATIENCE = 5.0  # seconds for the store to answer


class Part(IntEnum):
    """Of a start (step 0) or a step, in the order in which a rank comes to them."""

    START = 0
    MODEL = 1
    LOAD = 2
    FOLDER = 3
    GRADIENT = 4
    NORM = 5
    ROW = 6
    CHECKPOINT = 7


_OF_A_START = {
    Part.START: "the start",
    Part.MODEL: "the start's model",
    Part.LOAD: "the start's checkpoint",
    Part.FOLDER: "the start's folder",
}


class Progress:
    """Publishes where this rank is, for the others' errors.

    Args:
        timeout: seconds that collectives wait, as the configuration says; with `None` this does nothing,
            and torch's errors are left as they are.
    """

    def __init__(self, timeout: int | None) -> None:
        self._timeout = timeout
        self._here, self._since = (0, Part.START), time.monotonic()
        self._store: Any = None  # a torch.distributed.Store
        if timeout is not None and dist.is_initialized():
            store = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore("distnorm/progress", store)  # type: ignore[attr-defined]

    def at(self, step: int, part: Part) -> None:
        """This rank is about to meet the others in this part of the step."""
        self._here, self._since = (step, part), time.monotonic()
        if self._store is not None:
            self._store.set(str(dist.get_rank()), f"{step} {int(part)}")

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Raise what torch says of a rank that is lost as a `LostRankError`, which says where it was last."""
        try:
            yield
        except LostRankError as error:  # which knows what rank was at which norm, and nothing of the rest
            self._raise(error)
            raise
        except DistnormError:
            raise
        except RuntimeError as error:
            if _LOST.search(str(error)):
                self._raise(error)
            raise

    def _raise(self, error: RuntimeError) -> None:
        if self._store is None:
            return
        waited = time.monotonic() - self._since
        reason, missing = _first_line(error.__cause__ or error), getattr(error, "missing", ())
        found = self._finding()
        if found is None and missing:
            return  # the error itself knows more
        here = f"rank {dist.get_rank()} waited {waited:.0f} s, train.timeout is {self._timeout} s"
        found = found or (
            f"every rank had begun {_place(*self._here)}, and one of them, or the network, was lost in it"
        )
        raise LostRankError(f"{found}; {here} ({reason})", missing) from error

    def _finding(self) -> str | None:
        """Which ranks are elsewhere; `None` if all of them had come here."""
        place = _place(*self._here)
        behind, ahead = [], []
        last_of = self._everybody()
        for rank, last in last_of.items():
            where = "never seen" if last is None else f"last at {_place(*last)}"
            if rank != dist.get_rank() and (last is None or last < self._here):
                behind.append(f"rank {rank} did not come to {place}: it was {where}")
            elif last is not None and last > self._here:
                ahead.append(f"rank {rank} had left {place} behind: it was {where}")
        if not last_of:
            return f"a rank was lost at {place}, and the store that would say which"
        return "; ".join(behind or ahead) or None

    def _everybody(self) -> dict[int, tuple[int, Part] | None]:
        """Where each rank was last; empty if the store, which may be lost too, doesn't answer."""
        found: dict[int, tuple[int, Part] | None] = {}

        def ask() -> None:
            each = {rank: self._last(rank) for rank in range(dist.get_world_size())}
            found.update(each)

        asking = threading.Thread(target=ask, daemon=True)  # it may wait for ever
        asking.start()
        asking.join(_PATIENCE)
        return dict(found)

    def _last(self, rank: int) -> tuple[int, Part] | None:
        try:
            if not self._store.check([str(rank)]):  # to get it would wait, for each rank again
                return None
            step, part = self._store.get(str(rank)).split()
        except RuntimeError:  # it never said anything, or the store is lost too
            return None
        return int(step), Part(int(part))


def _place(step: int, part: Part) -> str:
    return _OF_A_START.get(part, f"step {step}'s {part.name.lower()}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0].split(". ")[0][:200]  # gloo adds what it may be caused by
