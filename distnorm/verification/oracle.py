"""The whole gradient, gathered on the root parameter by parameter, in fp64, apart from the fast path."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from distnorm.errors import DistnormError
from distnorm.verification.faults import (
    boxes,
    claim_faults,
    coverage_faults,
    key,
    replica_faults,
    replicas_of,
    shape_faults,
    shape_of,
)
from distnorm.verification.pieces import (
    Gradient,
    GradientOf,
    Layout,
    Piece,
    combine,
    describe,
    in_grad,
    local_of,
    p_norm,
)
from distnorm.verification.ranks import Ranks, attempt, rank_list

# How much gradient one gather may bring to the root, a single larger parameter excepted.
_STEP_BYTES = 64 << 20

_Step = tuple[list[str], dict[str, tuple[int, int]]]
"""Names to judge, and who sends what they need: digest -> (rank, index on that rank)."""


@dataclass(slots=True)
class Truth:
    """What the root knows once it has seen the whole gradient. Norms are of order p unless said otherwise."""

    p: float
    pieces: list[Piece]
    norm: float = 0.0
    norms: dict[str, float] = field(default_factory=dict)  # by parameter
    other_norms: dict[float, float] = field(default_factory=dict)  # of the whole gradient, by order
    elements: int = 0
    replicated: int = 0  # pieces that more than one rank holds
    coverage: list[str] = field(default_factory=list)  # faults
    replicas: list[str] = field(default_factory=list)  # faults
    non_finite: list[str] = field(default_factory=list)


def gather_truth(
    ranks: Ranks,
    named: Sequence[tuple[str, Tensor]],
    p: float,
    layouts: Mapping[int, Layout] = MappingProxyType({}),
    gradient_of: GradientOf = in_grad,
) -> Truth | None:
    """Gather the gradients of all ranks and judge their pieces; a collective call.

    Of pieces with the same bits only the first travels, so replicas cost no more than a digest.

    Args:
        ranks: the ranks that take part.
        named: this rank's parameters under their names in the whole model.
        p: order of the norm, > 0 or inf.
        layouts: what this rank holds of parameters that don't say it themselves, by their `id`.
        gradient_of: gives a parameter's gradient.

    Returns:
        What was found, on the root; `None` elsewhere.

    Raises:
        DistnormError: a gradient can't be read or assembled, on every rank.
    """
    own = ranks.each(
        "reading the gradients", lambda: _describe_all(ranks.rank, named, p, layouts, gradient_of)
    )
    truth = Truth(p, [piece for pieces in ranks.gather(own) for piece in pieces])
    by_name = _by_name(truth.pieces)
    problem = None
    for names, senders in ranks.on_root("planning the gathering", lambda: _steps(by_name)):
        sent, error = _send(ranks.rank, [gradient_of(tensor) for _, tensor in named], senders)
        received = ranks.gather((sent, error))
        problem = problem or next((text for _, text in received if text), None)
        if ranks.is_root and problem is None:  # with a problem, go on gathering: the others do
            values = {digest: value for part, _ in received for digest, value in part.items()}
            problem = _judge_all(truth, by_name, names, values)
    ranks.on_root("gathering the gradients", lambda: _require_none(problem))
    truth.norm = combine(truth.norms.values(), p)
    return truth if ranks.is_root else None


def _describe_all(
    rank: int,
    named: Sequence[tuple[str, Tensor]],
    p: float,
    layouts: Mapping[int, Layout],
    gradient_of: GradientOf,
) -> list[Piece]:
    pieces = [
        describe(rank, index, name, tensor, p, layouts.get(id(tensor)), gradient_of)
        for index, (name, tensor) in enumerate(named)
    ]
    return [piece for piece in pieces if piece is not None]


def _by_name(pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.name, []).append(piece)
    return groups


def _steps(by_name: dict[str, list[Piece]]) -> list[_Step]:
    steps: list[_Step] = []
    filled = 0
    for name, pieces in by_name.items():
        senders, size = {}, 0
        for piece in pieces:
            if (gradient := piece.gradient) is not None and gradient.digest not in senders:
                senders[gradient.digest] = (piece.rank, piece.index)
                size += math.prod(gradient.shape) * gradient.dtype.itemsize
        if not steps or filled + size > _STEP_BYTES:
            steps.append(([], {}))
            filled = 0
        steps[-1][0].append(name)
        steps[-1][1].update(senders)
        filled += size
    return steps


def _send(
    rank: int, held: Sequence[Tensor | None], senders: dict[str, tuple[int, int]]
) -> tuple[dict[str, Tensor], str | None]:
    def copy_out() -> dict[str, Tensor]:
        mine = {digest: index for digest, (sender, index) in senders.items() if sender == rank}
        gradients = {digest: held[index] for digest, index in mine.items()}
        # cloned, since a pickled view takes all of the storage along that it looks into
        return {d: local_of(g).cpu().contiguous().clone() for d, g in gradients.items() if g is not None}

    sent, error = attempt(copy_out)
    return (sent[0] if sent else {}), error


def _judge_all(
    truth: Truth, by_name: dict[str, list[Piece]], names: list[str], values: dict[str, Tensor]
) -> str | None:
    def judge_each() -> None:
        for name in names:
            _judge(truth, name, by_name[name], values)

    return attempt(judge_each)[1]


def _judge(truth: Truth, name: str, pieces: list[Piece], values: dict[str, Tensor]) -> None:
    """Judge one parameter's pieces, and add its gradient to the norms."""
    shape = pieces[0].global_shape
    held = [(piece, piece.gradient) for piece in pieces if piece.gradient is not None]
    faults = shape_faults(pieces)
    if not faults:
        faults += coverage_faults(shape, "parameter", [(p.extents, p.rank) for p in pieces], False)
        faults += coverage_faults(shape, "gradient", [(g.extents, p.rank) for p, g in held], True)
        faults += claim_faults(pieces)
    truth.coverage += [f"'{name}': {fault}" for fault in faults]
    for replicas in replicas_of(pieces):
        truth.replicated += len(replicas) > 1
        truth.replicas += [f"'{name}': {fault}" for fault in replica_faults(replicas, values)]
    if bad := [piece.rank for piece, gradient in held if not math.isfinite(gradient.norm)]:
        truth.non_finite.append(f"'{name}' on {rank_list(bad)}")
    dense = _assemble(shape, held, values)
    truth.elements += dense.numel()
    truth.norms[name] = p_norm(dense, truth.p)
    for q in {1.0, 2.0, math.inf} - {truth.p}:
        truth.other_norms[q] = combine([truth.other_norms.get(q, 0.0), p_norm(dense, q)], q)


def _assemble(
    shape: tuple[int, ...], held: Sequence[tuple[Piece, Gradient]], values: dict[str, Tensor]
) -> Tensor:
    """The dense gradient in fp64: one of each set of replicas, partial summands reduced, zero elsewhere."""
    wide = torch.complex128 if any(g.dtype.is_complex for _, g in held) else torch.float64
    dense = torch.zeros(shape, dtype=wide, device="cpu")
    done: set[object] = set()
    for piece, gradient in held:
        fits = piece.global_shape == shape and shape_of(gradient.extents) == gradient.shape
        if not fits or key(gradient) in done:
            continue
        done.add(key(gradient))
        parts = math.prod(size for _, _, size, op in gradient.partial if op == "avg")
        value = values[gradient.digest].to(wide) / parts
        for here, there in boxes(gradient.extents):
            dense[here] += value[there]
    return dense


def _require_none(problem: str | None) -> None:
    if problem:
        raise DistnormError(problem)
