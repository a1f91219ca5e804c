"""Plain tensors: single-process models, DDP, and what stands undistributed beside DTensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distnorm.errors import UnsupportedGradientError
from distnorm.sources.shards import GradShard, LayoutChangedError, Route, require_dense, whole


def _layout_of(gradient: Tensor) -> tuple[torch.dtype, int]:
    return gradient.dtype, gradient.numel()


def _addresses(holders: Sequence[Tensor], layouts: Sequence[tuple[torch.dtype, int]]) -> Iterator[int]:
    for holder, (dtype, numel) in zip(holders, layouts, strict=True):
        gradient = holder.grad
        if (
            type(gradient) is not Tensor
            or gradient.dtype is not dtype
            or gradient.numel() != numel
            or not gradient.is_cpu
            or not gradient.is_contiguous()
        ):
            raise LayoutChangedError
        yield gradient.data_ptr()


def _mark_of(gradient: Tensor) -> tuple[int, ...]:
    return gradient._version, gradient.data_ptr()


_ROUTE = Route(_layout_of, _addresses, _mark_of, is_versioned=True)


@dataclass(frozen=True, slots=True)
class PlainShard(GradShard):
    """A whole parameter: ranks that hold the same name are replicas."""

    route = _ROUTE

    def witness(self) -> Tensor:
        return self.holder.detach()

    def read(self) -> Tensor | None:
        value = self.take(self.holder)
        if value is None:
            return None
        require_dense(value)
        if hasattr(value, "to_local"):
            raise UnsupportedGradientError("expected a plain gradient of a plain tensor, found a DTensor")
        return value


def holds(tensor: Tensor) -> bool:
    """Every tensor that no framework claims is a plain one."""
    return isinstance(tensor, torch.Tensor)


def shard(name: str, tensor: Tensor, take: Callable[[Tensor], Tensor | None]) -> PlainShard:
    """Describe a plain tensor."""
    shape = tuple(tensor.shape)
    return PlainShard(name, tensor, take, whole(shape), shape, shape)
