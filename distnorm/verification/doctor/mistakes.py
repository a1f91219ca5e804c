"""The mistakes that are distinguished, and what a factor between two gradients can mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum


class Mistake(str, Enum):
    """What is wrong with a gradient, or with what it was computed from."""

    WEIGHTS = "other weights"
    BATCH = "another batch"
    MISSING = "missing parameter"
    EXTRA = "parameter that the reference lacks"
    COVERAGE = "missing pieces"
    IGNORED = "no gradient"
    ZERO = "zero"
    FROZEN = "frozen parameter that learns"
    NON_FINITE = "not finite"
    SCALED = "scaled"
    UNREDUCED = "not reduced"
    UNGATHERED = "not gathered"
    WRONG_AXIS = "reduced over another axis"
    REDUCED_AGAIN = "reduced again in each micro-batch"
    UNEQUAL = "parts of the batch weigh unequally"
    NOT_ZEROED = "added to the gradient of before"
    STALE = "stale"
    SWAPPED = "another piece"
    TRANSPOSED = "transposed"
    PERMUTED = "elements in other places"
    REPLICAS = "replicas differ"
    ACTIVATIONS = "computed from wrong activations"
    UNEXPLAINED = "wrong, and explained by no mistake that the doctor knows"


@dataclass(frozen=True, slots=True)
class Explanation:
    """What explains a difference.

    Args:
        mistake: its kind.
        text: the fact, as a clause.
        ranks: where it shows.
        axes: the mesh axes that it is about.
        factor: the factor, where there is one.
        others: what else the evidence is consistent with.
    """

    mistake: Mistake
    text: str
    ranks: tuple[int, ...] = ()
    axes: tuple[str, ...] = ()
    factor: float | None = None
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What the readings of a difference need to know of the run.

    Args:
        axes: mesh axis -> the sets of ranks that differ only by their coordinate on it.
        microbatches: how many micro-batches a step has.
        parts: into how many parts the reference's batch was cut; 1 where it wasn't.
    """

    axes: Mapping[str, Sequence[tuple[int, ...]]]
    microbatches: int = 1
    parts: int = 1

    def size(self, axis: str) -> int:
        """Number of ranks along an axis."""
        return max((len(line) for line in self.axes[axis]), default=1)

    def line(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks that differ from one by their coordinate on an axis only."""
        return next((tuple(line) for line in self.axes[axis] if rank in line), (rank,))


def nearly(value: float, target: float, tolerance: float) -> bool:
    """Whether a factor is another one, but for rounding."""
    return abs(value - target) <= max(tolerance, 1e-6) * max(abs(target), 1e-30)


def read_factor(factor: float, tolerance: float, around: Circumstances) -> tuple[list[str], tuple[str, ...]]:
    """What a factor can mean, likeliest first, and the axes that the first meaning is about."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for axis in around.axes:
        size = around.size(axis)
        if size > 1:
            found += [
                (f"{meaning} over {axis} ({size} ranks)", (axis,))
                for target, meaning in (
                    (size, "reduced twice, or summed where the mean is meant,"),
                    (1 / size, "divided twice, or averaged where the sum is meant,"),
                    (math.sqrt(size), "multiplied by the square root of the number of ranks"),
                    (1 / math.sqrt(size), "divided by the square root of the number of ranks"),
                )
                if nearly(factor, target, tolerance)
            ]
    count = around.microbatches
    if count > 1 and nearly(factor, count, tolerance):
        found.append((f"summed over {count} micro-batches where the mean is meant", ()))
    if count > 1 and nearly(factor, 1 / count, tolerance):
        found.append((f"divided by the {count} micro-batches twice", ()))
    if nearly(factor, -1, tolerance):
        found.append(("its sign is turned", ()))
    power = math.log2(factor) if factor > 0 else 0.5
    if abs(power) >= 7 and nearly(power, round(power), tolerance):
        found.append((f"a loss scale of 2^{round(power)} left in", ()))
    return [text for text, _ in found], found[0][1] if found else ()


def show_factor(factor: float) -> str:
    """A factor as people write it."""
    inverse = 1 / factor if factor else math.inf
    if abs(factor) < 1 and abs(inverse - round(inverse)) < 1e-3 * abs(inverse):
        return f"1/{round(inverse)}" if round(inverse) > 0 else f"-1/{-round(inverse)}"
    return f"{factor:.6g}"
