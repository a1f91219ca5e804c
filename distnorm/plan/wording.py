"""How errors name ranks, and list what they found."""

from __future__ import annotations

from collections.abc import Sequence

_SHOWN = 8  # different facts that an error lists


def shown(facts: Sequence[str]) -> list[str]:
    """The first few of the facts that ranks report, and how many more there are."""
    more = len(facts) - _SHOWN
    return [*facts[:_SHOWN], f"and {more} more"] if more > 0 else list(facts)


def name_ranks(ranks: Sequence[int]) -> str:
    """``rank 3``, or ``ranks [1, 3]``."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {list(ranks)}"


SHARDED = 'sharded={"*.qkv.weight": (dim, group)}'
"""How a caller declares pieces, for advice in errors."""
