"""A norm that is not finite, raised when the next step begins: no step waits for its own norm.

All ranks raise at the same point, so that none is a step ahead of the others, whatever a caller does about
the error: a rank that refused a gradient in the step itself refuses it once more then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.errors import DisagreementError, DistnormError, NonFiniteGradientError
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


class Replays:
    """What the replays of captured steps did, counted on the device: no Python runs in a replay.

    Args:
        order: of the norm.

    Attributes:
        is_ready: whether a step may be captured: one has been made since the newest plan, so that all that
            outlives a step is in its place.
    """

    def __init__(self, order: float) -> None:
        self._order, self.is_ready, self._is_captured = order, False, False
        self._counts: Tensor | None = None  # int64: steps, those not finite, those of ranks that disagree
        self._counted, self._raised = 0, (0, 0)  # what the host knows of them

    def leaves_out(self, norm: Tensor) -> bool:
        """Whether a step of this norm isn't counted on the host: that of a dry run isn't at all, and one that
        is captured is counted here. Others get everything ready for those."""
        if kernels.is_captured():
            assert self._counts is not None
            self._counts[0].add_(1)
            self._is_captured = True
            return True
        if type(norm) is not Tensor:
            return True
        self.is_ready = True
        if self._counts is None:
            self._counts = torch.zeros(3, dtype=torch.int64, device=norm.device)
        elif self._counts.device != norm.device:
            self._counts = self._counts.to(norm.device)
        return False

    def require_ready(self) -> None:
        """Refuse to be captured before any step was made.

        Raises:
            DistnormError: a CUDA graph is being captured, and none was.
        """
        if not self.is_ready:
            kernels.refuse_capture(
                "expected a step that was made with the present parameters before, found none; call clip() "
                "once with gradients before the capture"
            )

    def count_bad(self, found: Tensor) -> None:
        """Count a step that is captured if its norm is not finite, or if ranks disagree.

        Args:
            found: fp64; begins with the norm, and whether the ranks measured the same.
        """
        assert self._counts is not None
        is_finite, is_agreed = found[0].isfinite(), found[1] != 0
        self._counts[1:].add_(torch.stack([~is_finite & is_agreed, ~is_agreed]))

    def new_steps(self) -> int:
        """How many replays there were since this was asked before. Waits for the device if any step was
        captured."""
        before, self._counted = self._counted, self._read()[0]
        return self._counted - before

    def forget(self) -> None:
        """Begin to count anew, in place, as graphs go on to count there."""
        self._counted, self._raised = 0, (0, 0)
        if self._counts is not None:
            self._counts.zero_()

    def check(self) -> None:
        """Raise if a replayed step was bad that has not been raised yet. Waits as `new_steps`.

        Raises:
            NonFiniteGradientError: a norm was not finite.
            DisagreementError: the ranks did not measure the same.
        """
        steps, *bad = self._read()
        (infinite, disagreed), self._raised = self._raised, (bad[0], bad[1])
        if bad[1] > disagreed:
            raise DisagreementError(
                f"replays of a CUDA graph: expected every rank to measure the same in {steps} steps, found "
                f"{bad[1] - disagreed} in which they did not, made without gradients; a clip() outside of "
                "the graph, with clip.nonfinite: raise_now, says what differs"
            )
        if bad[0] > infinite:
            raise NonFiniteGradientError(
                f"replays of a CUDA graph: expected a finite total norm of order {self._order:g} in {steps} "
                f"steps, found {bad[0] - infinite} in which it was not, made without gradients; a clip() "
                "outside of the graph names the parameters",
                math.nan,
                (),
            )

    def _read(self) -> list[int]:
        if self._counts is None or not self._is_captured:
            return [0, 0, 0]
        with kernels.plain_operators():
            found: list[int] = self._counts.tolist()
            return found


class DeferredRaise:
    """Lets a step whose norm is not finite pass without its gradients, and raises when the next begins.

    Args:
        order: of the norm.
        replays: counts what is captured.
    """

    def __init__(self, order: float, replays: Replays) -> None:
        self._order, self._replays = order, replays
        self._unread: _Unread | None = None
        self._refusal: DistnormError | None = None
        self._copy: kernels.AsyncHostCopy | None = None

    def forget(self) -> None:
        """Forget the step before: other state was loaded. Every rank must call it."""
        self._unread = self._refusal = None
        self._replays.forget()

    def refused(self, error: DistnormError) -> None:
        """Remember that this rank alone has raised in a step that the others have made."""
        self._refusal = error

    @staticmethod
    def marks_of(gradients: Gradients) -> kernels.FiniteMarks | None:
        """Which of a step's gradients are not finite, before any of them is changed; `None` where the step is
        captured, as replays are not asked for names. Waits for nothing."""
        if kernels.is_captured():
            return None
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
        if found is None or type(found) is not Tensor:  # a dry run has no values
            return
        if kernels.is_captured():
            self._replays.count_bad(found)
        elif marks is not None:
            self._copy = kernels.AsyncHostCopy(found, self._copy)
            self._unread = _Unread(number, meter.ranks, self._copy, meter.shards, marks)

    def check(self) -> None:
        """Raise if the step before was not finite. Collective: every rank must call it before its next step.

        Raises:
            NonFiniteGradientError: on every rank, naming the step, the gradients and their ranks.
            DisagreementError: on every rank that measured: the ranks did not measure the same.
            DistnormError: on a rank that refused a gradient in that step: the same error.
        """
        if kernels.is_captured():  # it waits for the first step that is not
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
        if unread is not None and not unread.was_raised:
            unread.was_raised = True
            self._raise_alone(unread)
        self._replays.check()

    def _raise_alone(self, unread: _Unread) -> None:
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
