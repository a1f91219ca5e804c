"""The one all-reduce of a measurement: every rank's statistic, and its consensus header beside it.

The vector has two forms. In the full one each field of a header is an element, and a statistic may be wide.
In the packed one the header is a single number, which shows only whether all ranks measured the same; if they
did not, those that read the result exchange their full headers in a second all-reduce. Two elements arrive
many times sooner through gloo, which cuts a vector into messages of one element each.

All ranks must use one form, so it is a property of the group: packed, until all ranks together make a plan
that needs the full one. Likewise a packed vector has a third element, by which replicas are compared but for
their last bits (see `distnorm.measure.replica_check`), once such replicas were found; the full form always
has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.measure.header import FIELDS, DecodedHeader, Header, Packing
from distnorm.measure.norms import Norm
from distnorm.measure.reduced import ReducedStatistics, UnreadStatistics
from distnorm.plan.collectives import Ranks
from distnorm.plan.stops import Form, Stops, Wanted, finish

with kernels.plain_operators():  # the first import may be within a FakeTensorMode
    _NOTHING = torch.empty(0, dtype=torch.float64, device="cpu")
_WIDTH = 8  # fp64 values of a statistic in the full form, for orders up to 27 and inf


class Payload(Protocol):
    """Further values that a rank adds to the vector of one measurement."""

    @property
    def length(self) -> int:
        """How many fp64 values, the same on all ranks."""

    def local(self, gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """This rank's, [length] on the device, of its local gradients, in the order of its shards."""


