"""What to say when a measurement went wrong: who did what, found out together, off the fast path.

Every function here is collective, and is called only after all ranks have read the same votes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from distnorm.errors import DisagreementError, NonFiniteGradientError, ReplicaError
from distnorm.measure.header import Count
from distnorm.plan.collectives import Ranks
from distnorm.plan.plan import agree_on_terms, differing, identity_rows, raise_named
from distnorm.sources.shards import GradShard

SET = "the set of parameters or tensors"
_MOST_NAMED = 5


def raise_disagreement(
    ranks: Ranks, count: Count, here: Mapping[str, object] | None, *, terms_too: bool = False
) -> None:
    """Raise if the ranks are in several stages or on other terms; say who is where if all listen.

    Raises:
        DisagreementError: naming terms and ranks.
    """
    mixed = len(count.stages) > 1
    if mixed and count.all_listen:
        agree_on_terms(ranks, None if here is None else {SET: here.get(SET, "as before")})
    if terms_too and count.all_listen:
        agree_on_terms(ranks, here)
    elif mixed or terms_too:
        raise DisagreementError(
            "expected every rank to measure the same set on the same terms (threshold, norm type, "
            "error_if_nonfinite), found ranks with another set or other terms"
        )


def raise_left_out(ranks: Ranks, count: Count) -> None:
    """Raise if some ranks were given nothing, where they had been given something before.

    Raises:
        DisagreementError: on every rank.
    """
    measure = int(count.lanes["measure"])
    if measure < ranks.size:
        raise DisagreementError(
            f"{SET}: expected the same on every rank as in the calls before, found nothing at all on "
            f"{ranks.size - measure} of {ranks.size} ranks"
        )


def raise_one_sided(
    ranks: Ranks,
    shards: Sequence[GradShard],
    gradients: Sequence[Tensor | None],
    replicated: Sequence[int],
) -> None:
    """Name the replicated shards that have a gradient on some ranks only.

    Raises:
        ReplicaError: on every rank.
    """
    present = [gradients[i] is not None for i in replicated]
    values = torch.tensor(present, dtype=torch.int64).view(-1, 1)
    rows = torch.cat([identity_rows(shards)[list(replicated)], values], dim=1)
    splits = ranks.join(rows[:, 0], rows, differing).view(-1).tolist()
    raise_named(
        ranks,
        [
            (shards[i].name, "a gradient" if has_one else "no gradient")
            for i, has_one, bad in zip(replicated, present, splits, strict=True)
            if bad
        ],
        ReplicaError,
        "a gradient on all replicas or on none",
        "Replicas' gradients must be reduced before they are measured; zeros count as a gradient.",
    )


def raise_not_finite(
    ranks: Ranks,
    order: float,
    total_norm: float,
    shards: Sequence[GradShard],
    gradients: Sequence[Tensor | None],
) -> NoReturn:
    """Name the gradients that are not finite, and their ranks.

    Raises:
        NonFiniteGradientError: on every rank.
    """
    where = found_not_finite(ranks, shards, gradients)
    found = [f"'{name}' on rank {rank}" for name, rank in where]
    text = ", ".join(found[:_MOST_NAMED]) or "no single gradient; their norm leaves fp64's range"
    raise NonFiniteGradientError(
        f"expected a finite total norm of order {order:g}, found {total_norm}: {text}", total_norm, where
    )


def found_not_finite(
    ranks: Ranks, shards: Sequence[GradShard], gradients: Sequence[Tensor | None]
) -> tuple[tuple[str, int], ...]:
    """The first few parameters of each rank whose gradient isn't finite, with that rank, by rank."""
    mine = [
        shard.name
        for shard, gradient in zip(shards, gradients, strict=True)
        if gradient is not None and not gradient.isfinite().all()
    ]
    brief = [ranks.shortened(name, _MOST_NAMED) for name in mine[:_MOST_NAMED]]
    return tuple((name, rank) for rank, names in enumerate(ranks.gather(brief)) for name in names)
