"""A norm that is not finite, raised when the next step begins: the step itself waits for no device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.errors import DisagreementError
from distnorm.measure import diagnosis
from distnorm.measure.exchange import ReducedStatistics
from distnorm.measure.gradients import Gradients
from distnorm.measure.meter import Meter
from distnorm.plan.collectives import Ranks
from distnorm.policies.deciding import Outcome


@dataclass(frozen=True, slots=True)
class _Unread:
    """A step whose norm is on its way to the host.

    Args:
        number: the step's, from 1.
        ranks: who took part.
        found: the norm, and whether the ranks measured the same.
        names: of the gradients, by position.
        marks: what the measurement left behind of these; `None` where there is nothing.
    """

    number: int
    ranks: Ranks
    found: kernels.AsyncHostCopy
    names: Sequence[str]
    marks: kernels.FiniteMarks | None

    def mine(self) -> list[str]:
        """This rank's gradients that are not finite. Waits for the device."""
        return [] if self.marks is None else [self.names[position] for position in self.marks.bad()]


class DeferredRaise:
    """Lets a step whose norm is not finite pass without effect, and raises when the next begins.

    Args:
        order: of the norm.
    """

    def __init__(self, order: float) -> None:
        self._order = order
        self._unread: _Unread | None = None

    def without_effect(
        self,
        number: int,
        meter: Meter,
        gradients: Gradients,
        reduced: ReducedStatistics,
        outcome: Outcome,
        scales: bool,
    ) -> Outcome:
        """Make a step harmless on the device, if its norm is not finite, and remember it. Waits for nothing.

        Args:
            number: the step's, from 1.
            meter: what measured.
            gradients: what was measured; they become zero.
            reduced: what the all-reduce gave.
            outcome: what was decided.
            scales: whether gradients may be changed; else the result says that the step must be skipped.
        """
        norm, agreed, result = reduced.total_norm, reduced.agreed, outcome.result
        if type(norm) is Tensor and not _is_capturing():  # a dry run has no values; replays don't come here
            is_agreed = agreed.double() if isinstance(agreed, Tensor) else torch.full_like(norm, agreed)
            found = kernels.AsyncHostCopy(torch.stack([norm, is_agreed]))
            names = [shard.name for shard in meter.shards]
            self._unread = _Unread(number, meter.ranks, found, names, gradients.marks)
        if scales:
            gradients.zero_unless_(result.is_finite)
            return outcome
        return replace(outcome, result=replace(result, skipped=result.skipped | ~result.is_finite))

    def check(self) -> None:
        """Raise if the step before was not finite. Collective: every rank must call it before its next step.

        Raises:
            NonFiniteGradientError: on every rank, naming the step, the gradients and their ranks.
            DisagreementError: on every rank that measured: the ranks did not measure the same.
        """
        unread, self._unread = self._unread, None
        if unread is not None and self._is_bad(unread):
            self._raise(unread, diagnosis.gathered(unread.ranks, unread.mine()))

    def check_alone(self) -> None:
        """The same where no other rank may take part: it names this rank's gradients alone, and `check` will
        raise again."""
        unread = self._unread
        if unread is not None and self._is_bad(unread):
            self._raise(unread, [(name, unread.ranks.rank) for name in unread.mine()])

    @staticmethod
    def _is_bad(unread: _Unread) -> bool:
        if _is_capturing():
            return False
        norm, agreed = unread.found.values().tolist()
        if not agreed:  # a rank with a gradient that can't be measured has raised alone, and isn't here
            raise DisagreementError(
                f"step {unread.number}: expected every rank to measure the same, found that they did not, so "
                "the step was made without effect; with clip.nonfinite: raise_now the ranks say what differs"
            )
        return not norm < float("inf")

    def _raise(self, unread: _Unread, where: Sequence[tuple[str, int]]) -> NoReturn:
        norm = float(unread.found.values()[0])
        diagnosis.raise_named(self._order, norm, tuple(where), f"step {unread.number}: ")


def _is_capturing() -> bool:
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return started and torch.cuda.is_current_stream_capturing()
