"""What can be wrong with the pieces of one parameter, in sentences; none where all is well."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from distnorm.verification.pieces import Extents, Gradient, Piece
from distnorm.verification.ranks import rank_list

_SHOWN_PIECES = 8


def shape_faults(pieces: Sequence[Piece]) -> list[str]:
    """Global shapes that differ between ranks, and local shapes other than the placements say."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for piece in pieces:
        shapes.setdefault(piece.global_shape, []).append(piece.rank)
    if len(shapes) > 1:
        found = "; ".join(f"{shape} on {rank_list(where)}" for shape, where in shapes.items())
        return [f"expected one global shape, found {found}"]
    held = [("parameter", p.rank, p.extents, p.shape) for p in pieces]
    held += [("gradient", p.rank, p.gradient.extents, p.gradient.shape) for p in pieces if p.gradient]
    return [
        f"expected a local {what} of {shape_of(extents)} by the placements on rank {rank}, found {shape}"
        for what, rank, extents, shape in held
        if shape_of(extents) != shape
    ]


def coverage_faults(
    shape: tuple[int, ...], what: str, held: Sequence[tuple[Extents, int]], missing_allowed: bool
) -> list[str]:
    """Elements of a parameter that no piece holds, or that several different pieces hold."""
    holders: dict[Extents, list[int]] = {}
    for extents, rank in held:
        holders.setdefault(extents, []).append(rank)
    times = torch.zeros(shape, dtype=torch.int16, device="cpu")
    for extents in holders:
        for here, _ in boxes(extents):
            times[here] += 1
    found = "; ".join(f"{show(extents)} on {rank_list(ranks)}" for extents, ranks in holders.items())
    if len(holders) > _SHOWN_PIECES:
        found = f"{len(holders)} pieces on {rank_list([rank for _, rank in held])}"
    faults = []
    missing = 0 if missing_allowed else int((times == 0).sum())
    if missing:
        faults.append(
            f"expected {times.numel()} elements of the {what}, found {times.numel() - missing}: "
            f"{missing} are missing (pieces: {found})"
        )
    if twice := int((times > 1).sum()):
        faults.append(
            f"expected every element of the {what} in one piece, found {twice} of {times.numel()} in several "
            f"(pieces: {found})"
        )
    return faults


def claim_faults(pieces: Sequence[Piece]) -> list[str]:
    """Pieces of one identity whose parameter values differ: no replicas, whatever their names say."""
    first: dict[Extents, Piece] = {}
    groups: dict[Extents, list[int]] = {}
    for piece in pieces:
        claim = first.setdefault(piece.extents, piece)
        if claim.digest != piece.digest:
            groups.setdefault(piece.extents, []).append(piece.rank)
    return [
        f"expected on {rank_list(others)} the parameter values that rank {first[extents].rank} holds for "
        f"{show(extents)}, found others: they are no replicas and need other names, or have drifted apart"
        for extents, others in groups.items()
    ]


def replicas_of(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Sort the pieces into sets whose gradients must be equal; summands of a partial one are no replicas."""
    groups: dict[object, list[Piece]] = {}
    for piece in pieces:
        identity = key(piece.gradient) if piece.gradient else (piece.extents, ())
        if 0 not in piece.shape:
            groups.setdefault(identity, []).append(piece)
    return list(groups.values())


def key(gradient: Gradient) -> tuple[object, ...]:
    """What replicas of a gradient have in common: its indices and, if it is partial, which summand it is."""
    return gradient.extents, tuple((axis, which) for axis, which, _, _ in gradient.partial)


def replica_faults(replicas: Sequence[Piece], values: Mapping[str, Tensor]) -> list[str]:
    """Gradients of replicas that aren't bitwise equal, or that only some of them have."""
    present = [(piece, piece.gradient) for piece in replicas if piece.gradient is not None]
    absent = [piece.rank for piece in replicas if piece.gradient is None]
    if not present:
        return []
    first, expected = present[0]
    faults = []
    if absent:
        faults.append(f"expected a gradient on {rank_list(absent)} as on rank {first.rank}, found none")
    others: dict[str, list[int]] = {}
    for piece, gradient in present[1:]:
        if gradient.digest != expected.digest:
            others.setdefault(gradient.digest, []).append(piece.rank)
    return faults + [
        f"expected on {rank_list(where)} the gradient of {show(first.extents)} that rank {first.rank} holds, "
        f"found another: {_difference(values.get(expected.digest), values.get(digest))}"
        for digest, where in others.items()
    ]


def _difference(expected: Tensor | None, found: Tensor | None) -> str:
    if expected is None or found is None:
        return "its bits differ"
    if (expected.shape, expected.dtype) != (found.shape, found.dtype):
        return f"{found.dtype} of shape {tuple(found.shape)} for {expected.dtype} of {tuple(expected.shape)}"
    apart = (expected != found) & ~(expected.isnan() & found.isnan())
    if not bool(apart.any()):
        return "they differ in the sign of a zero or the bits of a NaN"
    at = tuple(int(i) for i in apart.nonzero()[0]) if apart.ndim else ()
    return (
        f"{int(apart.sum())} of {apart.numel()} elements differ, first local index {at}: "
        f"expected {expected[at].item()!r}, found {found[at].item()!r}"
    )


def boxes(extents: Extents) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """The boxes a piece consists of: where each lies in the whole tensor, and where in the local one."""
    dims = []
    for runs in extents:
        at, found = 0, []
        for low, high in runs:
            found.append((slice(low, high), slice(at, at + high - low)))
            at += high - low
        dims.append(found)
    for box in itertools.product(*dims):
        yield tuple(here for here, _ in box), tuple(there for _, there in box)


def shape_of(extents: Extents) -> tuple[int, ...]:
    """The shape of the local tensor that holds a piece."""
    return tuple(sum(high - low for low, high in runs) for runs in extents)


def show(extents: Extents) -> str:
    """Write a piece as one writes an index: ``[0:4, 8:16]``."""
    return f"[{', '.join('+'.join(f'{low}:{high}' for low, high in runs) or 'none' for runs in extents)}]"
