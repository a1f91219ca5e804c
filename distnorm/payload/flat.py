"""Shards that are runs of a flat parameter have lost their dims; what goes by dims refuses them."""

from __future__ import annotations

from collections.abc import Iterable

from distnorm.errors import UnsupportedGradientError
from distnorm.plan.collectives import Ranks
from distnorm.plan.plan import raise_named
from distnorm.sources.shards import GradShard


def refuse_flat(ranks: Ranks, shards: Iterable[GradShard], expected: str, otherwise: str) -> None:
    """Refuse shards that are runs of a flat parameter. Collective.

    Args:
        ranks: who takes part.
        shards: those of this rank that have to be blocks along dims.
        expected: what would have been right.
        otherwise: the cure where parameters can't be sharded along dims.

    Raises:
        UnsupportedGradientError: on every rank, naming one of any rank.
    """
    raise_named(
        ranks,
        [(shard.name, "a run of a flat parameter") for shard in shards if shard.is_flat],
        UnsupportedGradientError,
        expected,
        "FSDP1 and ZeRO flatten parameters and forget their rows; shard with fully_shard (FSDP2), or "
        f"{otherwise}.",
    )
