"""Every collective that the library issues. Without a process group each one is the identity."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from distnorm.errors import DistnormError
from distnorm.plan.group_state import GroupState
from distnorm.plan.lockstep import SimulatedGroup, refuse_local_tensors
from distnorm.plan.lost_ranks import Place, raise_if_lost
from distnorm.plan.wording import name_ranks, shown

_GATHERED = 8 << 20  # characters of text that an error gathers from all ranks together
_TAG = 0x6E6F726D  # of our messages between two ranks, so that gloo takes none of the caller's for them

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX} if dist.is_available() else {}


_states: weakref.WeakKeyDictionary[ProcessGroup, GroupState] = weakref.WeakKeyDictionary()
_alone = GroupState()


class Ranks:
    """The ranks that take part in a norm.

    In torch's fake process group, where the other ranks don't exist, this rank plans as if it were alone;
    `all_reduce_` is issued all the same.

    Args:
        group: a process group; default: the whole world, or this process alone where there is none.
        alone: whether this process measures alone, whatever groups there are.

    Attributes:
        place: where this rank is, for the error that names a rank which did not come.

    Raises:
        DistnormError: this process is no member of the group, or that was destroyed.
    """

    def __init__(self, group: ProcessGroup | None = None, *, alone: bool = False) -> None:
        refuse_local_tensors()
        self.is_alone = alone
        self.is_connected = not alone and dist.is_available() and dist.is_initialized()
        whole = dist.group.WORLD if group is None and self.is_connected else group
        # Plans are kept by group and know their ranks: held from there, a destroyed group would never end,
        # and its threads would abort the interpreter at its end.
        self._group = weakref.ref(whole) if isinstance(whole, ProcessGroup) else None
        self._state: GroupState | None = None
        self.place = Place()
        is_member = group is None or not self.is_connected or isinstance(group, ProcessGroup)
        if group is not None and is_member and not (self.is_connected and self.is_current):
            raise DistnormError("group: expected a group of this process, found one that was destroyed")
        if not is_member:
            raise DistnormError("expected a process group that this rank is a member of")
        self.rank = dist.get_rank(self.group) if self.is_connected else 0
        self.size = dist.get_world_size(self.group) if self.is_connected else 1
        self._device_types = self._supported_device_types()
        self.is_simulated = self.is_connected and dist.get_backend(self.group) == "fake"
        if self.is_simulated:
            self.rank, self.size = 0, 1

    @property
    def group(self) -> ProcessGroup | None:
        """The process group; `None` where this process is alone.

        Raises:
            DistnormError: it was destroyed.
        """
        if self._group is None:
            return None
        found: ProcessGroup | None = self._group()
        if found is None:
            raise DistnormError("expected the process group of before, found that it was destroyed")
        return found

    def _supported_device_types(self) -> tuple[str, ...]:
        if not self.is_connected:
            return ()
        config = str(dist.get_backend_config(self.group))  # such as "cpu:gloo,cuda:nccl"
        types = tuple(part.split(":")[0] for part in config.split(","))
        return tuple(t for t in types if t != "cuda" or torch.cuda.is_available())

    @property
    def is_current(self) -> bool:
        """Whether the group still is what it was: not destroyed, nor made after these ranks were."""
        if self.is_alone or not (dist.is_available() and dist.is_initialized()):
            return not self.is_connected
        group = None if self._group is None else self._group()
        return group in dist.distributed_c10d._world.pg_map

    @property
    def group_name(self) -> str:
        """By which torch's functional collectives find the group; empty where this process is alone."""
        group = self.group
        return "" if group is None or self.is_alone else str(group.group_name)

    @property
    def meets_others(self) -> bool:
        """Whether an all-reduce is issued at all."""
        return self.size > 1 or self.is_simulated

    @property
    def state(self) -> GroupState:
        """The group's state, equal on all its members."""
        if self._state is None:
            group = self.group
            if group is not None and group not in _states:
                _states[group] = GroupState()
            self._state = _alone if group is None else _states[group]
        return self._state

    def device(self) -> torch.device:
        """Where the tensors of planning are, and those of the collectives of errors."""
        if "cpu" in self._device_types or not self._device_types:
            return torch.device("cpu")
        return torch.device(self._device_types[0], torch.accelerator.current_device_index())

    def reduce_device(self, preferred: torch.device) -> torch.device:
        """Where a step's vector is reduced: on every rank the device type that the last plan agreed on.

        Args:
            preferred: where this rank has its gradients, which alone decides nothing.
        """
        if not self.is_connected:
            return preferred
        kind = self.state.device_type or self.device().type
        if preferred.type == kind:
            return preferred
        if kind == "cpu":
            return torch.device("cpu")
        return torch.device(kind, torch.accelerator.current_device_index())

    def agree_on_device(self, devices: Sequence[torch.device]) -> None:
        """Choose where vectors are reduced: beside the gradients of any rank, if the backend can.

        Collective: every rank must call it, with the devices of its own gradients.
        """
        own = {device.type for device in devices}
        able = [kind for kind in self._device_types if kind != "cpu"]
        wanted = torch.tensor([kind in own for kind in able], dtype=torch.int64, device=self.device())
        found = self.all_reduce_(wanted, "max").tolist() if able else []
        chosen = next((kind for kind, is_wanted in zip(able, found, strict=True) if is_wanted), None)
        if chosen is not None or self.state.device_type is None:
            self.state.device_type = chosen or self.device().type

    def all_reduce_(self, tensor: Tensor, op: str) -> Tensor:
        """Reduce in place over all ranks: ``"sum"`` or ``"max"``."""
        if self.meets_others:
            began = time.monotonic()
            try:  # no context manager, which each step would pay for
                dist.all_reduce(tensor, _OPS[op], self.group)
            except RuntimeError as error:
                self._raise_if_lost(error, began)
                raise
        return tensor

    def _raise_if_lost(self, error: RuntimeError, began: float) -> None:
        raise_if_lost(error, self.group, self.rank, self.size, self.place, time.monotonic() - began)

    @contextmanager
    def _naming_lost_ranks(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            self._raise_if_lost(error, began)
            raise

    def any(self, *facts: bool) -> list[bool]:
        """For each fact whether it holds on some rank."""
        held = torch.tensor([int(fact) for fact in facts], dtype=torch.int64, device=self.device())
        return [bool(value) for value in self.all_reduce_(held, "max").tolist()]

    def gather(self, fact: Any) -> list[Any]:
        """Everybody's fact, in the order of ranks: for errors, and for a few bytes at planning."""
        if self.size == 1:
            return [fact]
        facts: list[Any] = [None] * self.size
        with self._naming_lost_ranks():
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

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run what may fail on some ranks only: afterwards every rank raises, or none.

        Collective: every rank must enter and leave it. An exception that isn't ours is chained to ours.
        """
        error: DistnormError | None = None
        try:
            yield
        except DistnormError as caught:
            error = caught
        except Exception as caught:
            error = DistnormError(f"{type(caught).__name__}: {caught}")
            error.__cause__ = caught
        self.raise_together(error)

    def raise_together(self, error: DistnormError | None) -> None:
        """Raise on every rank if any rank has an error; its kind is that of the lowest such rank. Every rank
        must call it, with its own error or `None`."""
        if self.size == 1:
            if error is not None:
                raise error
            return
        if not self.any(error is not None)[0]:
            return
        by_message: dict[tuple[type[DistnormError], str], list[int]] = {}
        mine = None if error is None else (type(error), self.shortened(str(error)))
        for rank, fact in enumerate(self.gather(mine)):
            if fact is not None:
                by_message.setdefault(fact, []).append(rank)
        (kind, only), ranks = next(iter(by_message.items()))
        if len(by_message) == 1 and len(ranks) == self.size:
            raise kind(only) from error
        facts = [f"on {name_ranks(who)}: {message}" for (_, message), who in by_message.items()]
        raise kind("; ".join(shown(facts))) from error

    def exchange(self, rows: Tensor, send: Mapping[int, int], receive: Mapping[int, int]) -> Tensor:
        """Send rows to some ranks, and get rows from some. Collective.

        Args:
            rows: [sum of send, c] on the CPU, for one rank after the other.
            send: ranks, ascending, each with the number of rows for it; this rank is among them.
            receive: ranks, ascending, each with the number of rows that it sends to this one.

        Returns:
            [sum of receive, c] on the CPU, from one rank after the other.
        """
        group = self.group
        assert group is not None
        rows = rows.contiguous().to(self.device())
        out = rows.new_empty(sum(receive.values()), rows.shape[1])
        with self._naming_lost_ranks():
            self._exchange(rows, out, send, receive, group)
        return out.cpu()

    def _exchange(
        self, rows: Tensor, out: Tensor, send: Mapping[int, int], receive: Mapping[int, int], group: Any
    ) -> None:
        if len(send) == len(receive) == self.size:
            dist.all_to_all_single(out, rows, list(receive.values()), list(send.values()), group=group)
            return
        outgoing = dict(zip(send, torch.split(rows, list(send.values())), strict=True))
        incoming = dict(zip(receive, torch.split(out, list(receive.values())), strict=True))
        incoming.pop(self.rank).copy_(outgoing.pop(self.rank))
        messages = [
            dist.P2POp(op, part, dist.get_global_rank(group, peer), group, _TAG)
            for op, parts in ((dist.irecv, incoming), (dist.isend, outgoing))
            for peer, part in parts.items()
            if len(part)
        ]
        for work in dist.batch_isend_irecv(messages) if messages else ():
            work.wait()


def reduce_partial_(buffer: Tensor, groups: Sequence[ProcessGroup | SimulatedGroup]) -> None:
    """Add up a buffer of partial gradients in place, over one mesh axis after the other.

    Every rank of every group must call it, with a buffer of the same length and dtype.
    """
    for group in groups:
        if isinstance(group, SimulatedGroup):
            group.add_up_(buffer)
        else:
            dist.all_reduce(buffer, dist.ReduceOp.SUM, group)


def ranks_of(group: ProcessGroup | SimulatedGroup) -> tuple[int, ...]:
    """The members of a group, by their ranks in the world."""
    return group.ranks if isinstance(group, SimulatedGroup) else tuple(dist.get_process_group_ranks(group))


def average_bucket(group: ProcessGroup, bucket: Any) -> Any:
    """What DDP does with a bucket of gradients that has no communication hook: a future of their average."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    return allreduce_hook(group, bucket)
