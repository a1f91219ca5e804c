"""What a wrong norm's ratio to the true one says about how it came about.

Every mistake that is known from the field is made on purpose here, with the norms of the pieces at hand,
and its result compared with the number that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from distnorm.verification.axes import Lines
from distnorm.verification.faults import key
from distnorm.verification.oracle import Truth
from distnorm.verification.pieces import combine
from distnorm.verification.ranks import rank_list

_SHOWN = 4
# A norm of 1e8 elements summed in fp32 can be this far off, which says nothing of how pieces were counted.
_ROUNDING = 1e-2


@dataclass(frozen=True, slots=True)
class _Held:
    name: str
    norm: float
    ranks: tuple[int, ...]


def read_ratio(measured: float, truth: Truth, axes: Lines) -> str:
    """Say by what factor a norm is off, and which known mistakes give just this number.

    Args:
        measured: the norm in question.
        truth: what the whole gradient is.
        axes: the mesh axes in sight, and their lines of ranks (global rank numbers).

    Returns:
        A sentence or two.
    """
    if not (math.isfinite(measured) and math.isfinite(truth.norm)) or truth.norm == 0 or measured < 0:
        return f"expected {truth.norm!r}, found {measured!r}"
    ratio = measured / truth.norm
    off = abs(ratio - 1)
    within = min(1e-4, 0.02 * off)
    readings = _matching(measured, within, _mistakes(truth, axes))
    # The same ratio fits factors that no piece bears out, so those come only where nothing better fits.
    readings = readings or _matching(measured, within, _factors_of_axes(truth, axes))
    readings = readings or list(_factors(ratio, within))
    side = "high" if ratio > 1 else "low"
    said = f"measured/true is {ratio:.7g} ({_as_root(ratio, truth.p, within)}{side})"
    if readings:
        return f"{said}: {'; or '.join(readings[:_SHOWN])}"
    if off < _ROUNDING:
        return (
            f"{said}: so near to 1 it is rather rounding (fp32 or bf16 accumulation) than pieces miscounted"
        )
    return f"{said}: no single known mistake gives this number"


def _as_root(ratio: float, p: float, within: float) -> str:
    """Write the ratio as a root of a whole number where it is one."""
    if math.isinf(p):
        return ""
    power = max(ratio, 1 / ratio) ** p
    whole = round(power)
    if not 2 <= whole <= 4096 or abs(power - whole) > p * within * power:
        return ""
    root = f"sqrt({whole})" if p == 2 else f"{whole}**(1/{p:g})"
    return f"{root} " if ratio > 1 else f"1/{root} "


def _matching(measured: float, within: float, mistakes: Iterable[tuple[float, str]]) -> list[str]:
    return [text for value, text in mistakes if abs(value - measured) <= within * measured]


def _mistakes(truth: Truth, axes: Lines) -> Iterator[tuple[float, str]]:
    """Norms that known mistakes would give with these very pieces, the most specific mistakes first."""
    held = _held(truth)
    yield from _replicas_counted(truth.p, held, axes)
    yield from _reduced_in_part(truth, held, axes)
    if any(piece.gradient and piece.gradient.partial for piece in truth.pieces):
        yield combine([h.norm for h in held], truth.p), "partial gradients measured before they were reduced"
    yield sum(truth.norms.values()), "norms of parameters added where p-th powers should be"
    for q, norm in truth.other_norms.items():
        yield norm, f"it is the norm of order {q:g}, not {truth.p:g}"
    for name, norm in truth.norms.items():
        rest = [n for other, n in truth.norms.items() if other != name]
        yield combine(rest, truth.p), f"'{name}' not counted"
        if math.isfinite(truth.p):
            yield combine([*rest, norm, norm], truth.p), f"'{name}' counted twice (tied weights?)"


def _replicas_counted(p: float, held: list[_Held], axes: Lines) -> Iterator[tuple[float, str]]:
    seen: set[tuple[int, ...]] = set()
    for axis, lines in axes.items():
        copies = tuple(max(1, *(len(set(line) & set(h.ranks)) for line in lines)) for h in held)
        if math.isinf(p) or max(copies, default=1) == 1 or copies in seen:
            continue
        seen.add(copies)
        norms = [h.norm * c ** (1 / p) for h, c in zip(held, copies, strict=True)]
        yield combine(norms, p), f"replicas counted {max(copies)} times on axis {axis}"


def _reduced_in_part(truth: Truth, held: list[_Held], axes: Lines) -> Iterator[tuple[float, str]]:
    local: dict[int, list[float]] = {}
    for piece in truth.pieces:
        local.setdefault(piece.rank, []).append(piece.gradient.norm if piece.gradient else 0.0)
    norms = {rank: combine(own, truth.p) for rank, own in local.items()}
    if len(norms) < 2:
        return
    alone: dict[float, list[int]] = {}
    for rank, norm in norms.items():
        alone.setdefault(norm, []).append(rank)
    for norm, ranks in alone.items():
        each = "each of " if len(ranks) > 1 else ""
        yield norm, f"the pieces of {each}{rank_list(ranks)} alone, never reduced over ranks"
    for axis, lines in axes.items():
        for line in lines:
            part = combine([h.norm for h in held if set(h.ranks) & set(line)], truth.p)
            if len(line) > 1 and part not in (truth.norm, *alone):
                yield part, f"reduced over axis {axis} only, so that {rank_list(list(line))} count alone"
    total = sum(norms.values())
    yield total, "norms of ranks added where p-th powers should be"
    yield total / len(norms), "norms of ranks averaged where p-th powers should be added"
    if math.isfinite(truth.p):
        mean = combine(norms.values(), truth.p) / len(norms) ** (1 / truth.p)
        yield mean, "p-th powers averaged over ranks where they should be added"


def _factors_of_axes(truth: Truth, axes: Lines) -> Iterator[tuple[float, str]]:
    """What a whole norm becomes when it is off by a factor that an axis' size explains."""
    for axis, lines in axes.items():
        size = max(len(line) for line in lines)
        if size == 1:
            continue
        if math.isfinite(truth.p):
            root = size ** (1 / truth.p)
            yield truth.norm * root, f"counted {size} times on axis {axis}"
            yield (
                truth.norm / root,
                f"never reduced over axis {axis}, or counted on one of its {size} ranks only",
            )
        yield truth.norm * size, f"summed over the {size} ranks of axis {axis} where it should be averaged"
        yield truth.norm / size, f"averaged over the {size} ranks of axis {axis} once too often"


def _factors(ratio: float, within: float) -> Iterator[str]:
    """Plain factors that have nothing to do with a mesh."""
    high = max(ratio, 1 / ratio)
    power = round(math.log2(high))
    if power >= 1 and abs(high / 2**power - 1) <= within:
        sign = "" if ratio > 1 else "-"
        yield f"a factor of 2**{sign}{power} left in: a loss scale, or the number of micro-batches"
    elif 2 < round(high) <= 4096 and abs(high / round(high) - 1) <= within:
        side = f"{round(high)}" if ratio > 1 else f"1/{round(high)}"
        yield f"a factor of {side} left in: the number of micro-batches or ranks"


def _held(truth: Truth) -> list[_Held]:
    """The distinct pieces of the gradient with all the ranks that hold each."""
    holders: dict[tuple[str, object], list[int]] = {}
    first: dict[tuple[str, object], float] = {}
    for piece in truth.pieces:
        if piece.gradient is not None:
            identity = (piece.name, key(piece.gradient))
            holders.setdefault(identity, []).append(piece.rank)
            first.setdefault(identity, piece.gradient.norm)
    return [_Held(identity[0], norm, tuple(holders[identity])) for identity, norm in first.items()]
