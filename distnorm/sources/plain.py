"""Plain tensors: single-process models, DDP, and what stands undistributed beside DTensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from distnorm.errors import UnsupportedGradientError
from distnorm.sources.shards import GradShard, Source, measurable, whole


@dataclass(frozen=True, slots=True)
class PlainShard(GradShard):
    """A whole parameter: ranks that hold the same name are replicas."""

    has_fast_path: ClassVar[bool] = True

    def witness(self) -> Tensor:
        return self.holder.detach()

    def read(self) -> Tensor | None:
        value = self.value()
        if value is None:
            return None
        if hasattr(value, "to_local"):
            raise UnsupportedGradientError("expected a plain gradient of a plain tensor, found a DTensor")
        return measurable(value)


def shard(name: str, tensor: Tensor, source: Source) -> PlainShard:
    """Describe a plain tensor."""
    shape = tuple(tensor.shape)
    return PlainShard(name, tensor, source, whole(shape), shape, shape)
