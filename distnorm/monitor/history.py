"""What is ordinary for a layer: the running mean and spread of its norm's logarithm."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Weight of the past at each monitored step: the average is over the last ten or so.
_BETA = 0.9
# Norms vary by a factor of two between steps until a layer has shown that its own vary less.
_USUAL_VARIANCE = math.log(2.0) ** 2
# So many standard deviations are ordinary, but no more than this power of the factor.
_DEVIATIONS, _WIDEST = 4.5, 1.5


class History:
    """A layer's norms up to now. Logarithms, since norms differ by factors, and one spike is soon forgotten.

    mean: m <- m + (1-b)/(1-b^n) (l - m), the bias-corrected average of l = ln(norm) over n steps, b = 0.9.
    spread: v <- b v + (1-b) (l - m)^2, from (ln 2)^2 on, with the mean of before.
    In both, l - m is cut to the reach, so that what is extraordinary doesn't become ordinary at once. During
    warm-up a norm beyond the reach begins all this anew: weights that are zero at first let little through.

    Attributes:
        count: monitored steps with a gradient: neither zero nor non-finite.
        zeros: monitored steps in a row up to now whose norm was exactly zero.
        largest: the largest norm.
    """

    __slots__ = ("count", "largest", "mean", "variance", "zeros")

    def __init__(self) -> None:
        self.count = self.zeros = 0
        self.mean, self.variance, self.largest = 0.0, _USUAL_VARIANCE, 0.0

    @property
    def average(self) -> float:
        """The geometric average of the norm; what it is worth depends on the count."""
        return math.exp(self.mean) if self.count else 0.0

    def reach(self, factor: float) -> float:
        """How many times the average is ordinary: `factor`, and up to its 1.5th power if norms vary much."""
        least = math.log(factor)
        return math.exp(min(_WIDEST * least, max(least, _DEVIATIONS * math.sqrt(self.variance))))

    def add(self, norm: float, factor: float, warmup: int) -> None:
        """Take in a monitored step's norm; a non-finite one says nothing, a zero one only that it is zero.

        Args:
            norm: what was measured.
            factor: what `reach` is asked with.
            warmup: monitored steps that warm-up takes.
        """
        if not math.isfinite(norm):
            return
        if norm == 0.0:
            self.zeros += 1
            return
        self.zeros = 0
        self.largest = max(self.largest, norm)
        reach, away = math.log(self.reach(factor)), math.log(norm) - self.mean
        if self.count == 0 or (self.count < warmup and abs(away) > reach):
            self.count, self.mean, self.variance = 1, math.log(norm), _USUAL_VARIANCE
            return
        self.count += 1
        away = min(max(away, -reach), reach)
        self.variance = _BETA * self.variance + (1.0 - _BETA) * away * away
        self.mean += away * (1.0 - _BETA) / (1.0 - _BETA**self.count)

    def state(self) -> list[float]:
        return [self.count, self.zeros, self.mean, self.variance, self.largest]

    @classmethod
    def of(cls, state: Sequence[float]) -> History:
        made = cls()
        made.count, made.zeros = int(state[0]), int(state[1])
        made.mean, made.variance, made.largest = (float(number) for number in state[2:])
        return made
