"""The errors of a measurement that went wrong: the ranks find out together which of them did what.

Every function here but those that refuse a call is collective, and is called only after all ranks have read
the same reduced vector.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.errors import DisagreementError, NonFiniteGradientError, UnsupportedGradientError
from distnorm.measure.header import DecodedHeader
from distnorm.plan.collectives import Ranks
from distnorm.plan.terms import agree_on_terms
from distnorm.sources.shards import GradShard, Reading

SET = "the set of parameters or tensors"
_MOST_NAMED = 5
_log = logging.getLogger("distnorm")


def raise_disagreement(
    ranks: Ranks, decoded: DecodedHeader, here: Mapping[str, object] | None, *, terms_too: bool = False
) -> None:
    """Raise if the ranks are at different stages or have different terms; name them if all ranks raise.

    Raises:
        DisagreementError: naming terms and ranks.
    """
    mixed = len(decoded.stages) > 1
    if mixed and decoded.all_raise:
        agree_on_terms(ranks, None if here is None else {SET: here.get(SET, "as before")})
    if terms_too and decoded.all_raise:
        agree_on_terms(ranks, here)
    elif mixed or terms_too:
        raise DisagreementError(
            "expected every rank to measure the same set on the same terms (threshold, norm type, "
            "error_if_nonfinite), found ranks with another set or other terms"
        )


def raise_left_out(ranks: Ranks, decoded: DecodedHeader) -> None:
    """Raise if some ranks were given nothing, where they had been given something before.

    Raises:
        DisagreementError: on every rank.
    """
    measure = int(decoded.values["measure"])
    if measure < ranks.size:
        raise DisagreementError(
            f"{SET}: expected the same on every rank as in the calls before, found nothing at all on "
            f"{ranks.size - measure} of {ranks.size} ranks"
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
    raise_named(order, total_norm, find_not_finite(ranks, shards, gradients))


def refuse_captured_planning() -> None:
    """Refuse to plan while a CUDA graph is captured.

    Raises:
        DistnormError: one is.
    """
    kernels.refuse_capture(
        "expected parameters that have been planned, found others; make the same call once, with gradients, "
        "before the capture"
    )


def refuse_captured_reads(listens: bool, overlaps: bool) -> None:
    """Refuse to be captured where the host takes part in a measurement.

    Args:
        listens: whether it reads the result.
        overlaps: whether it takes what backward has read.

    Raises:
        DistnormError: a CUDA graph is captured.
    """
    if listens:
        kernels.refuse_capture(
            "expected a norm that stays on its device, found that the host reads it: by clip.nonfinite: "
            "raise_now, by error_if_nonfinite, or as the process group reduces in the host's memory; set "
            "clip.nonfinite: raise, skip, zero or propagate, and use a group for the device (nccl)"
        )
    if overlaps:
        kernels.refuse_capture(
            "expected clip.overlap: false, found true, where the host takes what backward has read; or "
            "monitor.fingerprints: null, found a number, where it reads the bits"
        )


def raise_named(
    order: float,
    total_norm: float,
    where: tuple[tuple[str, int], ...],
    which: str = "",
    otherwise: str = "no single gradient; their norm leaves fp64's range",
) -> NoReturn:
    """Raise for gradients that were found, as (parameter, rank) pairs. Not collective.

    Args:
        order: of the norm.
        total_norm: what it is.
        where: the gradients.
        which: what the message begins with.
        otherwise: what it says in place of the gradients if there are none.

    Raises:
        NonFiniteGradientError: always.
    """
    found = [f"'{name}' on rank {rank}" for name, rank in where]
    text = ", ".join(found[:_MOST_NAMED]) or otherwise
    raise NonFiniteGradientError(
        f"{which}expected a finite total norm of order {order:g}, found {total_norm}: {text}",
        total_norm,
        where,
    )


def find_not_finite(
    ranks: Ranks, shards: Sequence[GradShard], gradients: Sequence[Tensor | None]
) -> tuple[tuple[str, int], ...]:
    """The first few parameters of each rank whose gradient isn't finite, with that rank, by rank."""
    mine = [
        shard.name
        for shard, gradient in zip(shards, gradients, strict=True)
        if gradient is not None and not _widened(gradient).isfinite().all()
    ]
    return gathered(ranks, mine)


def gathered(ranks: Ranks, mine: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """The first few names of each rank, with that rank. Collective."""
    cut = [ranks.shortened(name, _MOST_NAMED) for name in mine[:_MOST_NAMED]]
    return tuple((name, rank) for rank, names in enumerate(ranks.gather(cut)) for name in names)


def _widened(gradient: Tensor) -> Tensor:
    return gradient.float() if gradient.dtype.itemsize == 1 else gradient  # float8 has no isfinite


def refuse_inside_backward() -> None:
    """Refuse to measure while autograd computes gradients. Not collective.

    Raises:
        UnsupportedGradientError: a backward pass is running on this thread.
    """
    if torch._C._current_graph_task_id() != -1:
        raise UnsupportedGradientError(
            "expected complete gradients after backward, found a call from inside a backward pass, as of an "
            "optimizer that steps in hooks; step after backward, or clip each gradient by itself in its hook"
        )


def warn_of_no_gradients(ranks: Ranks, shards: Sequence[GradShard], is_empty: bool) -> None:
    """Say once that no rank has any gradient, or refuse it where hooks have taken the gradients away.

    Raises:
        UnsupportedGradientError: on every rank, naming a parameter that has such a hook.
    """
    trained = [shard for shard in shards if shard.holder.requires_grad]
    hooked = [shard.name for shard in trained if _has_foreign_hook(shard.holder)]
    some_have, some_hooked, some_trained = ranks.any(not is_empty, bool(hooked), bool(trained))
    if some_have or not some_trained:
        return
    if some_hooked:
        names = next(names for names in ranks.gather(hooked[:1]) if names)
        raise UnsupportedGradientError(
            f"parameter '{names[0]}': expected a gradient after backward, found none on any parameter of any "
            "rank, and a hook that runs when its gradient is accumulated; an optimizer that steps inside "
            "backward leaves nothing to measure or clip: step after backward, or clip inside the hook"
        )
    if ranks.rank == 0:
        _warn_once(
            "no parameter has a gradient on any rank, so the total norm is 0 and nothing is clipped; were "
            "the gradients set to None before this call, or are they kept elsewhere (grad_of=...)?"
        )


def warn_of_taken_gradients(shards: Sequence[GradShard], readings: Sequence[Reading]) -> None:
    """Say once that hooks may have taken some gradients away, so that the norm is that of the others. Not
    collective."""
    if all(reading is None for reading in readings):  # all ranks find out together: see the function above
        return
    for shard, reading in zip(shards, readings, strict=True):
        if reading is None and shard.holder.requires_grad and _has_foreign_hook(shard.holder):
            _warn_once(
                f"parameter '{shard.name}' has no gradient, and a hook that runs when its gradient is "
                "accumulated, while other parameters have one; if an optimizer steps in that hook, the total "
                "norm is that of the other gradients alone: step after backward, or clip inside the hook"
            )
            return


def _warn_once(text: str) -> None:
    kind = text.split("'")[0]
    if kind not in _said:
        _said.add(kind)
        _log.warning(text)


_said: set[str] = set()


def _has_foreign_hook(parameter: Tensor) -> bool:
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    return any(not type(hook).__module__.startswith("distnorm.") for hook in hooks.values())
