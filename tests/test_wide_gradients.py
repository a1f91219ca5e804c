"""Gradients that are copied, or partial, where their parameter is sharded: torch's embedding makes them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import distnorm

ROWS = 7


def whole_gradient(columns: int = 3) -> torch.Tensor:
    return torch.arange(1.0, ROWS * columns + 1, dtype=torch.float64).view(ROWS, columns)


def hand_made(kinds: tuple[str, ...], absent: int | None) -> dict[str, Any]:
    """One parameter sharded over the first axis of a mesh, or over both, with a gradient of `kinds`."""
    size = dist.get_world_size()
    shape = (size,) if len(kinds) == 1 else (2, size // 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("tp", "dp")[: len(kinds)])
    ours = [Shard(0), *([Shard(1)] if len(kinds) > 1 else [])]
    parameter = nn.Parameter(distribute_tensor(torch.zeros(ROWS, 3, dtype=torch.float64), mesh, ours))
    beside = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    clipper = distnorm.GradClipper(
        [("w", parameter), ("b", beside)], {"clip": {"max_norm": 1.0, "nonfinite": "skip"}}
    )
    reports = []
    for _ in range(2):
        local, placements, share = whole_gradient(), [], 1.0
        for axis, kind in enumerate(kinds):
            if kind == "shard":
                local = _chunk(local, axis, mesh)
                placements.append(ours[axis])
            elif kind == "copy":
                placements.append(Replicate())
            else:
                placements.append(Partial(kind))
                if kind == "sum":  # unlike summands that add up to the whole
                    index, n = mesh.get_local_rank(axis), shape[axis]
                    share *= (index + 1) / (n * (n + 1) / 2)
        gradient = DTensor.from_local(
            local * share, mesh, placements, shape=parameter.shape, stride=parameter.stride()
        )
        parameter.grad = None if dist.get_rank() == absent else gradient
        beside.grad = torch.ones_like(beside)
        measured = clipper.measure().to_dict()
        left = parameter.grad is None or parameter.grad.placements == tuple(placements)
        clipped = clipper.clip().to_dict()
        aligned = parameter.grad is None or all(
            found == expected or n == 1
            for found, expected, n in zip(parameter.grad.placements, ours, shape, strict=True)
        )
        full = parameter.grad.full_tensor() if absent is None else None
        right = full is None or torch.allclose(full, whole_gradient() * clipped["clip_coef"], 1e-14)
        reports.append((measured["total_norm"], clipped["total_norm"], left, aligned, right))
    return {"reports": reports}


def _chunk(tensor: torch.Tensor, axis: int, mesh: Any) -> torch.Tensor:
    size, index = mesh.size(axis), mesh.get_local_rank(axis)
    step = -(-tensor.shape[axis] // size)
    return tensor[(slice(None),) * axis + (slice(index * step, (index + 1) * step),)].contiguous()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    "kinds",
    [("copy",), ("sum",), ("avg",), ("sum", "shard"), ("copy", "shard"), ("shard", "sum"), ("sum", "sum")],
    ids="-".join,
)
def test_every_element_counts_once(ranks: Any, kinds: tuple[str, ...], world: int) -> None:
    expected = math.sqrt(float(whole_gradient().square().sum()) + 2)
    for report in ranks(world, hand_made, kinds, None):
        for measured, clipped, left, aligned, right in report["reports"]:
            assert measured == pytest.approx(expected, rel=1e-14)
            assert clipped == pytest.approx(expected, rel=1e-14)
            assert left and aligned and right


def test_a_rank_without_its_summand_counts_its_piece_of_the_sum(ranks: Any) -> None:
    present = sum(index + 1 for index in range(3) if index != 1) / 6
    expected = math.sqrt(float((whole_gradient() * present).square().sum()) + 2)
    for report in ranks(3, hand_made, ("sum",), 1):
        for measured, clipped, *_ in report["reports"]:
            assert measured == clipped == pytest.approx(expected, rel=1e-14)


def vocabulary_parallel() -> tuple[float, float, list[bool]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 5, bias=False)).double()
    tokens = torch.tensor([[0, 3, 10, 3], [7, 7, 1, 2]])
    model(tokens).square().sum().backward()
    exact = [p.grad.clone() for p in model.parameters()]
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in exact))
    model.zero_grad()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    plan = {"0": RowwiseParallel(input_layouts=Replicate()), "1": ColwiseParallel(output_layouts=Replicate())}
    parallelize_module(model, mesh, plan)
    model(tokens).square().sum().backward()
    result = distnorm.GradClipper(model, {"clip": {"max_norm": 1.0}}).clip().to_dict()
    right = [
        torch.allclose(parameter.grad.full_tensor(), gradient * result["clip_coef"], 1e-12)
        for parameter, gradient in zip(model.parameters(), exact, strict=True)
    ]
    return norm, result["total_norm"], right


def test_an_embedding_sharded_over_its_vocabulary(ranks: Any) -> None:
    for norm, found, right in ranks(4, vocabulary_parallel):
        assert found == pytest.approx(norm, rel=1e-14)
        assert all(right)
