"""What all ranks must have alike: compared by hashes, and named where it differs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from distnorm.errors import DisagreementError
from distnorm.plan.collectives import Ranks
from distnorm.plan.wording import name_ranks, shown

STEP = "step"
"""The term that `GradClipper.note(step=...)` gives."""
_ADVICE = {STEP: " (a rank left out clip() in a step, or called it twice)"}


def agree_on_terms(ranks: Ranks, terms: Mapping[str, object] | None) -> None:
    """Compare terms, by name, over all ranks that have any. Collective.

    Raises:
        DisagreementError: on every rank, with each term that differs, its values and their ranks.
    """
    mine = None if terms is None else {name: repr(value) for name, value in terms.items()}
    hashed = None if mine is None else stable_hash(repr(sorted(mine.items())))
    if ranks.size == 1 or _same(ranks, hashed):
        return
    cut = mine and {name: ranks.shortened(value, len(mine)) for name, value in mine.items()}
    everybody = [(rank, theirs) for rank, theirs in enumerate(ranks.gather(cut)) if theirs is not None]
    differing = []
    for name in dict.fromkeys(name for _, theirs in everybody for name in theirs):
        values: dict[str, list[int]] = {}
        for rank, theirs in everybody:
            values.setdefault(theirs.get(name, "absent"), []).append(rank)
        if len(values) > 1:
            found = ", ".join(shown([f"{value} on {name_ranks(who)}" for value, who in values.items()]))
            differing.append(f"{name}: expected the same on every rank, found {found}{_ADVICE.get(name, '')}")
    raise DisagreementError("; ".join(differing))


def _same(ranks: Ranks, value: int | None) -> bool:
    both = [-(1 << 63)] * 2 if value is None else [value, -value]
    extremes = torch.tensor(both, dtype=torch.int64, device=ranks.device())
    most, least = ranks.all_reduce_(extremes, "max").tolist()
    return bool(most == -least or most == least)  # equal extremes: nobody has a value


def stable_hash(text: str) -> int:
    """The same 63-bit number for a text in every process (its negative fits an int64 too)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
