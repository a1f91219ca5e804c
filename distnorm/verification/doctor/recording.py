"""The trace of the model under examination: sketches of what this rank holds at module boundaries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distnorm.verification.doctor.batch import row_digests
from distnorm.verification.doctor.mistakes import Circumstances
from distnorm.verification.doctor.sketch import Box, sketch_rows
from distnorm.verification.doctor.tracing import WEIGHTS, Boundary, Tracer
from distnorm.verification.pieces import clean_name, extents_of, is_dtensor, local_of

Shapes = Mapping[Boundary, tuple[int, ...]]
"""The reference's shape at each boundary, in all calls together."""
_MOST = 4096  # tokens that are kept at one boundary


@dataclass(slots=True)
class Record:
    """What a rank holds at one boundary: where its piece lies, and its rows' sketches by call."""

    box: Box
    dtype: torch.dtype
    calls: dict[int, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> Tensor:
        """[rows, k] sketches, one call after the other."""
        return torch.cat([self.calls[call] for call in sorted(self.calls)])


class Recorder:
    """Records rows of the batch, and sketches at module boundaries where a trace is asked for.

    Args:
        modules: this rank's parts of the model.
        rank: this rank's number in its group.
        shapes: the reference's shapes; `None` for no trace.
        around: the mesh axes, over which a piece may be cut.
    """

    def __init__(
        self, modules: list[nn.Module], rank: int, shapes: Shapes | None, around: Circumstances
    ) -> None:
        self.rows: list[str] = []
        self.records: dict[Boundary, Record] = {}
        self.tokens: dict[Boundary, Tensor] = {}  # where rows are not those of the batch: [n, k] sketches
        self.modules = frozenset(clean_name(name, m) for m in modules for name, _ in m.named_modules())
        self._shapes, self._rank, self._around = shapes or {}, rank, around
        self._handles: list[Any] = [
            m.register_forward_pre_hook(self._batch, prepend=True, with_kwargs=True) for m in modules[:1]
        ]
        if shapes is not None:
            self._handles += [Tracer(module, self._on_tensor) for module in modules]

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()

    def _batch(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.rows += row_digests(args, kwargs)

    def _on_tensor(self, boundary: Boundary, call: int, tensor: Tensor) -> None:
        shape = self._shapes.get(boundary)
        box = None if shape is None else self._box(tensor, shape)
        if shape is not None:
            self._keep_tokens(boundary, tensor, shape)
        if box is None:
            return
        record = self.records.setdefault(boundary, Record(box, tensor.dtype))
        if record.box == box:
            record.calls[call] = sketch_rows(local_of(tensor), box)

    def _keep_tokens(self, boundary: Boundary, tensor: Tensor, shape: tuple[int, ...]) -> None:
        """Sketch single tokens, zeros left out, where a tensor has other rows than one process's."""
        if boundary.kind in WEIGHTS or is_dtensor(tensor) or min(tensor.ndim, len(shape)) < 2:
            return
        size = tensor.shape[-1]
        if size != shape[-1] or (tensor.ndim > 2 and tuple(tensor.shape[1:]) == shape[1:]):
            return
        flat = tensor.detach().reshape(-1, size)
        known = self.tokens.get(boundary)
        new = sketch_rows(flat[flat.any(1)][:_MOST], ((0, size, size),))
        self.tokens[boundary] = new if known is None else torch.cat([known, new])[:_MOST]

    def _box(self, tensor: Tensor, shape: tuple[int, ...]) -> Box | None:
        """Where a local tensor lies in the whole one: by its placements, or else by its sizes."""
        if is_dtensor(tensor):
            if any(placement.is_partial() for placement in tensor.placements):  # type: ignore[attr-defined]
                return None
            if tuple(tensor.shape[1:]) != shape[1:]:
                return None
            extents = extents_of(tensor)
            if any(len(runs) != 1 for runs in extents) or extents[0] != ((0, tensor.shape[0]),):
                return None
            return tuple((*runs[0], size) for runs, size in zip(extents[1:], shape[1:], strict=True))
        if tensor.ndim != len(shape) or not tensor.ndim or tensor.shape[0] > shape[0]:
            return None
        box = [self._cut(held, size) for held, size in zip(tensor.shape[1:], shape[1:], strict=True)]
        return None if any(cut is None for cut in box) else tuple(box)  # type: ignore[arg-type]

    def _cut(self, held: int, size: int) -> tuple[int, int, int] | None:
        if held == size:
            return (0, size, size)
        for axis in sorted(self._around.axes, key=lambda axis: axis.startswith(("dp", "pp", "world"))):
            line = self._around.line(axis, self._rank)
            if held * len(line) == size:
                start = held * line.index(self._rank)
                return (start, start + held, size)
        return None
