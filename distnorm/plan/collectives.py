"""Every collective that the library issues. Without a process group each one is the identity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from distnorm.errors import DistnormError

_GATHERED = 8 << 20  # characters of text that an error gathers from all ranks together
_TOLD = 8  # unlike facts that an error tells

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX} if dist.is_available() else {}


class Ranks:
    """The ranks that take part in a norm.

    Args:
        group: a process group; default: the whole world, or this process alone where there is none.

    Raises:
        DistnormError: this process is no member of the group.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.connected = dist.is_available() and dist.is_initialized()
        self.group = group if group is not None or not self.connected else dist.group.WORLD
        self.rank = dist.get_rank(self.group) if self.connected else 0
        self.size = dist.get_world_size(self.group) if self.connected else 1
        if self.rank < 0:
            raise DistnormError("expected a process group that this rank is a member of")
        self._device_types = self._supported_device_types()

    def _supported_device_types(self) -> tuple[str, ...]:
        if not self.connected:
            return ()
        config = str(dist.get_backend_config(self.group))  # such as "cpu:gloo,cuda:nccl"
        types = tuple(part.split(":")[0] for part in config.split(","))
        return tuple(t for t in types if t != "cuda" or torch.cuda.is_available())

    def device(self, preferred: torch.device | None = None) -> torch.device:
        """Where a tensor must be for this group's collectives: `preferred` if its backend can."""
        if preferred is not None and (preferred.type in self._device_types or not self.connected):
            return preferred
        if "cpu" in self._device_types or not self._device_types:
            return torch.device("cpu")
        return torch.device(self._device_types[0], torch.accelerator.current_device_index())

    def all_reduce_(self, tensor: Tensor, op: str) -> Tensor:
        """Reduce in place over all ranks: ``"sum"`` or ``"max"``."""
        if self.size > 1:
            dist.all_reduce(tensor, _OPS[op], self.group)
        return tensor

    def gather(self, fact: Any) -> list[Any]:
        """Everybody's fact, in the order of ranks: for errors, and for a few bytes at planning."""
        if self.size == 1:
            return [fact]
        facts: list[Any] = [None] * self.size
        dist.all_gather_object(facts, fact, self.group)
        return facts

    def shortened(self, text: str, parts: int = 1) -> str:
        """A text that is one of `parts` that every rank gathers, short enough for the memory of one rank.

        What is cut off is replaced by a hash of the whole, so that unlike texts stay unlike.
        """
        most = max(40, _GATHERED // (self.size * parts))
        if len(text) <= most or self.size == 1:
            return text
        return (
            f"{text[:most]}... ({len(text)} characters, {blake2b(text.encode(), digest_size=8).hexdigest()})"
        )

    def raise_together(self, error: DistnormError | None) -> None:
        """Raise on every rank if any rank has an error; its kind is that of the lowest such rank.

        Every rank must call it, with its own error or `None`.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return
        failed = torch.tensor([error is not None], dtype=torch.int64, device=self.device())
        if not self.all_reduce_(failed, "max").item():
            return
        by_message: dict[tuple[type[DistnormError], str], list[int]] = {}
        mine = None if error is None else (type(error), self.shortened(str(error)))
        for rank, fact in enumerate(self.gather(mine)):
            if fact is not None:
                by_message.setdefault(fact, []).append(rank)
        (kind, only), ranks = next(iter(by_message.items()))
        if len(by_message) == 1 and len(ranks) == self.size:
            raise kind(only)
        raise kind(
            "; ".join(told([f"on {_ranks(who)}: {message}" for (_, message), who in by_message.items()]))
        )

    def join(self, keys: Tensor, rows: Tensor, answer: Callable[[Tensor], Tensor]) -> Tensor:
        """Answer every row by a rank that sees all ranks' rows of the same key: a distributed hash join.

        Args:
            keys: [n] int64; rows of one key meet on one rank.
            rows: [n, c] int64.
            answer: [m, c] -> [m, d], called once, with all rows that met here, by rank and then by
                their order there.

        Returns:
            [n, d] int64, the answer to each row. No rank holds more than the rows of its own keys.
        """
        if self.size == 1:
            return answer(rows)
        device = self.device()
        owner = keys.remainder(self.size)
        order = owner.argsort(stable=True)
        counts = torch.bincount(owner, minlength=self.size)
        received = torch.empty_like(counts, device=device)
        dist.all_to_all_single(received, counts.to(device), group=self.group)
        send, receive = counts.tolist(), received.tolist()
        met = self._exchange(rows[order].to(device), send, receive)
        replies = self._exchange(answer(met.cpu()).contiguous().to(device), receive, send).cpu()
        return torch.empty_like(replies).index_copy_(0, order, replies)

    def _exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        out = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=self.group)
        return out


def told(facts: Sequence[str]) -> list[str]:
    """The first few of what ranks say, and how many more there are."""
    more = len(facts) - _TOLD
    return [*facts[:_TOLD], f"and {more} more"] if more > 0 else list(facts)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {list(ranks)}"


def reduce_partial_(buffer: Tensor, groups: Sequence[ProcessGroup]) -> Tensor:
    """Add up a buffer of partial gradients in place, over one mesh axis after the other.

    Every rank of every group must call it, with a buffer of the same length and dtype.
    """
    for group in groups:
        dist.all_reduce(buffer, dist.ReduceOp.SUM, group)
    return buffer


def average_bucket(group: ProcessGroup, bucket: Any) -> Any:
    """What DDP does with a bucket of gradients that has no communication hook: a future of their average."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    return allreduce_hook(group, bucket)
