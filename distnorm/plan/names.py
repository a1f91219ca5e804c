"""What the caller gave apart from tensors: each name must be some rank's, and no pieces may overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from distnorm.errors import ConfigError, CoverageError
from distnorm.plan.collectives import Ranks
from distnorm.plan.join import join
from distnorm.plan.plan import identity_rows, raise_named
from distnorm.sources import Layout
from distnorm.sources.shards import Extent, GradShard

_PRIME = (1 << 40) - 87


def check_names(ranks: Ranks, given: Sequence[str], shards: Sequence[GradShard], layout: Layout) -> None:
    """Refuse a tied name, or a pattern of shards, that fits nothing on any rank; and pieces that overlap.
    Collective.

    Args:
        ranks: who takes part.
        given: the names that this rank's tensors were given under.
        shards: what was made of them.
        layout: what has the tied names and the patterns; the same on all ranks.

    Raises:
        ConfigError: naming it.
        CoverageError: naming the parameter and its pieces.
    """
    _check_pieces(ranks, shards, layout)
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


def _check_pieces(ranks: Ranks, shards: Sequence[GradShard], layout: Layout) -> None:
    """Refuse pieces, given by a function, that overlap and leave out as many elements: their numbers add up,
    so the plan's own check finds nothing."""
    if layout.declared.function is None or ranks.is_simulated:
        return
    facts = []
    for shard in shards:
        shape = shard.global_shape
        of_all = _moment(tuple((0, size) for size in shape), shape, shard.global_numel)
        facts.append([shard.numel, _moment(shard.piece, shape, shard.numel), shard.global_numel, of_all])
    rows = torch.tensor(facts, dtype=torch.int64, device="cpu").view(-1, 4)
    overlap = join(ranks, torch.cat([identity_rows(shards), rows], dim=1), _overlapping).view(-1).tolist()
    found = [(s.name, f"{list(s.piece)}") for s, is_so in zip(shards, overlap, strict=True) if is_so]
    raise_named(
        ranks,
        found,
        CoverageError,
        "pieces that hold each element once",
        "Some elements are in two of the pieces that sharded= returned, and as many in none.",
    )


def _moment(piece: tuple[Extent, ...], shape: tuple[int, ...], numel: int) -> int:
    """12 times the sum of the squares of the offsets of a piece's elements, modulo a prime; -1 where a text
    stands for indices. Those of pieces that hold each element once add up to that of the whole."""
    if not numel:
        return 0
    stride, middle, spread = 1, 0, 0
    sizes = shape if len(piece) == len(shape) else (math.prod(shape),)
    for extent, size in zip(reversed(piece), reversed(sizes), strict=True):
        if isinstance(extent, str):
            return -1
        start, stop = extent
        middle += stride * (start + stop - 1)
        spread += stride**2 * ((stop - start) ** 2 - 1)
        stride *= size
    return numel * (3 * middle**2 + spread) % _PRIME


def _overlapping(rows: Tensor) -> Tensor:
    """[m, (name, piece, numel, moment, numel of all, moment of all)] -> [m, 1]: whether distinct pieces of
    the name have as many elements as the whole, and others than the whole."""
    names, of = torch.unique(rows[:, 0], return_inverse=True)
    distinct = torch.unique(rows[:, :4], dim=0)
    at = torch.searchsorted(names, distinct[:, 0].contiguous())
    numel, moment = (torch.zeros_like(names).index_add_(0, at, distinct[:, i]) for i in (2, 3))
    is_known = torch.ones_like(names, dtype=torch.bool)
    is_known[at[distinct[:, 3] < 0]] = False
    is_covered = is_known[of] & (numel[of] == rows[:, 4])
    return (is_covered & (moment[of] % _PRIME != rows[:, 5])).long().view(-1, 1)
