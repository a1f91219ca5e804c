"""Sums over output units under every sharding, against dense fp64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from distnorm.errors import UnsupportedGradientError
from distnorm.payload.units import UnitStatistics
from distnorm.sources.deepspeed import Piece, shards
from tests import oracle
from tests.payloads import Model, dense_parameters, name_of, steps
from tests.refusals import Heard, heard
from tests.test_topologies import RANDOM, topologies
from tests.topologies import DTYPES, Topology, cut, local_of

FEW = settings(RANDOM, max_examples=3)


def units_of_all(batch: list[Topology]) -> list[list[Any]]:
    return [units_of(topology) for topology in batch]


def units_of(topology: Topology) -> list[Any]:
    model, held = Model.of_topology(topology)
    units = UnitStatistics(model.ranks, model.table, model.shards, model.shares)
    seen = []
    for step in steps(topology, held):
        gradients = model.gradients()
        reduced = model.reduced(units, gradients, "sum")
        norms = units.norms(reduced)
        coefs = 1 / (1 + torch.arange(units.count, dtype=torch.float64))
        units.scale_(gradients, coefs)
        wrong = [
            one.name
            for (one, *_), gradient in zip(held, gradients, strict=True)
            if not scaled(topology, step, model, one, gradient)
        ]
        seen.append((model.table.names, *(found.tolist() for found in norms), wrong))
    return seen


def scaled(topology: Topology, step: int, model: Model, one: Any, found: torch.Tensor | None) -> bool:
    """Whether each local row was multiplied by its unit's coefficient, by the oracle's cut of all of them."""
    if found is None or not found.numel():
        return True
    dense, starts = dense_parameters(topology, step), unit_starts(topology, model.table.names)
    gradient, _ = dense[name_of(topology, one)]
    rows = np.arange(gradient.shape[0]) if gradient.ndim > 1 else np.zeros(1)
    rows = rows.reshape(-1, *[1] * (gradient.ndim - 1)) if gradient.ndim else rows.reshape(())
    coefs = 1 / (1 + starts[name_of(topology, one)] + np.broadcast_to(rows, gradient.shape))
    before, factors = (cut(topology, one, whole, dist.get_rank()) for whole in (gradient, coefs))
    assert found.dtype is DTYPES[one.dtype]
    exact = before * (factors if found.dtype is torch.float64 else factors.astype(np.float32))
    info = torch.finfo(found.dtype)
    allowed = np.abs(exact) * info.eps + info.smallest_normal * info.eps
    return bool((np.abs(oracle.as_numpy(local_of(found)) - exact) <= allowed).all())


def unit_starts(topology: Topology, names: tuple[str, ...]) -> dict[str, int]:
    dense, starts, start = dense_parameters(topology, 0), {}, 0
    for name in names:
        starts[name], shape = start, dense[name][0].shape
        start += shape[0] if len(shape) > 1 else 1
    return starts


def dense_units(whole: np.ndarray) -> list[float]:
    rows = list(whole) if whole.ndim > 1 else [whole]
    return [oracle.dense([np.asarray(row)]) for row in rows]


@pytest.mark.parametrize("world", [1, 4, 6])
@FEW
@given(data=st.data())
@pytest.mark.slow
def test_every_unit_of_every_topology(ranks, world, data):
    drawn = data.draw(st.lists(topologies(world), min_size=2, max_size=2))
    order = data.draw(st.sampled_from([2.0, math.inf]))  # units have 2-norms, whatever the order
    batch = [Topology(**{**vars(topology), "order": order}) for topology in drawn]
    reports = ranks(world, units_of_all, batch)
    for position, topology in enumerate(batch):
        for step in range(topology.steps):
            found = [report[position][step] for report in reports]
            dense = dense_parameters(topology, step)
            for names, gradients, weights, wrong in found:
                assert wrong == [], topology
                assert (names, gradients, weights) == found[0][:3]
            names, gradients, weights, _ = found[0]
            for of, exact in ((gradients, 0), (weights, 1)):
                expected = [norm for name in names for norm in dense_units(dense[name][exact])]
                assert of == pytest.approx(expected, rel=1e-12, abs=0), topology


def test_only_the_parameters_that_are_meant():
    named = [(name, nn.Parameter(torch.full((2, 3), value))) for name, value in (("a", 1.0), ("b", 2.0))]
    for _, parameter in named:
        parameter.grad = parameter.detach() * 3
    model = Model.of(named)
    units = UnitStatistics(model.ranks, model.table, model.shards, model.shares, {"b"})
    gradients, weights = units.norms(model.reduced(units))
    assert gradients.tolist() == pytest.approx([6 * math.sqrt(3)] * 2, rel=1e-15)
    assert weights.tolist() == pytest.approx([2 * math.sqrt(3)] * 2, rel=1e-15)
    units.scale_(model.gradients(), torch.tensor([1.0, 0.5], dtype=torch.float64))
    assert [p.grad.tolist() for _, p in named] == [[[3.0] * 3] * 2, [[6.0] * 3, [3.0] * 3]]


# ---- flat shards


def flat_units(strategy: str, use_orig_params: bool) -> Heard:
    torch.manual_seed(0)
    inner = nn.Linear(3, 5)
    expected = [inner.weight.detach().norm(dim=1).tolist(), inner.bias.detach().norm().item()]
    module = FullyShardedDataParallel(
        inner,
        sharding_strategy=ShardingStrategy[strategy],
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )
    module(torch.ones(2, 3)).sum().backward()
    model = Model.of(list(module.named_parameters()), target=[module])

    def measure(names: set[str] | None) -> torch.Tensor:
        units = UnitStatistics(model.ranks, model.table, model.shards, model.shares, names)
        reduced = model.reduced(units)
        return units.norms(reduced)[1]

    if use_orig_params:
        bias = next(name for name in model.table.names if name.endswith("bias"))
        assert measure({bias}).tolist() == pytest.approx(expected[1:])  # all of it is one unit
    if strategy == "NO_SHARD":
        assert measure(None).tolist() == pytest.approx([*expected[0], expected[1]])
    return heard(lambda: measure(None).sum())


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_flat_parameters_of_fsdp1_are_refused_by_name(ranks, use_orig_params):
    for kind, message in ranks(2, flat_units, "FULL_SHARD", use_orig_params):
        assert kind == "UnsupportedGradientError"
        assert "weight" in message or "+1" in message
        assert "a run of a flat parameter on" in message and "fully_shard" in message


def test_parameters_that_fsdp1_leaves_whole_have_units(ranks):
    assert [kind for kind, _ in ranks(2, flat_units, "NO_SHARD", True)] == ["", ""]


def partition(cut_at: int) -> Any:
    """What a ZeRO optimizer holds of two parameters: from `cut_at` on, or up to it."""
    rank, pieces = dist.get_rank(), []
    for name, shape in (("w", (4, 3)), ("b", (12,))):
        whole = torch.arange(12.0)
        start, stop = ((0, cut_at), (cut_at, 12))[rank]
        part = whole[start:stop]
        pieces.append(
            Piece(
                name, nn.Parameter(whole.view(shape)), shape, start, stop, lambda p=part: p, lambda p=part: p
            )
        )
    model = Model.of([])
    held = [shard for shard in shards(pieces, {}) if shard.numel]
    from distnorm.plan.model_table import make_model_table
    from distnorm.plan.plan import make_plan

    plan = make_plan(model.ranks, held, {}, replicas_share=True)
    made = make_model_table(model.ranks, held, plan.shares)
    try:
        units = UnitStatistics(model.ranks, made, held, plan.shares)
    except UnsupportedGradientError as error:
        return str(error)
    gradients = [shard.read() for shard in held]
    reduced = model.reduced(units, gradients)  # type: ignore[arg-type]
    return units.norms(reduced)[0].tolist()


def test_partitions_of_zero_have_units_only_where_they_are_whole(ranks):
    for message in ranks(2, partition, 5):
        assert "'w'" in message and "'b'" not in message and "flat parameter on ranks [0, 1]" in message
    rows = np.arange(12.0).reshape(4, 3)
    expected = [*np.linalg.norm(rows, axis=1), np.linalg.norm(rows)]
    for found in ranks(2, partition, 12):
        assert found == pytest.approx(expected, rel=1e-15)


def test_float8_gradients_are_scaled_by_units():
    parameter = nn.Parameter(torch.ones(2, 4))
    bias = nn.Parameter(torch.ones(4))
    model = Model.of([("w", parameter), ("b", bias)])
    gradients = [torch.full(shape, 2.0).to(torch.float8_e5m2) for shape in ((2, 4), (4,))]
    units = UnitStatistics(model.ranks, model.table, model.shards, model.shares)
    norms, _ = units.norms(model.reduced(units, gradients))
    assert norms.tolist() == [4.0, 4.0, 4.0]
    units.scale_(gradients, torch.tensor([0.5, 0.25, 2.0], dtype=torch.float64))
    assert [g.float().tolist() for g in gradients] == [[[1.0] * 4, [0.5] * 4], [4.0] * 4]
