"""Norms along the depth of a model, and their trend."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median_high, median_low

from distnorm.monitor.records import LayerRow

# The first number that is a whole part of a name: blocks.12.attn.wq, or depth 12.
_NUMBERED = re.compile(r"(?:^|(?<=[./ ]))\d+(?=[./ ]|$)")
_FEWEST = 4


@dataclass(frozen=True, slots=True)
class Trend:
    """How norms go along the numbered blocks of one kind.

    Args:
        low: the end at which they are smaller by the trend.
        high: the other.
        ratio: the norm at the low end divided by that at the high end, by the trend: at most 1.
    """

    low: str
    high: str
    ratio: float


def trends(rows: Iterable[LayerRow]) -> list[Trend]:
    """The trend of every kind of blocks that has four or more with a gradient.

    A block's norm is the root of the sum of squares over its rows. The trend is the line through ln(norm)
    over the block's number whose slope is the median of the slopes between all pairs (Theil 1950, Sen 1968),
    of the two middle ones the flatter: one block that vanished, or has no gradient, is no trend.
    """
    kinds: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        found = _NUMBERED.search(row.layer)
        if found is not None and row.of is None and 0.0 < row.norm < math.inf:
            blocks = kinds.setdefault(row.layer[: found.start()], {})
            blocks.setdefault(int(found[0]), []).append(row.norm)
    return [
        _trend(kind, {number: math.log(math.hypot(*norms)) for number, norms in sorted(blocks.items())})
        for kind, blocks in kinds.items()
        if len(blocks) >= _FEWEST
    ]


def _trend(kind: str, logs: dict[int, float]) -> Trend:
    numbers = list(logs)
    slopes = [
        (logs[right] - logs[left]) / (right - left)
        for at, right in enumerate(numbers)
        for left in numbers[:at]
    ]
    slope = min(median_low(slopes), median_high(slopes), key=abs)
    ends = numbers[0], numbers[-1]
    low, high = ends if slope >= 0 else ends[::-1]
    return Trend(f"{kind}{low}", f"{kind}{high}", math.exp(-abs(slope) * (ends[1] - ends[0])))
