"""Which tensors of a measured set are not finite, by numbers that the measurement leaves behind anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distnorm.kernels.eager import _FLOAT8


class FiniteMarks:
    """Numbers of single tensors, finite just where all elements are. Nothing waits for a device but `bad`.

    Args:
        positions: of each tensor that may be measured, by its `id`.
    """

    def __init__(self, positions: Mapping[int, int]) -> None:
        self._positions = positions
        self._found: list[tuple[list[int], Tensor, Tensor | None]] = []

    def add(self, tensors: Sequence[Tensor], numbers: Tensor, runs: Tensor | None = None) -> None:
        """Keep numbers of tensors.

        Args:
            tensors: whose they are.
            numbers: [tensors] on any device; or with `runs`, of parts of the tensors.
            runs: [tensors, 2] int64: from which to which number the parts of each tensor go.
        """
        self._found.append(([self._positions[id(tensor)] for tensor in tensors], numbers, runs))

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
        found: list[int] = []
        for positions, numbers, runs in self._found:
            is_bad = ~numbers.cpu().isfinite()
            if runs is None:
                found += [position for position, bad in zip(positions, is_bad.tolist(), strict=True) if bad]
                continue
            for position, (first, last) in zip(positions, runs.tolist(), strict=True):
                if is_bad[first:last].any():
                    found.append(position)
        return sorted(found)
