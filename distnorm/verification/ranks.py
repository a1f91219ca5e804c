"""Objects exchanged between ranks, with no process group too; and errors that all ranks raise alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from distnorm.errors import DistnormError

T = TypeVar("T")


class Ranks:
    """The ranks that verify together; the first of them, the root, holds the whole gradient and judges.

    Args:
        group: the process group; by default the whole world, or this process alone where there is none.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.alone = not (dist.is_available() and dist.is_initialized())
        self.group = group
        self.members = [0] if self.alone else dist.get_process_group_ranks(group or dist.group.WORLD)
        self.rank = 0 if self.alone else dist.get_rank()
        if self.rank not in self.members:
            raise DistnormError(
                f"expected a call on the group's ranks {self.members} only, found one on rank {self.rank}"
            )

    @property
    def is_root(self) -> bool:
        """Whether this rank is the one that judges."""
        return self.rank == self.members[0]

    def gather(self, value: T) -> list[T]:
        """Collect every rank's value on the root, in rank order; empty elsewhere."""
        if self.alone:
            return [value]
        received: list[Any] | None = [None] * len(self.members) if self.is_root else None
        dist.gather_object(value, received, dst=self.members[0], group=self.group)
        return received or []

    def share(self, value: T | None) -> T:
        """Give the root's value to every rank."""
        box: list[Any] = [value]
        if not self.alone:
            dist.broadcast_object_list(box, src=self.members[0], group=self.group)
        shared: T = box[0]
        return shared

    def each(self, doing: str, step: Callable[[], T]) -> T:
        """Run a step that issues no collective on every rank; if it fails on one, all raise its error."""
        result, error = attempt(step)
        errors = dict(zip(self.members, self.gather(error), strict=False))
        failed = self.share({rank: text for rank, text in errors.items() if text})
        _raise_from(doing, failed)
        assert result is not None
        return result[0]

    def on_root(self, doing: str, step: Callable[[], T]) -> T:
        """Run a step on the root and give its result, or its error, to every rank."""
        result, error = attempt(step) if self.is_root else (None, None)
        shared, text = self.share((result, error))
        _raise_from(doing, {self.members[0]: text} if text else {})
        assert shared is not None
        return shared[0]


def attempt(step: Callable[[], T]) -> tuple[tuple[T] | None, str | None]:
    """Run a step; its boxed result or what went wrong, as text that can travel."""
    try:
        return (step(),), None
    except DistnormError as error:
        return None, str(error)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def rank_list(ranks: list[int]) -> str:
    """Name ranks as people do: ``rank 3``, ``ranks 0, 1``, ``ranks 0-7``."""
    ranks = sorted(set(ranks))
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


def _raise_from(doing: str, failed: dict[int, str]) -> None:
    by_text: dict[str, list[int]] = {}
    for rank, text in failed.items():
        by_text.setdefault(text, []).append(rank)
    if by_text:
        found = "; ".join(f"on {rank_list(where)}: {text}" for text, where in by_text.items())
        raise DistnormError(f"verify failed while {doing} {found}")
