"""Several things that travel in one all-reduce, one behind the other; among them a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.errors import DistnormError
from distnorm.measure.exchange import Lanes
from distnorm.measure.header import on_device
from distnorm.plan.collectives import Ranks

Local = Callable[[Sequence[Tensor | None], torch.device], Tensor]


class Part:
    """Lanes made of a function: see `Lanes.local`."""

    def __init__(self, length: int, local: Local) -> None:
        self.length, self._local = length, local

    def local(self, gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
        return self._local(gradients, device)


class Joined:
    """Lanes one behind the other."""

    def __init__(self, parts: Sequence[Lanes]) -> None:
        self._parts = tuple(parts)

    @property
    def length(self) -> int:
        return sum(part.length for part in self._parts)

    def local(self, gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
        return torch.cat([part.local(gradients, device) for part in self._parts])

    def split(self, reduced: Tensor) -> list[Tensor]:
        """What each part was reduced to."""
        return list(torch.split(reduced, [part.length for part in self._parts]))


class Loss:
    """The newest loss: each rank's own, of which the mean over the ranks that have one is wanted.

    Args:
        ranks: who takes part.
        op: by which lanes are reduced.
    """

    def __init__(self, ranks: Ranks, op: str) -> None:
        self._ranks, self._added = ranks, op == "sum"
        self._newest: Tensor | float | None = None
        self._was_given = False

    def note(self, loss: Tensor | float | None) -> None:
        """Keep it for the next measurement.

        Raises:
            DistnormError: it is no single number.
        """
        is_one = loss.numel() == 1 if isinstance(loss, Tensor) else isinstance(loss, float | int | None)
        if not is_one:
            raise DistnormError(f"loss: expected a 0-d tensor, a number or None, found {loss!r}")
        self._newest = loss.detach() if isinstance(loss, Tensor) else loss

    @property
    def length(self) -> int:
        return 2 if self._added else self._ranks.size

    def local(self, gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """The loss and a one, to be added up; for a maximum a lane for each rank, which loses no summand."""
        loss = self._newest
        if isinstance(loss, Tensor):
            loss = kernels.moved(loss.reshape(1), device, torch.float64)
        elif loss is not None:
            loss = on_device([loss], device)
        if self._added:
            return torch.zeros(2, dtype=torch.float64, device=device) if loss is None else _with_one(loss)
        lanes = torch.full((self._ranks.size,), -math.inf, dtype=torch.float64, device=device)
        if loss is not None:  # a maximum may lose NaN
            lanes[self._ranks.rank] = loss[0].nan_to_num(math.inf, math.inf, math.inf)
        return lanes

    def forget(self) -> None:
        """The step that it was of is over."""
        self._newest = None

    def mean(self, reduced: Tensor) -> Tensor:
        """The mean over the ranks that gave one, 0-d fp64; not finite if any of theirs isn't.

        Raises:
            DistnormError: no rank gave one. On a device only the first step is asked, which waits for it.
        """
        if self._added:
            total, count = reduced
        else:
            given = reduced > -math.inf
            total, count = torch.where(given, reduced, 0.0).sum(), given.sum().double()
        if (count.is_cpu or not self._was_given) and float(count.cpu().numpy()) == 0:
            raise DistnormError(
                "expected a loss with every step, as the configuration looks at it; found none on any rank: "
                "call note(loss=...) before"
            )
        self._was_given = True
        mean: Tensor = total / count
        return mean


def _with_one(loss: Tensor) -> Tensor:
    return torch.cat([loss, torch.ones_like(loss)])


FunctionPayload, PayloadParts = Part, Joined
