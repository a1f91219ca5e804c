"""What each rank says of itself beside its statistic, in the same all-reduce.

By it every rank sees, without another collective and without reading anything on the host, whether all
ranks measured the same thing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distnorm.plan import Share

LANES = ("nan", "unplanned", "planned", "raises", "refused", "presence", "terms", "terms_again")
"""The lanes of the vector after the statistic. The first counts statistics that are NaN."""


@dataclass(frozen=True, slots=True)
class Ballot:
    """One rank's votes.

    Args:
        planned: whether it has a plan for what it was called with.
        raises: whether it reads the result, and so takes part in finding out what is wrong.
        refused: whether it found a gradient that can't be measured.
        presence: sum of `presence_weights` over the replicas that have a gradient.
        terms: 16-bit hash of the plan and of what else must be alike in this call.
    """

    planned: bool = True
    raises: bool = False
    refused: bool = False
    presence: int = 0
    terms: int = 0

    def votes(self, op: str) -> list[float]:
        """The lanes after the first, for an all-reduce by `op`."""
        # Two functions of the terms whose reductions fit a rank's own terms only if all ranks' are equal
        # (for sums, by the Cauchy-Schwarz inequality).
        pair = (self.terms, -self.terms) if op == "max" else (self.terms, self.terms**2)
        return [not self.planned, self.planned, self.raises, self.refused, self.presence, *pair]

    def agreed(self, op: str, size: int) -> list[float]:
        """All lanes, as they are after the all-reduce over `size` ranks if all is well."""
        well = Ballot(raises=self.raises, terms=self.terms)
        return [0, *(vote * (1 if op == "max" else size) for vote in well.votes(op))]

    def disputed(self, op: str, size: int, lanes: Sequence[float]) -> set[str]:
        """Names of the reduced lanes that are not as agreed."""
        expected = self.agreed(op, size)
        return {name for name, e, f in zip(LANES, expected, lanes, strict=True) if e != f}


def presence_weights(shares: Sequence[Share]) -> Mapping[int, int]:
    """Integers for this rank's replicas, by position, that add up to zero over all replicas of a shard.

    So their sum over all ranks is zero if each shard's replicas have a gradient all or none. Sums stay
    below 2**53 for 2**33 replicas, and are exact.
    """
    weights = {}
    for i, share in enumerate(shares):
        if share.replicas > 1:
            unit = (share.key & 0xFFFFF) + 1
            weights[i] = unit * (share.replicas - 1 if share.index == 0 else -1)
    return weights