class Exchange:
    """Gives every rank the total norm of all ranks' statistics.

    Args:
        ranks: who takes part.
        norm: which norm.
    """

    def __init__(self, ranks: Ranks, norm: Norm) -> None:
        self._ranks, self._norm = ranks, norm
        self._packing = Packing(ranks.rank, ranks.size)
        self._numbered: tuple[Header | None, int | None] = (None, None)  # the newest header, in one number

    def unread(
        self, statistic: Tensor, header: Header, payload: Tensor | int, replicas: float | Tensor
    ) -> Stops[ReducedStatistics | UnreadStatistics]:
        """`reduce`, on a rank that doesn't read the result on the host."""
        if not self._ranks.state.is_packed or not self.can_pack:
            return (yield from self.reduce(statistic, header, payload, replicas))
        if not header.has_statistic:
            statistic = torch.full_like(statistic, math.nan)
        numbers = [replicas] if self._ranks.state.compares_replicas else []
        values = payload if isinstance(payload, Tensor) else statistic[:0]
        vector = yield self._packed(statistic, header, values, numbers)
        return UnreadStatistics(vector, bool(numbers), self._packing, self._norm)

    def _packed(
        self, statistic: Tensor, header: Header, payload: Tensor, numbers: Sequence[float | Tensor]
    ) -> Wanted:
        """The all-reduce of ``[header, statistic, replicas if they are compared, payload ...]``."""
        device = statistic.device
        parts = [kernels.on_device([self._packing.pack(header)], device), statistic]
        parts += [_element(number, device) for number in numbers]
        return self._ranks, _joined(parts, payload), "sum"

    def header_number(self, header: Header, payload: object) -> int | None:
        """The header in one number, where that and the statistic are all that is reduced; else `None`."""
        state = self._ranks.state
        if payload is not None or not state.is_packed or not self.can_pack or state.compares_replicas:
            return None
        if header is not self._numbered[0]:
            self._numbered = header, self._packing.pack(header) if header.has_statistic else None
        return self._numbered[1]

    def of_vector(self, vector: Tensor) -> Stops[UnreadStatistics]:
        """`unread` of this rank's header and statistic, [2] fp64, which are one tensor already."""
        reduced = yield self._ranks, vector, "sum"
        return UnreadStatistics(reduced, False, self._packing, self._norm)

    def form_in_graph(
        self, payload_length: int, preferred: torch.device, *, is_full: bool = False
    ) -> Form | None:
        """What a graph has to know of the all-reduce, as it is now; `None` where this rank meets nobody.

        Args:
            payload_length: of the payload.
            preferred: where this rank has its gradients.
            is_full: whether the group will use the full form, whatever it uses now.
        """
        if not self._ranks.meets_others:
            return None
        state, device = self._ranks.state, self._ranks.reduce_device(preferred)
        is_full = is_full or not state.is_packed or not self.can_pack
        fixed = len(FIELDS) + max(_WIDTH, self._norm.width) if is_full else 2
        length = fixed + int(is_full or state.compares_replicas) + payload_length
        return Form(length, self._norm.op, self._ranks.group_name, device)

    @property
    def can_pack(self) -> bool:
        """Whether this norm's statistic fits the packed form."""
        return self._norm.op == "sum" and self._norm.width == 1

    def use_full_form(self) -> None:
        """From now on, on this group. Every rank must call it at the same point."""
        self._ranks.state.is_packed = False
        self._ranks.state.compares_replicas = True  # only packed headers carry the bits of replicas

    def __call__(
        self,
        statistic: Tensor | None,
        header: Header,
        payload: Tensor | int = 0,
        replicas: float | Tensor = 0.0,
    ) -> ReducedStatistics:
        """`reduce`, with its all-reduce. Collective."""
        return finish(self.reduce(statistic, header, payload, replicas))

    def reduce(
        self,
        statistic: Tensor | None,
        header: Header,
        payload: Tensor | int = 0,
        replicas: float | Tensor = 0.0,
    ) -> Stops[ReducedStatistics]:
        """Reduce this rank's statistic, [width] fp64, or none, and its header. Stops at the all-reduce.

        Args:
            statistic: of what this rank counts.
            header: this rank's consensus header.
            payload: [length] fp64, reduced by the norm's op; or, on a rank that has none, its length on
                other ranks. The length must be the same on all ranks.
            replicas: this rank's summand of the comparison of replicas.
        """
        device = statistic.device if statistic is not None else torch.device("cpu")
        device = self._ranks.reduce_device(device)
        if statistic is None and isinstance(payload, int):  # no values of the caller's
            with kernels.plain_operators():
                return finish(self._reduced(None, header, 0, replicas, device))
        return (yield from self._reduced(statistic, header, payload, replicas, device))

    def _reduced(
        self,
        statistic: Tensor | None,
        header: Header,
        payload: Tensor | int,
        replicas: float | Tensor,
        device: torch.device,
    ) -> Stops[ReducedStatistics]:
        if isinstance(payload, int):
            is_nothing = not payload and device.type == "cpu"
            payload = _NOTHING if is_nothing else torch.zeros(payload, dtype=torch.float64, device=device)
        compares = self._ranks.state.compares_replicas
        if not self._ranks.state.is_packed or not (self.can_pack or statistic is None):
            return (yield from self._full(statistic, header, payload, replicas if compares else None))
        if statistic is None or not header.has_statistic:
            statistic = torch.full((1,), math.nan, dtype=torch.float64, device=device)
        numbers = [replicas] if compares else []
        if not len(payload) and kernels.on_host(statistic):
            return (yield from self._packed_on_host(float(statistic.numpy()[0]), header, numbers))
        vector = yield self._packed(statistic, header, payload, numbers)
        agreed = self._packing.agreed(vector[0])
        finalised = self._norm.finalise(vector[1:2]) if self.can_pack else vector[1]
        total_norm = torch.where(agreed, finalised, math.nan)
        return ReducedStatistics(
            total_norm,
            vector[2 + len(numbers) :],
            lambda: self._decode(vector[0].item(), header, payload[:0]),
            True,
            agreed,
            finalised,
            vector[2] if numbers else None,
        )

    def _packed_on_host(
        self, statistic: float, header: Header, numbers: list[float | Tensor]
    ) -> Stops[ReducedStatistics]:
        """The same for a few numbers in the host's memory, in Python: fewer operators, and no wait."""
        packed = self._packing.pack(header)
        values = [packed, statistic, *map(float, numbers)]
        # Under Join a rank measures alone, and stops too, so that a graph which would reduce finds that out.
        if self._ranks.meets_others or self._ranks.is_alone:
            vector = torch.tensor(values, dtype=torch.float64, device="cpu")
            values = (yield self._ranks, vector, "sum").tolist()
        headers, total, *differences = values
        agreed = self._packing.agreed_on_host(headers)
        norm = self._norm.finalise_number(total) if self.can_pack else math.nan
        total_norm = torch.tensor(norm if agreed else math.nan, dtype=torch.float64, device="cpu")
        return ReducedStatistics(
            total_norm,
            _NOTHING,
            lambda: self._decode(headers, header, _NOTHING),
            True,
            agreed,
            total_norm if agreed else torch.tensor(norm, dtype=torch.float64, device="cpu"),
            differences[0] if differences else None,
        )

    def _decode(self, headers: float, header: Header, nothing: Tensor) -> DecodedHeader:
        nonraising = self._packing.nonraising(headers)
        if nonraising:  # they don't read the result, so there is no second exchange
            return DecodedHeader.of_nonraising(nonraising, header)
        with kernels.plain_operators():
            return finish(self._full(None, header, nothing, None)).decode()

    def _full(
        self, statistic: Tensor | None, header: Header, payload: Tensor, replicas: float | Tensor | None
    ) -> Stops[ReducedStatistics]:
        """All-reduce ``[nan, header ..., padding ..., statistic ..., replicas, payload ...]``.

        A NaN has an element of its own, since a maximum may lose it. The padding gives the vectors of
        different norms one length, so that ranks which disagree about the norm find out.
        """
        norm, device = self._norm, payload.device
        if statistic is None:
            statistic = norm.zeros(device)
        nan = statistic.isnan()
        fields = kernels.on_device([*header.full(norm.op), *[0] * (_WIDTH - norm.width)], device)
        parts = [nan.any().double().view(1), fields, torch.where(nan, 0.0, statistic)]
        end = sum(map(len, parts))
        if replicas is not None:
            parts.append(_element(replicas, device))
        vector = yield self._ranks, _joined(parts, payload), norm.op
        headers, statistic = vector[: len(FIELDS)], vector[end - norm.width : end]
        agreed = header.agreed(norm.op, self._ranks.size, headers)
        total_norm = torch.where(agreed & (headers[0] == 0), norm.finalise(statistic), math.nan)
        return ReducedStatistics(
            total_norm,
            vector[len(vector) - len(payload) :],
            lambda: _read_headers(headers, agreed),
            False,
            agreed,
            total_norm,
            None if replicas is None or norm.op != "sum" else vector[end],
        )


def _read_headers(headers: Tensor, agreed: Tensor) -> DecodedHeader:
    with kernels.plain_operators():
        return DecodedHeader.of(headers.tolist(), bool(agreed))


def _joined(parts: list[Tensor], payload: Tensor) -> Tensor:
    return torch.cat([*parts, payload] if len(payload) else parts)


def _element(number: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(number, Tensor):
        return kernels.moved(number.reshape(1), device)
    return kernels.on_device([number], device)
