"""A norm that is not finite, raised when the next step begins: no step waits for its own norm.

All ranks raise at the same point, so that none is a step ahead of the others, whatever a caller does about
the error: a rank that refused a gradient in the step itself refuses it once more then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.errors import DisagreementError, DistnormError
from distnorm.measure import diagnosis
from distnorm.measure.exchange import ReducedStatistics
from distnorm.measure.gradients import Gradients
from distnorm.measure.meter import Meter
from distnorm.plan.collectives import Ranks
from distnorm.policies.deciding import Outcome
from distnorm.policies.decision import is_finite
from distnorm.sources.shards import GradShard


@dataclass(slots=True)
class _Unread:
    """A step whose norm is on its way to the host.

    Args:
        number: the step's, from 1.
        ranks: who took part.
        found: the norm, and whether the ranks measured the same.
        shards: whose gradients.
        marks: which of these are not finite.
        was_raised: whether this rank has raised it alone.
    """

    number: int
    ranks: Ranks
    found: kernels.AsyncHostCopy
    shards: Sequence[GradShard]
    marks: kernels.FiniteMarks
    was_raised: bool = False

    def bad_names(self) -> list[str]:
        """This rank's gradients that are not finite. Waits for the device."""
        return [self.shards[position].name for position in self.marks.bad()]


class DeferredRaise:
    """Lets a step whose norm is not finite pass without its gradients, and raises when the next begins.

    Args:
        order: of the norm.
    """

    def __init__(self, order: float) -> None:
        self._order = order
        self._unread: _Unread | None = None
        self._refusal: DistnormError | None = None
        self._copy: kernels.AsyncHostCopy | None = None

    def forget(self) -> None:
        """Forget the step before: other state was loaded. Every rank must call it."""
        self._unread = self._refusal = None

    def refused(self, error: DistnormError) -> None:
        """Remember that this rank alone has raised in a step that the others have made."""
        self._refusal = error

    def without_gradients(
        self, number: int, meter: Meter, gradients: Gradients, reduced: ReducedStatistics, outcome: Outcome
    ) -> Outcome:
        """Remember a step, and say of it that it is skipped where its norm is not finite. Waits for nothing.

        Args:
            number: the step's, from 1.
            meter: what measured.
            gradients: what was measured.
            reduced: what the all-reduce gave.
            outcome: what was decided.

        Returns:
            What was decided, its result `skipped` where the norm is not finite. The caller zeroes the
            gradients there, or leaves the step out.
        """
        norm, agreed, result = reduced.total_norm, reduced.agreed, outcome.result
        if type(norm) is Tensor and not _is_capturing():  # a dry run has no values; replays don't come here
            is_agreed = agreed.double() if isinstance(agreed, Tensor) else torch.full_like(norm, agreed)
            found = self._copy = kernels.AsyncHostCopy(torch.stack([norm, is_agreed]), self._copy)
            marks = gradients.marks or kernels.FiniteMarks.of_largest(gradients.tensors)
            self._unread = _Unread(number, meter.ranks, found, meter.shards, marks)
        is_good = is_finite(norm)
        result = replace(
            result,
            clipped_norm=result.clipped_norm.where(is_good, 0.0),
            skipped=result.skipped | ~is_good,
        )
        return replace(outcome, result=result)

    def check(self) -> None:
        """Raise if the step before was not finite. Collective: every rank must call it before its next step.

        Raises:
            NonFiniteGradientError: on every rank, naming the step, the gradients and their ranks.
            DisagreementError: on every rank that measured: the ranks did not measure the same.
            DistnormError: on a rank that refused a gradient in that step: the same error.
        """
        if _is_capturing():
            return
        (unread, refusal), self._unread, self._refusal = (self._unread, self._refusal), None, None
        if refusal is not None:
            raise refusal
        with kernels.plain_operators():
            if unread is not None and self._is_bad(unread):
                where = diagnosis.gathered(unread.ranks, unread.bad_names())
                self._raise(unread, where, "no single gradient; their norm leaves fp64's range")

    def check_alone(self) -> None:
        """The same where no other rank may take part, once; `check` raises again, with all names."""
        unread = self._unread
        if unread is None or unread.was_raised or _is_capturing():
            return
        unread.was_raised = True
        with kernels.plain_operators():
            if self._is_bad(unread):
                where = [(name, unread.ranks.rank) for name in unread.bad_names()]
                self._raise(
                    unread, where, "none of this rank's; the next step's clip() names those of all ranks"
                )

    @staticmethod
    def _is_bad(unread: _Unread) -> bool:
        norm, agreed = unread.found.values().tolist()
        if not agreed:
            raise DisagreementError(
                f"step {unread.number}: expected every rank to measure the same, and replicas to hold equal "
                "gradients, found that they did not, so the step was made without gradients; with "
                "clip.nonfinite: raise_now the ranks say what differs"
            )
        return not norm < float("inf")

    def _raise(self, unread: _Unread, where: Sequence[tuple[str, int]], otherwise: str) -> NoReturn:
        norm = float(unread.found.values()[0])
        diagnosis.raise_named(self._order, norm, tuple(where), f"step {unread.number}: ", otherwise)


def _is_capturing() -> bool:
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return started and torch.cuda.is_current_stream_capturing()
