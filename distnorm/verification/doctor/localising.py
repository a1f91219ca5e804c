"""Where two runs part: the first module boundary at which their tensors differ. It runs on the first rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distnorm.verification.doctor.exchanging import (
    BEFORE,
    exchange_axes,
    same_direction,
    scaled_residual,
    scaled_tokens,
    wrong_exchange,
)
from distnorm.verification.doctor.explaining import Copy, Piece, explain
from distnorm.verification.doctor.mistakes import Circumstances, Explanation, Mistake
from distnorm.verification.doctor.recording import Record
from distnorm.verification.doctor.running import Watched, joined
from distnorm.verification.doctor.sketch import Box, sketch_rows
from distnorm.verification.doctor.tracing import (
    BACKWARD,
    FORWARD,
    INPUT,
    INPUT_GRADIENT,
    OUTPUT_GRADIENT,
    WEIGHTS,
    Boundary,
)

_OPEN = (Mistake.UNEXPLAINED, Mistake.REPLICAS)
_MARGIN = 8  # times what the reference's own last bits change: sketches scatter by their number


@dataclass(frozen=True, slots=True)
class Parting:
    """The first boundary at which the runs differ, forward or backward.

    Args:
        boundary: where.
        after: the module whose boundary before it, in the order of the run, was still right; `None` if none.
        difference: the relative difference there.
        explanations: what explains it.
    """

    boundary: Boundary
    after: str | None
    difference: float
    explanations: tuple[Explanation, ...]

    @property
    def is_forward(self) -> bool:
        """Whether they part in the forward pass."""
        return self.boundary.kind in FORWARD

    @property
    def place(self) -> str:
        """Where the cause is, in words."""
        name = self.boundary.module or "the model"
        if self.boundary.kind == INPUT:
            return f"before {name}" + (f", after {self.after}" if self.after else "")
        if self.boundary.kind == OUTPUT_GRADIENT:
            return f"in the backward after {name}'s output" + (f", before {self.after}" if self.after else "")
        return f"in {name}" if self.is_forward else f"in the backward of {name}"


@dataclass(slots=True)
class Traced:
    """What one rank recorded."""

    rows: list[str]
    records: dict[Boundary, Record]
    tokens: dict[Boundary, Tensor]
    modules: frozenset[str]


class Localiser:
    """Compares ranks' records with the reference's trace.

    Args:
        watched: the reference's run.
        shaken: the reference's runs with other last bits.
        ranks: what ranks recorded, by rank.
        around: the axes.
    """

    def __init__(
        self,
        watched: Watched,
        shaken: Sequence[Watched],
        ranks: Mapping[int, Traced],
        around: Circumstances,
    ) -> None:
        self._rows = {row: at for at, row in enumerate(watched.rows)}
        self._trace = {b: joined(calls) for b, calls in watched.trace.items()}
        self._shaken = [{b: joined(calls) for b, calls in run.trace.items()} for run in shaken]
        self._ranks, self._around = ranks, around
        self._held = {rank: self._rows_of(rank) for rank in ranks}
        self._cache: dict[tuple[Boundary, Box], Tensor] = {}
        self._scales = self._loss_scales()

    def first(self, kinds: Sequence[str]) -> Parting | None:
        """The first boundary of these kinds at which a rank's tensors are not the reference's."""
        last: str | None = None
        for boundary in self._trace:
            if boundary.kind not in kinds or not self._comparable(boundary):
                continue
            pieces, difference, tolerance = self._pieces(boundary)
            if not pieces:
                continue
            if difference > tolerance:
                gathering = self._ungathered(boundary, tolerance)
                found = [gathering] if gathering else explain(pieces, tolerance, self._around)
                if any(one.mistake in _OPEN for one in found):
                    exchanged = self._exchanged(boundary, pieces, tolerance)
                    found = [exchanged] if exchanged else list(map(self._inferred, found))
                return Parting(boundary, last, difference, tuple(found))
            last = boundary.module
        return None

    def forward(self) -> Parting | None:
        """Where the forward passes part."""
        return self.first(FORWARD)

    def backward(self) -> Parting | None:
        """Where the backward passes part."""
        return self.first(BACKWARD)

    def _inferred(self, found: Explanation) -> Explanation:
        """What no sum explains: where ranks hold other elements each, a missing reduction shows so."""
        axes = [
            axis for axis in self._around.axes if self._around.size(axis) > 1 and self._is_model_axis(axis)
        ]
        if found.mistake not in _OPEN or len(axes) != 1:
            return found
        text = f"neither the right one nor a multiple; consistent with a missing reduction over {axes[0]}"
        return replace(found, mistake=Mistake.UNREDUCED, text=text, axes=(axes[0],))

    def _exchanged(self, boundary: Boundary, pieces: Sequence[Piece], tolerance: float) -> Explanation | None:
        """What explains a difference of a module in which ranks send tokens to each other."""
        modules = {rank: traced.modules for rank, traced in self._ranks.items()}
        axes = exchange_axes(boundary.module, modules, self._around)
        if not axes:
            return None
        inner = []
        for other in self._trace:
            if other.module.startswith(boundary.module + ".") and same_direction(other, boundary):
                by_rank = {
                    rank: traced.tokens[other] / (1.0 if other.kind in FORWARD else self._scales[rank])
                    for rank, traced in self._ranks.items()
                    if other in traced.tokens
                }
                if by_rank:
                    inner.append((other, by_rank, self._trace[other], 4 * self._tolerance(other, 0.0)))
        found = scaled_tokens(inner, self._around)
        if found is None and boundary.kind in BEFORE:
            before = self._pieces(Boundary(boundary.module, BEFORE[boundary.kind], boundary.which))[0]
            found = scaled_residual(boundary, pieces, before, tolerance, self._around)
        ranks = tuple(sorted({rank for piece in pieces for copy in piece.copies for rank in copy.ranks}))
        return found or wrong_exchange(axes, ranks)

    def _is_model_axis(self, axis: str) -> bool:
        """Whether ranks along an axis are given the same rows, and so share the work on them."""
        if axis.startswith("pp"):
            return False
        lines = [line for line in self._around.axes[axis] if len(line) > 1]
        return all(len({tuple(self._held[rank]) for rank in line}) == 1 for line in lines)

    def _ungathered(self, boundary: Boundary, tolerance: float) -> Explanation | None:
        """Whether ranks hold their own shard again and again in place of their neighbours'."""
        for axis in self._around.axes:
            size = self._around.size(axis)
            for dim in range(1, self._trace[boundary].ndim if size > 1 else 0):
                found = {rank: self._repeats(boundary, rank, axis, dim, tolerance) for rank in self._ranks}
                answers = [answer for answer in found.values() if answer is not None]
                if answers and all(answers):
                    ranks = tuple(rank for rank, answer in found.items() if answer)
                    text = f"each rank holds its own shard {size} times, not those of the others along {axis}"
                    return Explanation(Mistake.UNGATHERED, text, ranks, (axis,))
        return None

    def _repeats(self, boundary: Boundary, rank: int, axis: str, dim: int, tolerance: float) -> bool | None:
        """Whether a rank holds repeats of its shard; `None` where it holds nothing, or what is right."""
        record, rows = self._ranks[rank].records.get(boundary), self._held[rank]
        line = self._around.line(axis, rank)
        if record is None or not record.calls or len(line) < 2:
            return None
        whole = self._cut(boundary, record.box)
        if whole.shape[dim] % len(line):
            return False
        own = whole.chunk(len(line), dim)[line.index(rank)]
        candidate = sketch_rows(torch.cat([own] * len(line), dim), record.box)
        right = sketch_rows(whole, record.box)
        values = record.rows
        if boundary.kind in WEIGHTS:
            candidate, right = (c.expand(len(values), -1) for c in (candidate, right))
        elif -1 in rows or len(values) != len(rows):
            return None
        else:
            candidate, right = candidate[rows], right[rows]
        if float((values - right).norm()) <= tolerance * float(right.norm()):
            return None
        return float((values - candidate).norm()) <= tolerance * float(candidate.norm())

    def _comparable(self, boundary: Boundary) -> bool:
        is_staged = any(not traced.rows for traced in self._ranks.values())
        return bool(boundary.module) or not is_staged  # a stage's own ends are not the model's

    def _rows_of(self, rank: int) -> list[int]:
        traced = self._ranks[rank]
        digests = traced.rows
        if not digests:  # a later pipeline stage: the rows of the first stage on its line
            for axis in self._around.axes:
                others = (r for r in self._around.line(axis, rank) if r in self._ranks)
                digests = next((self._ranks[r].rows for r in others if self._ranks[r].rows), [])
                if digests and axis.startswith("pp"):
                    break
        return [self._rows.get(digest, -1) for digest in digests]

    def _cut(self, boundary: Boundary, box: Box) -> Tensor:
        cut = self._trace[boundary]
        for dim, (start, stop, _) in enumerate(box, 1):
            cut = cut.narrow(dim, start, stop - start)
        return cut

    def _both(self, boundary: Boundary, rank: int) -> tuple[Record, Tensor, Tensor] | None:
        """A rank's record of a boundary, its sketches, and the reference's; `None` if they don't compare."""
        record, rows = self._ranks[rank].records.get(boundary), self._held[rank]
        if record is None or not record.calls:
            return None
        key = (boundary, record.box)
        if key not in self._cache:
            self._cache[key] = sketch_rows(self._cut(boundary, record.box), record.box)
        expected, values = self._cache[key], record.rows
        if boundary.kind in WEIGHTS:
            return record, values, expected[:1].expand(len(values), -1)
        if self._trace[boundary].shape[0] != len(self._rows) or -1 in rows or len(values) != len(rows):
            return None
        return record, values, expected[rows]

    def _pieces(self, boundary: Boundary) -> tuple[list[Piece], float, float]:
        pieces: dict[object, Piece] = {}
        worst, eps = 0.0, 0.0
        for rank in self._ranks:
            both = self._both(boundary, rank)
            if both is None:
                continue
            record, values, expected = both
            eps = max(eps, torch.finfo(record.dtype).eps)
            if boundary.kind in (OUTPUT_GRADIENT, INPUT_GRADIENT):
                values = values / self._scales.get(rank, 1.0)
            norm = float(expected.norm())
            apart = float((values - expected).norm())
            worst = max(worst, apart / norm if norm else (0.0 if apart == 0 else float("inf")))
            sizes = [len(record.calls[call]) for call in sorted(record.calls)]
            rows = None if boundary.kind in WEIGHTS else tuple(self._held[rank])
            # Each micro-batch is a piece of its own: a mistake may be that of one.
            for call, (found, right) in enumerate(
                zip(torch.split(values, sizes), torch.split(expected, sizes), strict=True)
            ):
                key = (record.box, rows, call)
                piece = pieces.setdefault(key, Piece((), right, [], [], is_sketch=True))
                same = next((c for c in piece.copies if torch.equal(piece.value(c), found)), None)
                if same is None:
                    piece.copies.append(Copy((rank,), found))
                else:
                    same.ranks += (rank,)
        return list(pieces.values()), worst, self._tolerance(boundary, eps)

    def _tolerance(self, boundary: Boundary, eps: float) -> float:
        tensor = self._trace[boundary].double()
        norm = float(tensor.norm())
        eps = max(eps, torch.finfo(self._trace[boundary].dtype).eps)
        moved = [float((run[boundary].double() - tensor).norm()) for run in self._shaken if boundary in run]
        return _MARGIN * (max([*moved, 0.0]) / norm + eps if norm else eps)

    def _loss_scales(self) -> dict[int, float]:
        """By what the loss of each rank is another one than the whole batch's: its rows' mean, say."""
        found: dict[int, float] = {}
        for boundary in self._trace:
            if boundary.kind not in (OUTPUT_GRADIENT, INPUT_GRADIENT) or not self._comparable(boundary):
                continue
            for rank in self._ranks:
                both = self._both(boundary, rank)
                square = 0.0 if both is None else float((both[2] * both[2]).sum())
                if both is not None and square:
                    found[rank] = float((both[1] * both[2]).sum()) / square or 1.0
            if found:
                break
        common = next(iter(found.values()), 1.0)
        return {rank: found.get(rank, common) for rank in self._ranks}
