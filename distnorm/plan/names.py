"""Names that the caller gave apart from tensors: each must be some rank's."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch

from distnorm.errors import ConfigError
from distnorm.plan.collectives import Ranks
from distnorm.sources import Layout
from distnorm.sources.shards import GradShard


def check_names(ranks: Ranks, given: Sequence[str], shards: Sequence[GradShard], layout: Layout) -> None:
    """Refuse a tied name, or a pattern of shards, that fits nothing on any rank. Collective.

    Args:
        ranks: who takes part.
        given: the names that this rank's tensors were given under.
        shards: what was made of them.
        layout: what has the tied names and the patterns; the same on all ranks.

    Raises:
        ConfigError: naming it.
    """
    tied = [name for group in layout.tied for name in group]
    patterns = [rule.pattern for rule in layout.declared.rules]
    if not tied + patterns or ranks.is_simulated:  # the ranks that may hold them don't exist
        return
    here = [name in given for name in tied]
    here += [any(fnmatchcase(shard.name, pattern) for shard in shards) for pattern in patterns]
    held = ranks.all_reduce_(torch.tensor(here, dtype=torch.int64, device=ranks.device()), "max").tolist()
    absent = [name for name, is_held in zip(tied + patterns, held, strict=True) if not is_held]
    if any(name in tied for name in absent):
        raise ConfigError(f"tied: expected names of parameters, found {absent}, which no rank holds")
    if absent:
        names = sorted(shard.name for shard in shards)[:3]
        raise ConfigError(
            f"sharded: expected patterns of parameters' names, found {absent}, which fit none on any rank; "
            f"names are such as {', '.join(names) or 'those of other ranks'}"
        )
