"""Frozen parameters that can't be read, and never get a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

import distnorm
from tests.refusals import TIMEOUT, rank


class Opaque(Tensor):
    """Has no operators at all."""

    @staticmethod
    def __new__(cls) -> Opaque:
        return Tensor._make_wrapper_subclass(cls, (4, 4), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Opaque()
        raise NotImplementedError(str(func))


FROZEN = {
    "meta": lambda: torch.empty(4, 4, device="meta"),
    "no operators": Opaque,
    "int8, unlike on each rank": lambda: torch.full((4, 4), rank(), dtype=torch.int8),
    "float8": lambda: torch.ones(4, 4).to(torch.float8_e4m3fn),
    "float4": lambda: torch.ones(4, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8),
    "int8 DTensor": lambda: distribute_tensor(
        torch.ones(4, 4, dtype=torch.int8), init_device_mesh("cpu", (2,)), [Replicate()]
    ),
}
CONFIGS: list[dict[str, Any]] = [
    {},
    {"clip": {"policy": {"name": "agc", "lambda": 1e9}}},
    {"clip": {"groups": [{"name": "g", "params": ["trained"], "max_norm": 1e9}]}},
    {"monitor": {"every": 1, "replicas": True}},
]


def beside_frozen(kind: str) -> list[float]:
    trained = nn.Parameter(torch.zeros(2))
    named = [("trained", trained), ("frozen", nn.Parameter(FROZEN[kind](), requires_grad=False))]
    clippers = [distnorm.GradClipper(named, config) for config in CONFIGS]
    norms = []
    for _ in range(2):
        trained.grad = torch.tensor([3.0, 4.0])
        norms.append(float(distnorm.clip_grad_norm_(named, 100.0)))
        norms += [float(clipper.clip().total_norm) for clipper in clippers]
    return norms


@pytest.mark.parametrize("kind", FROZEN)
def test_frozen_parameters_are_not_read(ranks, kind):
    for norms in ranks(2, beside_frozen, kind, timeout=TIMEOUT):
        assert norms == [5.0] * 2 * (1 + len(CONFIGS))
