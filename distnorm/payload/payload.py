"""Several payloads in one all-reduce, one behind the other; and the payload of the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.errors import DistnormError
from distnorm.measure.exchange import Payload
from distnorm.plan.collectives import Ranks


class PayloadParts:
    """Payloads one behind the other."""

    def __init__(self, parts: Sequence[Payload]) -> None:
        self._parts = tuple(parts)

    @property
    def length(self) -> int:
        return sum(part.length for part in self._parts)

    def local(self, gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
        return torch.cat([part.local(gradients, device) for part in self._parts])

    def place_of(self, part: Payload) -> slice:
        """Where the values of one part are."""
        start = sum(one.length for one in self._parts[: self._parts.index(part)])
        return slice(start, start + part.length)

    def split(self, reduced: Tensor) -> list[Tensor]:
        """What each part was reduced to."""
        return list(torch.split(reduced, [part.length for part in self._parts]))


class LossPayload:
    """The newest loss: each rank's own, of which the mean over the ranks that have one is wanted.

    Args:
        ranks: who takes part.
        op: by which payloads are reduced.
    """

    def __init__(self, ranks: Ranks, op: str) -> None:
        self._ranks, self._is_sum = ranks, op == "sum"
        self._newest: Tensor | float | None = None
        self._was_given = False
        self._gave = False  # this rank, in the newest step that was not captured
        self._is_captured = False  # the newest loss was noted within a graph

    def note(self, loss: Tensor | float | None, *, keep: bool = False) -> None:
        """Keep its value for the next measurement; the tensor may be overwritten afterwards.

        Args:
            loss: `None` of a rank that has none.
            keep: `None` leaves a loss that was noted before.

        Raises:
            DistnormError: it is no single number.
        """
        is_one = loss.numel() == 1 if isinstance(loss, Tensor) else isinstance(loss, float | int | None)
        if not is_one:
            raise DistnormError(f"loss: expected a 0-d tensor, a number or None, found {loss!r}")
        if loss is None and keep:
            return
        self._newest = loss.detach().clone() if isinstance(loss, Tensor) else loss
        self._is_captured = kernels.is_captured()

    @property
    def length(self) -> int:
        return 2 if self._is_sum else self._ranks.size

    def local(self, gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """The loss and a one, to be added up; for a maximum a value for each rank, which loses no summand."""
        fill = 0.0 if self._is_sum else -math.inf
        values = torch.full((self.length,), fill, dtype=torch.float64, device=device)
        loss = self._newest
        self._refuse_old_loss()
        if loss is None:
            return values
        if isinstance(loss, Tensor):
            loss = kernels.moved(loss.reshape(()), device, torch.float64)
            if not self._is_sum:  # a maximum may lose NaN
                loss = loss.nan_to_num(math.inf, math.inf, math.inf)
        elif not self._is_sum and not math.isfinite(loss):
            loss = math.inf
        mine = values[0 if self._is_sum else self._ranks.rank]
        # A number that is assigned would be copied from the host's memory, which waits.
        if isinstance(loss, Tensor):
            mine.copy_(loss)
        else:
            mine.fill_(loss)
        if self._is_sum:
            values[1].fill_(1.0)
        return values

    def _refuse_old_loss(self) -> None:
        """Refuse what would give every replay the loss of this step."""
        loss = self._newest
        if not kernels.is_captured():
            self._gave = loss is not None
        elif isinstance(loss, Tensor) and not self._is_captured:
            kernels.refuse_capture("expected note(loss=...) within the graph, found it before")
        elif loss is not None and not isinstance(loss, Tensor):
            kernels.refuse_capture(
                f"expected a loss in a tensor, which every replay reads, found the number {loss}"
            )
        elif loss is None and self._gave:
            kernels.refuse_capture(
                "expected note(loss=...) within the graph, as in the step before, found none"
            )

    def forget(self) -> None:
        """The step that it was of is over."""
        self._newest = None

    def mean(self, reduced: Tensor) -> Tensor:
        """The mean over the ranks that gave one, 0-d fp64; not finite if any of theirs isn't.

        Raises:
            DistnormError: no rank gave one. On a device only the first step is asked, which waits for it.
        """
        if self._is_sum:
            total, count = reduced
        else:
            given = reduced > -math.inf
            total, count = torch.where(given, reduced, 0.0).sum(), given.sum().double()
        if self._is_known_to_be_none(count):
            raise DistnormError(
                "expected a loss with every step, as a policy uses it; found none on any rank: "
                "call note(loss=...) before"
            )
        mean: Tensor = total / count
        return mean

    def _is_known_to_be_none(self, count: Tensor) -> bool:
        if kernels.on_host(count):
            return float(count.numpy()) == 0
        if type(count) is not Tensor or self._was_given:  # a dry run's tensors have no values
            return False
        self._was_given = True
        return float(count.item()) == 0


def join_payloads(of_policies: PayloadParts | None, snapshot: Payload | None) -> PayloadParts | None:
    """What a step sends beside its statistic; `None` if that is nothing."""
    parts = [part for part in (of_policies, snapshot) if part is not None]
    return PayloadParts(parts) if parts else None


def split_payload(
    reduced: Tensor, of_policies: PayloadParts | None, snapshot: Payload | None
) -> tuple[Tensor | None, Tensor | None]:
    """The reduced payloads of policies and of a snapshot; `None` where there is none."""
    length = 0 if of_policies is None else of_policies.length
    mine = None if of_policies is None or not len(reduced) else reduced[:length]
    return mine, None if snapshot is None else reduced[length:]
