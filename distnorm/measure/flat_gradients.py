"""Gradients that lie in tensors which a framework keeps, many perhaps in one: found by the fast path too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from distnorm import kernels
from distnorm.sources.shards import FlatGradient


class FlatFinder:
    """Finds gradients by the tensors they lie in, step after step.

    Args:
        places: where each lies.
        tensors: each as it was read with care.

    Raises:
        ValueError: a gradient does not lie there.
    """

    def __init__(self, places: Sequence[FlatGradient], tensors: Sequence[Tensor]) -> None:
        finds = {place.key: place.find for place in places}
        order = {key: i for i, key in enumerate(finds)}
        self._finds: list[Callable[[], Tensor | None]] = list(finds.values())
        self._parts = [
            (order[place.key], place.at, tensor.numel())
            for place, tensor in zip(places, tensors, strict=True)
        ]
        self._in = np.array([i for i, _, _ in self._parts], dtype=np.int64)
        self._offsets = np.array(
            [at * tensor.element_size() for (_, at, _), tensor in zip(self._parts, tensors, strict=True)],
            dtype=np.int64,
        )
        held = [tensor for find in self._finds if (tensor := find()) is not None]
        if len(held) < len(self._finds):
            raise ValueError("expected tensors that hold gradients, found none")
        self._finder = kernels.Finder(held, are_given=True)
        for (i, at, numel), tensor in zip(self._parts, tensors, strict=True):
            if held[i].dtype is not tensor.dtype or at + numel > held[i].numel():
                raise ValueError("expected a gradient to be a part of its tensor")
        if not np.array_equal(self._at(self._finder.table.starts), kernels.addresses_of(tensors)):
            raise ValueError("expected gradients to lie in their tensors, found copies")

    def __call__(self, holders: object) -> kernels.Found | None:
        """As `kernels.Finder`; of the holders nothing is asked."""
        found = self._finder([find() for find in self._finds])  # type: ignore[misc]
        if found is None:
            return None
        return found.replaced(self._at(found.addresses), partial(self._tensors, found))

    def _at(self, starts: kernels.Ints) -> kernels.Ints:
        at: kernels.Ints = starts[self._in] + self._offsets
        return at

    def _tensors(self, found: kernels.Found) -> list[Tensor]:
        held = [tensor.view(-1) for tensor in found.tensors()]
        return [held[i].narrow(0, at, numel) for i, at, numel in self._parts]
