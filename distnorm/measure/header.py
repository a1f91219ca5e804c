"""The consensus header: sent beside each rank's statistic, in the same all-reduce.

It shows every rank, without another collective and without a read on the host, whether all ranks measured the
same thing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from distnorm import kernels
from distnorm.plan.plan import Share
from distnorm.plan.terms import stable_hash

Stage = Literal["plan", "agree", "measure", "join"]
"""Where a rank is in a call: "plan", it has no plan for what it was given; "agree", it has found gradients
that may be partial; "measure"; "join", it was given nothing, and does what the others do."""

FIELDS = (
    *("nan", "plan", "agree", "measure", "nonraising", "refused", "double", "presence"),
    *("terms", "terms_again"),
)
"""The elements of a full header, before the statistic; the very first counts statistics that are NaN."""


@dataclass(frozen=True, slots=True)
class Header:
    """One rank's header.

    Args:
        stage: where the rank is in the call.
        raises: whether it reads the result on the host, and so helps to search for what is wrong.
        refused: whether it found a gradient that can't be measured.
        is_double: whether the functions' result is fp64.
        presence: sum of `presence_weights` over the replicas that have a gradient.
        terms: hash of the plan and of what else must be equal in this call, at least 0.
        replica_bits: adds up to zero over the ranks if samples of replicas have equal bits; travels in packed
            headers only.
    """

    stage: Stage
    raises: bool
    refused: bool = False
    is_double: bool = False
    presence: int = 0
    terms: int = 0
    replica_bits: int = 0

    @property
    def has_statistic(self) -> bool:
        """Whether a valid statistic is sent with it."""
        return self.stage == "measure" and not self.refused

    def full(self, op: str) -> list[float]:
        """The elements after the first, for an all-reduce by `op`."""
        stages = [self.stage == stage for stage in FIELDS[1:4]]
        if self.stage == "measure":
            pair = self._terms_pair(op)
        else:
            pair = (-math.inf, -math.inf) if op == "max" else (0, 0)
        return [*stages, not self.raises, self.refused, self.is_double, self.presence, *pair]

    def _terms_pair(self, op: str) -> tuple[float, float]:
        # Two functions of the terms whose reductions fit a rank's own terms only if all ranks' are equal
        # (for sums, by the Cauchy-Schwarz inequality).
        terms = self.terms & 0xFFFF
        return (terms, -terms) if op == "max" else (terms, terms**2)

    def agreed(self, op: str, size: int, reduced: Tensor) -> Tensor:
        """Whether full headers, reduced over `size` ranks, say that all measured the same, be it NaN: 0-d
        bool."""
        nonraising = (not self.raises) * (1 if op == "max" else size)
        if self.stage == "join":
            # This rank has no terms; whether those of the others agree shows in their two functions.
            first, again = reduced[-2:]
            alike = first == -again if op == "max" else first * first == reduced[3] * again
            expected = kernels.on_device([0, 0, nonraising, 0, 0], reduced.device)
            joins: Tensor = (reduced[[1, 2, 4, 5, 7]] == expected).all() & (alike | (reduced[3] == 0))
            return joins
        fixed = kernels.on_device([0, 0, 0, nonraising, 0, 0, 0, 0, 0], reduced.device)
        each = [0, 0, 1, 0, 0, self.is_double, 0, *self._terms_pair(op)]
        by_measurer = kernels.on_device(each, reduced.device)
        agreed: Tensor = (reduced[1:] == fixed + by_measurer * reduced[3]).all()
        return agreed


class StepHeaders:
    """Makes the headers of a plan's steps: most have that of the step before.

    Args:
        is_double: whether the functions' result is fp64.
    """

    def __init__(self, is_double: bool = False) -> None:
        self._is_double = is_double
        self._hashed: tuple[tuple[object, ...], int] = ((), 0)  # terms, and their hash
        self._newest: tuple[tuple[object, ...], Header] = ((), Header("join", False))

    def measuring(
        self,
        raises: bool,
        refused: bool,
        presence: int,
        terms: Mapping[str, object],
        replica_bits: int,
    ) -> Header:
        """The header of a rank that measures: see `Header`, which has the terms' hash."""
        if self._hashed[0] != (values := tuple(terms.values())):
            self._hashed = values, stable_hash(repr(terms))
        key = (raises, refused, self._is_double, presence, self._hashed[1], replica_bits)
        if self._newest[0] != key:
            self._newest = key, Header("measure", *key)
        return self._newest[1]


@dataclass(frozen=True, slots=True)
class Packing:
    """A header in one number, of which the sum over all ranks is exact in fp64.

    The lower part adds up to zero modulo a power of two if all ranks that measure have the same terms, each
    shard's replicas have a gradient all or none, and no rank refused one; it misses a difference as seldom as
    the power is large. The upper part counts the ranks that measure and don't raise.

    Args:
        rank, size: this rank, and how many there are.

    Attributes:
        modulus: the power of two.
    """

    rank: int
    size: int
    _weight: int = field(init=False)
    modulus: int = field(init=False)
    _unit: int = field(init=False)

    def __post_init__(self) -> None:
        bits = self.size.bit_length()
        # Over all ranks the weights add up to zero; over few enough others, to nothing like a multiple of it.
        weight = 2 * self.rank + 1 if self.rank else 1 - self.size**2
        object.__setattr__(self, "_weight", weight)
        object.__setattr__(self, "modulus", 1 << min(32, 53 - 2 * bits))
        object.__setattr__(self, "_unit", self.modulus << bits)

    def pack(self, header: Header) -> int:
        """The number."""
        if header.stage != "measure":
            return 0
        zero_sum = header.presence + self._weight * header.terms + header.refused + header.replica_bits
        return zero_sum % self.modulus + (0 if header.raises else self._unit)

    def agreed(self, packed: Tensor) -> Tensor:
        """Whether packed headers, added up, say that all ranks measured the same: 0-d bool."""
        return packed.remainder(self.modulus) == 0

    def agreed_on_host(self, packed: float) -> bool:
        """`agreed` of a number in the host's memory."""
        return int(packed) % self.modulus == 0

    def nonraising(self, packed: float) -> int:
        """How many ranks measure and don't raise, by packed headers added up."""
        return int(packed) // self._unit


@dataclass(frozen=True, slots=True)
class DecodedHeader:
    """The reduced elements of full headers, read on the host.

    Args:
        values: of each field.
        agreed: whether they say that all ranks measured the same; then packed headers that didn't fit say
            that samples of replicas differ.
    """

    values: Mapping[str, float]
    agreed: bool = False

    @classmethod
    def of(cls, values: Sequence[float], agreed: bool) -> DecodedHeader:
        """Name the elements."""
        return cls(dict(zip(FIELDS, values, strict=True)), agreed)

    @classmethod
    def of_nonraising(cls, count: int, mine: Header) -> DecodedHeader:
        """What is known where some ranks measure and don't raise: that, and this rank's own."""
        return cls({**dict.fromkeys(FIELDS, 0), mine.stage: 1, "measure": count, "nonraising": count})

    @property
    def stages(self) -> set[str]:
        """The stages of all ranks; "join" is not among them."""
        return {stage for stage in ("plan", "agree", "measure") if self.values[stage]}

    @property
    def all_raise(self) -> bool:
        """Whether every rank helps to search for what is wrong."""
        return not self.values["nonraising"]

    @property
    def is_one_sided(self) -> bool:
        """Whether replicas have a gradient on some ranks only."""
        return self.values["presence"] != 0


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
