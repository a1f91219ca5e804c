"""What ranks say when a call is refused: kinds and messages as plain data, one a rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

import distnorm

TIMEOUT = 30.0  # seconds: what bounded time means here
Heard = tuple[str, Any]


def heard(call: Callable[[], Any]) -> Heard:
    """The name of the error that a call raises and its message, or "" and the number that it returns."""
    try:
        value = call()
    except distnorm.DistnormError as error:
        return type(error).__name__, str(error)
    if isinstance(value, distnorm.ClipResult):
        value = value.total_norm
    return "", value.item() if isinstance(value, torch.Tensor) else None


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))


def with_gradient(*values: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    result = nn.Parameter(torch.zeros(len(values), dtype=dtype))
    result.grad = torch.tensor(values, dtype=dtype)
    return result


def distributed(
    sizes: tuple[int, ...], placements: list[Placement], *shape: int, seed: int = 0
) -> nn.Parameter:
    """A parameter on a mesh of all ranks, with a gradient of ones."""
    mesh = init_device_mesh("cpu", sizes)
    result = nn.Parameter(distribute_tensor(parameter(*shape, seed=seed).detach(), mesh, placements))
    assert isinstance(result.data, DTensor)
    result.grad = torch.ones_like(result)
    return result


def with_ones(tensor: nn.Parameter) -> nn.Parameter:
    tensor.grad = torch.ones_like(tensor)
    return tensor


def clipper(
    target: Any, nonfinite: str = "raise", max_norm: float | None = 1.0, **more: Any
) -> distnorm.GradClipper:
    clip = {"max_norm": max_norm, "nonfinite": nonfinite}
    return distnorm.GradClipper(target, {"clip": clip}, **more)


def rank() -> int:
    return dist.get_rank()


def is_nan(said: Heard) -> bool:
    return said[0] == "" and math.isnan(said[1])
