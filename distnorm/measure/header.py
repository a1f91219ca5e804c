"""What each rank says of itself beside its statistic, in the same all-reduce.

By it every rank sees, without another collective and without reading anything on the host, whether all
ranks measured the same thing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from distnorm.plan.plan import Share

Stage = Literal["plan", "agree", "measure", "follow"]
"""Where a rank is in a call: it has no plan for what it was given; it has one, and no rank had gradients
yet; it measures; it was given nothing, and does what the others do."""

LANES = ("nan", "plan", "agree", "measure", "mute", "refused", "presence", "terms", "terms_again")
"""The first lanes of the vector, before the statistic; the very first counts statistics that are NaN."""


def on_device(values: Sequence[float], device: torch.device) -> Tensor:
    """The values, [n] fp64, without waiting for the device."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A copy in a graph reads the host's memory at every replay; a fill brings its value along.
        return torch.stack([torch.full((), v, dtype=torch.float64, device=device) for v in values])
    made = torch.tensor(values, dtype=torch.float64)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


@dataclass(frozen=True, slots=True)
class Ballot:
    """One rank's votes.

    Args:
        stage: where it is.
        raises: whether it reads the result, and so takes part in finding out what is wrong.
        refused: whether it found a gradient that can't be measured.
        presence: sum of `presence_weights` over the replicas that have a gradient.
        terms: hash of the plan and of what else must be alike in this call, at least 0.
    """

    stage: Stage
    raises: bool
    refused: bool = False
    presence: int = 0
    terms: int = 0

    @property
    def stands(self) -> bool:
        """Whether it comes with a statistic that may count."""
        return self.stage == "measure" and not self.refused

    def votes(self, op: str) -> list[float]:
        """The lanes after the first, for an all-reduce by `op`."""
        stages = [self.stage == stage for stage in LANES[1:4]]
        if self.stage == "measure":
            pair = self._terms_pair(op)
        else:
            pair = (-math.inf, -math.inf) if op == "max" else (0, 0)
        return [*stages, not self.raises, self.refused, self.presence, *pair]

    def _terms_pair(self, op: str) -> tuple[float, float]:
        # Two functions of the terms whose reductions fit a rank's own terms only if all ranks' are equal
        # (for sums, by the Cauchy-Schwarz inequality).
        terms = self.terms & 0xFFFF
        return (terms, -terms) if op == "max" else (terms, terms**2)

    def well(self, op: str, size: int, lanes: Tensor) -> Tensor:
        """Whether the lanes, reduced over `size` ranks, say that all ranks measured the same: 0-d bool."""
        mute = (not self.raises) * (1 if op == "max" else size)
        if self.stage == "follow":  # it knows no terms; that of others agree shows in their two functions
            first, again = lanes[-2:]
            alike = first == -again if op == "max" else first * first == lanes[3] * again
            few = on_device([0, 0, 0, mute, 0, 0], lanes.device)
            follows: Tensor = (lanes[[0, 1, 2, 4, 5, 6]] == few).all() & (alike | (lanes[3] == 0))
            return follows
        fixed = on_device([0, 0, 0, 0, mute, 0, 0, 0, 0], lanes.device)
        each = [0, 0, 0, 1, 0, 0, 0, *self._terms_pair(op)]
        by_measurer = on_device(each, lanes.device)
        well: Tensor = (lanes == fixed + by_measurer * lanes[3]).all()
        return well


@dataclass(frozen=True, slots=True)
class Brief:
    """A ballot in one number, of which the sum over all ranks is exact in fp64.

    The lower part adds up to zero modulo a power of two if all ranks that measure have the same terms, each
    shard's replicas have a gradient all or none, and no rank refused one; it misses a difference as seldom as
    the power is large. The upper part counts the ranks that measure and read nothing.

    Args:
        rank, size: this rank, and how many there are.
    """

    rank: int
    size: int
    _weight: int = field(init=False)
    _modulus: int = field(init=False)
    _unit: int = field(init=False)

    def __post_init__(self) -> None:
        bits = self.size.bit_length()
        # Over all ranks the weights add up to zero; over few enough others, to nothing like a multiple of it.
        weight = 2 * self.rank + 1 if self.rank else 1 - self.size**2
        object.__setattr__(self, "_weight", weight)
        object.__setattr__(self, "_modulus", 1 << min(32, 53 - 2 * bits))
        object.__setattr__(self, "_unit", self._modulus << bits)

    def mark(self, ballot: Ballot) -> int:
        """The number."""
        if ballot.stage != "measure":
            return 0
        zero_sum = (ballot.presence + self._weight * ballot.terms + ballot.refused) % self._modulus
        return zero_sum + (0 if ballot.raises else self._unit)

    def well(self, marks: Tensor) -> Tensor:
        """Whether marks, added up, say that all ranks measured the same: 0-d bool."""
        return marks.remainder(self._modulus) == 0

    def is_well(self, marks: float) -> bool:
        """`well` of a number on the host."""
        return int(marks) % self._modulus == 0

    def deaf(self, marks: float) -> int:
        """How many ranks measure and read nothing, by marks added up."""
        return int(marks) // self._unit


@dataclass(frozen=True, slots=True)
class Count:
    """The reduced lanes, read on the host."""

    lanes: Mapping[str, float]

    @classmethod
    def of(cls, lanes: Sequence[float]) -> Count:
        """Name the lanes."""
        return cls(dict(zip(LANES, lanes, strict=True)))

    @classmethod
    def of_deaf(cls, deaf: int, mine: Ballot) -> Count:
        """What is known where some ranks measure and read nothing: that, and this rank's own."""
        return cls({**dict.fromkeys(LANES, 0), mine.stage: 1, "measure": deaf, "mute": deaf})

    @property
    def stages(self) -> set[str]:
        """The stages that some rank is in; those that follow are in none of their own."""
        return {stage for stage in ("plan", "agree", "measure") if self.lanes[stage]}

    @property
    def all_listen(self) -> bool:
        """Whether every rank takes part in finding out what is wrong."""
        return not self.lanes["mute"]

    @property
    def one_sided(self) -> bool:
        """Whether replicas have a gradient on some ranks only."""
        return self.lanes["presence"] != 0


def presence_weights(shares: Sequence[Share]) -> Mapping[int, int]:
    """Integers for this rank's replicas, by position, that add up to zero over all replicas of a shard.

    So their sum over all ranks is zero if each shard's replicas have a gradient all or none. Sums stay
    below 2**53 for 2**33 replicas, and are exact.
    """
    weights = {}
    for i, share in enumerate(shares):
        if share.replicas > 1:
            unit = (share.key & 0xFFFFF) | 1  # odd, so that it is no multiple of a power of two
            weights[i] = unit * (share.replicas - 1 if share.index == 0 else -1)
    return weights
