"""A norm that is not finite, raised when the next step begins: no step waits for its own norm.

All ranks raise at the same point, so that none is a step ahead of the others, whatever a caller does about
the error: a rank that refused a gradient in the step itself refuses it once more then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.errors import DisagreementError, DistnormError
from distnorm.measure import diagnosis
from distnorm.measure.gradients import Gradients
from distnorm.measure.meter import Meter
from distnorm.plan.collectives import Ranks
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

    @staticmethod
    def marks_of(gradients: Gradients) -> kernels.FiniteMarks:
        """Which of a step's gradients are not finite, before any of them is changed. Waits for nothing."""
        return gradients.marks or kernels.FiniteMarks.of_largest(gradients.tensors)

    def remember(
        self, number: int, meter: Meter, found: Tensor | None, marks: kernels.FiniteMarks | None
    ) -> None:
        """Remember a step whose error is raised later; `None` for others. Waits for nothing.

        Args:
            number: the step's, from 1.
            meter: what measured.
            found: fp64; begins with the norm, and whether the ranks measured the same.
            marks: which of the gradients are not finite.
        """
        # A dry run has no values; replays of a graph don't come here.
        if found is not None and marks is not None and type(found) is Tensor and not _is_capturing():
            self._copy = kernels.AsyncHostCopy(found, self._copy)
            self._unread = _Unread(number, meter.ranks, self._copy, meter.shards, marks)

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
        if unread is None or self._is_good(unread):
            return
        with kernels.plain_operators():
            where = diagnosis.gathered(unread.ranks, unread.bad_names())
            self._raise(unread, where, "no single gradient; their norm leaves fp64's range")

    def check_alone(self) -> None:
        """The same where no other rank may take part, once; `check` raises again, with all names."""
        unread = self._unread
        if unread is None or unread.was_raised or _is_capturing():
            return
        unread.was_raised = True
        if self._is_good(unread):
            return
        with kernels.plain_operators():
            where = [(name, unread.ranks.rank) for name in unread.bad_names()]
            self._raise(unread, where, "none of this rank's; the next step's clip() names those of all ranks")

    @staticmethod
    def _is_good(unread: _Unread) -> bool:
        norm, agreed = unread.found.numbers()[:2]  # without an operator, in whatever mode the caller is
        if not agreed:
            raise DisagreementError(
                f"step {unread.number}: expected every rank to measure the same, and replicas to hold equal "
                "gradients, found that they did not, so the step was made without gradients; with "
                "clip.nonfinite: raise_now the ranks say what differs"
            )
        return bool(norm < float("inf"))

    def _raise(self, unread: _Unread, where: Sequence[tuple[str, int]], otherwise: str) -> NoReturn:
        norm = float(unread.found.values()[0])
        diagnosis.raise_named(self._order, norm, tuple(where), f"step {unread.number}: ", otherwise)


def _is_capturing() -> bool:
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return started and torch.cuda.is_current_stream_capturing()
