"""Plain tensors: single-process models, DDP, and what stands undistributed beside DTensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distnorm.errors import UnsupportedGradientError
from distnorm.shards import GradShard, Route, require_dense, whole


@dataclass(frozen=True, slots=True)
class PlainShard(GradShard):
    """A whole parameter: ranks that hold the same name are replicas."""

    route = Route(layout_of=type)

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
