"""Random models under the real `fully_shard` over real tensor parallel placements, against a dense oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distnorm
from tests import oracle

STEPS = 3
SIZES = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 13])


@dataclass(frozen=True)
class Weight:
    shape: tuple[int, ...]
    tp: str  # "" plain, "R", "S0", "S1", or "P": a replica whose gradient is partial over tp
    root: bool = False  # sharded by the root module, not by its own
    sharded: bool = True  # else it stays apart from FSDP


@dataclass(frozen=True)
class Model:
    axes: tuple[int, int, int]  # dp_replicate, dp_shard, tp
    weights: tuple[Weight, ...]
    order: float
    seed: int
    unused: tuple[int, ...]  # weights without a gradient in the second step

    @property
    def world(self) -> int:
        return math.prod(self.axes)


@st.composite
def weights(draw: st.DrawFn, tp: int) -> Weight:
    shape = tuple(draw(st.lists(SIZES, min_size=1, max_size=3)))
    layout = draw(st.sampled_from(["", "R", "P", "S0", "S0", *(["S1"] if len(shape) > 1 else [])]))
    if layout.startswith("S"):  # FSDP2 asks for even tensor parallel shards
        dim = int(layout[1:])
        shape = (*shape[:dim], shape[dim] * tp, *shape[dim + 1 :])
    return Weight(
        shape, layout if tp > 1 else "", root=draw(st.booleans()), sharded=draw(st.integers(0, 4)) > 0
    )


@st.composite
def models(draw: st.DrawFn) -> Model:
    axes = draw(
        st.sampled_from(
            [(1, 2, 2), (1, 4, 1), (2, 2, 1), (2, 2, 2), (1, 3, 2), (1, 2, 3), (2, 1, 2), (1, 1, 4)]
        )
    )
    layers = tuple(draw(st.lists(weights(axes[2]), min_size=1, max_size=6)))
    return Model(
        axes,
        layers,
        order=draw(st.sampled_from([2.0, 2.0, 1.0, 3.0, 20.0, math.inf])),
        seed=draw(st.integers(0, 99)),
        unused=tuple(draw(st.sets(st.integers(0, len(layers) - 1)))),
    )


def used(model: Model, step: int) -> list[int]:
    return [i for i in range(len(model.weights)) if step != 1 or i not in model.unused]


def whole_value(model: Model, index: int, data_rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed((model.seed * 64 + index) * 64 + data_rank * STEPS + step)
    return torch.randn(model.weights[index].shape, generator=generator, dtype=torch.float64)


def exact_norm(model: Model, step: int) -> float:
    data_ranks = model.axes[0] * model.axes[1]
    total = []
    for index in used(model, step):
        values = [oracle.as_numpy(whole_value(model, index, r, step)) for r in range(data_ranks)]
        total.append(np.sum(values, axis=0) / data_ranks)
    return oracle.dense(total, model.order)


class Layer(nn.Module):
    """One weight; its loss is the inner product with the gradient that it is to get."""

    def __init__(self, weight: Weight, tensor: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.spec = nn.Parameter(tensor), weight

    def forward(self, gradient: torch.Tensor, share: float) -> torch.Tensor:
        if not isinstance(self.weight, DTensor):
            return (self.weight * gradient).sum()
        if self.spec.tp == "P":  # this rank's summand of it
            return (self.weight.to_local(grad_placements=[Partial()]) * (gradient * share)).sum()
        cut = distribute_tensor(gradient, self.weight.device_mesh, self.weight.placements, src_data_rank=None)
        return (self.weight.to_local() * cut.to_local()).sum()


class Whole(nn.Module):
    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, gradients: dict[int, torch.Tensor], share: float) -> torch.Tensor:
        return torch.stack([self.layers[i](gradient, share) for i, gradient in gradients.items()]).sum()


def split(model: Model, mesh: DeviceMesh) -> Whole:
    """The model, distributed over tp and then over the data axes."""
    layers = []
    for index, weight in enumerate(model.weights):
        tensor = whole_value(model, index, 15, 0)
        if weight.tp:
            placement = Shard(int(weight.tp[1:])) if weight.tp.startswith("S") else Replicate()
            tensor = distribute_tensor(tensor, mesh["tp"], [placement], src_data_rank=None)
        layers.append(Layer(weight, tensor))
    whole = Whole(layers)
    data = mesh["dp_replicate", "dp_shard"] if model.axes[0] > 1 else mesh["dp_shard"]
    for layer in layers:
        if layer.spec.sharded and not layer.spec.root:
            fully_shard(layer, mesh=data)
    fully_shard(whole, mesh=data, ignored_params={one.weight for one in layers if not one.spec.sharded})
    return whole


def train(model: Model) -> list[tuple[float, ...]]:
    """For each step the norm as measured and as clipped, and what is left of it after clipping."""
    data_ranks, tp = model.axes[0] * model.axes[1], model.axes[2]
    mesh = init_device_mesh("cpu", model.axes, mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
    whole = split(model, mesh)
    share = (mesh.get_local_rank("tp") + 1) / (tp * (tp + 1) / 2)
    config = {"norm": {"type": model.order}, "clip": {"max_norm": 1.0}}
    clipping = distnorm.GradClipper(whole, config)
    seen = []
    for step in range(STEPS):
        whole.zero_grad()
        gradients = {}
        for index in used(model, step):
            rows = [whole_value(model, index, r, step) for r in range(data_ranks)]
            # What FSDP leaves alone nobody reduces: there every rank has the average at once.
            mine = rows[dist.get_rank() // tp]
            gradients[index] = mine if model.weights[index].sharded else torch.stack(rows).mean(dim=0)
        if gradients:
            whole(gradients, share).backward()
        measured = clipping.measure().total_norm.item()
        result = clipping.clip().to_dict()
        seen.append(
            (measured, result["total_norm"], result["clip_coef"], clipping.measure().total_norm.item())
        )
    return seen


@settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
@given(model=models())
@pytest.mark.slow
def test_every_model_under_fsdp_and_tensor_parallel_has_the_dense_norm(ranks, model):
    reports = ranks(model.world, train, model, timeout=180)
    assert len({repr(report) for report in reports}) == 1, (reports, model)
    for step, (measured, clipped, coef, left) in enumerate(reports[0]):
        exact = exact_norm(model, step)
        assert oracle.relative_error(measured, exact) <= 1e-13, (step, measured, exact, model)
        assert clipped == measured
        assert coef == pytest.approx(oracle.coefficient(exact, 1.0), rel=1e-13)
        assert left == pytest.approx(exact * coef, rel=1e-12)
