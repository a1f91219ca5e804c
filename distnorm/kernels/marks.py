"""Which tensors of a measured set are not finite, to be asked for later, when they have changed.

Triton's kernels leave the numbers behind that say it; other tensors are read once more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from distnorm.kernels.device_table import DeviceTable
from distnorm.kernels.eager import _FLOAT8


class FiniteMarks:
    """Numbers of single tensors, finite where all elements are, but for squares of fp64 beyond 1e154.

    Nothing waits for a device but `bad`.

    Args:
        positions: of each tensor that may be measured, by its `id`; one tensor may have several.
    """

    def __init__(self, positions: Mapping[int, Sequence[int]] = MappingProxyType({})) -> None:
        self._positions = positions
        self._found: list[tuple[Sequence[Sequence[int]], Tensor, Tensor | None]] = []

    @classmethod
    def of_largest(cls, tensors: Sequence[Tensor | None]) -> FiniteMarks:
        """Of tensors on any devices, in a pass of its own."""
        positions: dict[int, list[int]] = {}
        by_device: dict[torch.device, list[Tensor]] = {}
        for i, tensor in enumerate(tensors):
            if tensor is not None:
                positions.setdefault(id(tensor), []).append(i)
                by_device.setdefault(tensor.device, []).append(tensor)
        marks = cls(positions)
        for members in by_device.values():
            marks.add_largest(members)
        return marks

    @classmethod
    def of_table(cls, table: DeviceTable, positions: Sequence[Sequence[int]]) -> FiniteMarks:
        """Of the rows of a table, by what its newest statistic has left, until the next marks are made of it;
        positions are those of each row."""
        marks = cls()
        marks.add_at(positions, table.lend_parts(), table.each)
        return marks

    def add(self, tensors: Sequence[Tensor], numbers: Tensor, runs: Tensor | None = None) -> None:
        """Keep numbers of tensors.

        Args:
            tensors: whose they are.
            numbers: [tensors] on any device; or with `runs`, of parts of the tensors.
            runs: [tensors, 2] int64: from which to which number the parts of each tensor go.
        """
        self.add_at([self._positions[id(tensor)] for tensor in tensors], numbers, runs)

    def add_at(self, positions: Sequence[Sequence[int]], numbers: Tensor, runs: Tensor | None = None) -> None:
        """The same of tensors that are known by their positions."""
        self._found.append((positions, numbers, runs))

    def add_largest(self, tensors: Sequence[Tensor]) -> None:
        """Measure the largest magnitude of each of the tensors of one device, in a pass of its own."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel():
                by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for dtype, members in by_dtype.items():
            wide = [tensor.float() for tensor in members] if dtype in _FLOAT8 else members
            self.add(members, torch.stack(torch._foreach_norm(wide, torch.inf)))

    def bad(self) -> list[int]:
        """The positions of tensors that are not finite, ascending. Waits for the device."""
        found: set[int] = set()
        for positions, numbers, runs in self._found:
            is_bad = ~numbers.cpu().isfinite()
            cuts = [(i, i + 1) for i in range(len(positions))] if runs is None else runs.tolist()
            for held, (first, last) in zip(positions, cuts, strict=True):
                if is_bad[first:last].any():
                    found.update(held)
        return sorted(found)
