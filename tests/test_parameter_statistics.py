"""Statistics of single parameters and layers, and what is wrong with single gradients, against dense fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import distnorm
from distnorm.errors import ConfigError
from distnorm.measure.norms import norm
from distnorm.payload.layers import layers_of
from distnorm.payload.parameters import ParameterStatistics
from distnorm.payload.replicas import ReplicaChecksums
from distnorm.payload.units import UnitStatistics
from distnorm.plan import model_table as table
from distnorm.sources.shards import GradShard
from tests import oracle
from tests.payloads import Model, dense_parameters, steps
from tests.test_topologies import RANDOM, topologies
from tests.topologies import Topology

EXACT = {"rel": 1e-12, "abs": 0, "nan_ok": True}
FIELDS = ("norm", "rms", "max", "zero_fraction", "grad_to_weight")
Names = tuple[str, ...]

FEW = settings(RANDOM, max_examples=3)


# ---- any topology


def statistics_of_all(batch: list[Topology]) -> list[list[dict[str, Any]]]:
    return [statistics_of(topology) for topology in batch]


def statistics_of(topology: Topology) -> list[dict[str, Any]]:
    model, held = Model.of_topology(topology)
    statistics = ParameterStatistics(model.table, model.shards, model.shares, model.norm, weights=True)
    lean = ParameterStatistics(model.table, model.shards, model.shares, model.norm, layers=False)
    replicas = ReplicaChecksums(model.table)
    seen = []
    for _ in steps(topology, held):
        gradients = model.gradients()
        reduced = model.reduced(statistics, gradients)
        narrow = model.reduced(lean, gradients)
        stats = statistics.read(reduced)
        seen.append(
            {
                "names": statistics.layer_names,
                **{field: getattr(stats, field).tolist() for field in FIELDS},
                "parameter norms": lean.parameter_norms(narrow).tolist(),
                "first bad": statistics.first_bad(reduced),
                "diverged": replicas.diverged(model.reduced(replicas, gradients)),
            }
        )
    return seen


def dense_stats(gradients: list[np.ndarray], weights: list[np.ndarray], order: float) -> tuple[float, ...]:
    """Of one layer, in the order of FIELDS."""
    size = sum(gradient.size for gradient in gradients)
    whole, weight = oracle.dense(gradients), oracle.dense(weights)
    zeros = sum(int((gradient == 0).sum()) for gradient in gradients)
    return (
        oracle.dense(gradients, order),
        whole / math.sqrt(max(size, 1)),
        oracle.dense(gradients, math.inf),
        zeros / max(size, 1),
        whole / weight if weight else math.nan,
    )


@pytest.mark.parametrize("world", [1, 4, 8])
@FEW
@given(data=st.data())
@pytest.mark.slow
def test_every_parameter_of_every_topology(ranks, world, data):
    drawn = data.draw(st.lists(topologies(world), min_size=2, max_size=2))
    order = data.draw(st.sampled_from([2.0, 1.0, 1.5, math.inf]))
    batch = [Topology(**{**vars(topology), "order": order}) for topology in drawn]
    reports = ranks(world, statistics_of_all, batch)
    for position, topology in enumerate(batch):
        for step in range(topology.steps):
            found = [report[position][step] for report in reports]
            assert all(repr(other) == repr(found[0]) for other in found)
            check(topology, step, found[0])


def check(topology: Topology, step: int, found: dict[str, Any]) -> None:
    dense = dense_parameters(topology, step)
    assert sorted(found["names"]) == sorted(dense)
    for i, name in enumerate(found["names"]):
        gradient, weight = dense[name]
        expected = dense_stats([gradient], [weight], topology.order)
        for field, exact in zip(FIELDS, expected, strict=True):
            if field == "zero_fraction" and topology.missing and step < topology.steps - 1:
                assert found[field][i] <= exact  # what is missing counts no zeros
            else:
                assert found[field][i] == pytest.approx(exact, **EXACT), (name, field, topology)
        assert found["parameter norms"][i] == pytest.approx(expected[0], **EXACT)
    assert (found["first bad"], found["diverged"]) == (None, ())


# ---- layers


NAMES = (
    *("blocks.0.wq", "blocks.0.wk", "blocks.0.mlp.w", "blocks.1.wq"),
    *("head.w", "pp1.norm.w", "pp1.b.2.w", "tok"),
)


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("parameter", {name: [name] for name in NAMES}),
        (
            "module",
            {
                "blocks.0": ["blocks.0.wq", "blocks.0.wk"],
                "blocks.0.mlp": ["blocks.0.mlp.w"],
                "blocks.1": ["blocks.1.wq"],
                "head": ["head.w"],
                "pp1.norm": ["pp1.norm.w"],
                "pp1.b.2": ["pp1.b.2.w"],
                "tok": ["tok"],
            },
        ),
        (
            "depth",
            {
                "blocks.0": ["blocks.0.wq", "blocks.0.wk", "blocks.0.mlp.w"],
                "blocks.1": ["blocks.1.wq"],
                "head": ["head.w"],
                "pp1.norm": ["pp1.norm.w"],
                "pp1.b.2": ["pp1.b.2.w"],
                "tok": ["tok"],
            },
        ),
        (
            ("*.wq", "blocks.0.*"),
            {
                "*.wq": ["blocks.0.wq", "blocks.1.wq"],
                "blocks.0.*": ["blocks.0.wq", "blocks.0.wk", "blocks.0.mlp.w"],
            },
        ),
    ],
)
def test_what_a_layer_is(by, expected):
    layers = layers_of(NAMES, by)
    found: dict[str, list[str]] = {name: [] for name in layers.names}
    for parameter, layer in layers.members:
        found[layers.names[layer]].append(NAMES[parameter])
    assert found == expected
    assert list(found) == list(expected)


def test_layers_that_are_none():
    with pytest.raises(ConfigError, match="expected parameter, module, depth"):
        layers_of(NAMES, "modul")
    with pytest.raises(ConfigError, match="nothing"):
        layers_of(NAMES, ["*", "*.nothing"])


def values_of(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and a gradient with zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight, gradient = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    return weight, gradient.where(gradient.abs() > 0.3, 0)


def two_layers(orders: list[float]) -> list[dict[str, Any]]:
    """Sharded, replicated and plain parameters in two layers."""
    mesh = init_device_mesh("cpu", (2, 2))
    named = []
    for i, (name, placements) in enumerate(LAYOUT):
        weight, gradient = values_of(i)
        if placements is None:
            parameter = nn.Parameter(weight)
            parameter.grad = gradient
        else:
            parameter = nn.Parameter(distribute_tensor(weight, mesh, placements))
            parameter.grad = distribute_tensor(gradient, mesh, placements)
        named.append((name, parameter))
    found = []
    for order in orders:
        model = Model.of(named, order)
        statistics = ParameterStatistics(
            model.table, model.shards, model.shares, model.norm, by="depth", weights=True
        )
        stats = statistics.read(model.reduced(statistics))
        found.append({field: getattr(stats, field).tolist() for field in FIELDS})
    return found


LAYOUT = [
    ("h.10.a", [Shard(0), Replicate()]),
    ("h.2.a", [Replicate(), Replicate()]),
    ("h.2.b", [Shard(1), Shard(0)]),
    ("h.10.b", None),
]


def test_layers_of_several_parameters(ranks):
    layers: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {"h.10": ([], []), "h.2": ([], [])}
    for i, (name, _) in enumerate(LAYOUT):
        weight, gradient = values_of(i)
        layers[name[:-2]][0].append(gradient.numpy())
        layers[name[:-2]][1].append(weight.numpy())
    orders = [2.0, 1.0, 3.0, math.inf]
    for reports in ranks(4, two_layers, orders):
        for order, found in zip(orders, reports, strict=True):
            expected = [dense_stats(gradients, weights, order) for gradients, weights in layers.values()]
            assert all(0 < row[3] < 1 for row in expected)
            for field, *exact in zip(FIELDS, *expected, strict=True):
                assert found[field] == pytest.approx(exact, **EXACT), field


# ---- what is wrong


def model_with(order: float = 2.0) -> tuple[Model, dict[str, nn.Parameter]]:
    """Sharded on an axis of the ranks, on two axes, copied, and plain."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    named: dict[str, nn.Parameter] = {}
    for i, (name, placement) in enumerate((("l.10", Shard(0)), ("l.9", Replicate()), ("l.1", None))):
        value = torch.randn(9, 4, generator=torch.Generator().manual_seed(i))
        value = value.double() if placement is None else distribute_tensor(value, mesh, [placement])
        named[name] = nn.Parameter(value)
        named[name].grad = value.clone()
    return Model.of(list(named.items()), order), named


def local(parameter: nn.Parameter) -> torch.Tensor:
    gradient = parameter.grad
    assert gradient is not None
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def planted(order: float, where: list[tuple[str, int, float]]) -> Any:
    model, named = model_with(order)
    for name, rank, value in where:
        if dist.get_rank() == rank:
            local(named[name]).view(-1)[-1] = value
    statistics = ParameterStatistics(model.table, model.shards, model.shares, model.norm)
    reduced = model.reduced(statistics)
    stats = statistics.read(reduced)
    assert stats.max is not None
    return (
        statistics.first_bad(reduced),
        stats.bad.tolist(),
        repr(stats.norm.tolist()),
        repr(stats.max.tolist()),
    )


ORDERS = [2.0, 1.5, math.inf]


def planted_in_turn() -> list[Any]:
    nan = [("l.10", 1, math.nan), ("l.10", 2, math.inf)]
    cases = (nan, [*nan[1:], ("l.9", 3, math.inf)], [])
    return [planted(order, where) for order in ORDERS for where in cases]


def test_the_first_bad_parameter_and_its_rank_are_named(ranks):
    for reports in ranks(4, planted_in_turn):
        for i in range(len(ORDERS)):
            first, bad, norms, largest = reports[3 * i]
            assert (first, bad) == (("l.10", 1), [2, 0, 0])
            assert norms.count("nan") == largest.count("nan") == 1  # beside an inf of another rank
            first, bad, norms, largest = reports[3 * i + 1]
            assert (first, bad) == (
                ("l.10", 2),
                [1, 1, 0],
            )  # the last rank counts the last elements of a copy
            assert "nan" not in norms + largest
            assert norms.count("inf") == largest.count("inf") == 2
            assert reports[3 * i + 2][:2] == (None, [0, 0, 0])


def flipped(order: float, where: list[tuple[str, int]], highest: bool) -> Any:
    model, named = model_with(order)
    for name, rank in where:
        if dist.get_rank() == rank:
            held = local(named[name])
            bits = held.view(torch.int64 if held.dtype is torch.float64 else torch.int32).view(-1)
            bits[5] ^= torch.iinfo(bits.dtype).min if highest else 1
    replicas = ReplicaChecksums(model.table)
    return [(d.name, d.ranks) for d in replicas.diverged(model.reduced(replicas))]


FLIPS = {
    2: [([("l.1", 1)], [("l.1", (0, 1))])],
    3: [([("l.9", 0)], [("l.9", (0,))])],
    4: [
        ([("l.1", 2), ("l.9", 3), ("l.9", 1)], [("l.9", (0, 1, 2, 3)), ("l.1", (2,))]),
        ([("l.10", 1)], []),  # has no replica that could tell
        ([], []),
    ],
}


def flipped_in_turn() -> list[Any]:
    cases = [where for where, _ in FLIPS[dist.get_world_size()]]
    bits = [(order, highest) for order in (2.0, math.inf) for highest in (False, True)]
    return [flipped(order, where, highest) for order, highest in bits for where in cases]


@pytest.mark.parametrize("world", FLIPS)
def test_one_flipped_bit_names_parameter_and_rank(ranks, world):
    expected = [found for _, found in FLIPS[world]] * 4
    assert ranks(world, flipped_in_turn) == [expected] * world


def hybrid() -> Any:
    """Two replicas of each of two pieces: the pieces differ, and one replica of one of them."""
    mesh = init_device_mesh("cpu", (2, 2))
    parameter = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Replicate(), Shard(0)]))
    parameter.grad = torch.ones_like(parameter) * (1 + mesh.get_local_rank(1))
    model = Model.of([("w", parameter)])
    replicas = ReplicaChecksums(model.table)
    before = replicas.diverged(model.reduced(replicas))
    if dist.get_rank() == 3:
        local(parameter)[0, 0] = 7
    after = replicas.diverged(model.reduced(replicas))
    return before, [(d.name, d.ranks) for d in after]


def test_only_replicas_of_one_piece_are_compared(ranks):
    assert ranks(4, hybrid) == [((), [("w", (1, 3))])] * 4


# ---- what can't be told


def above_the_limit() -> Any:
    table.MOST_ROWS = 3
    model, named = model_with()
    local(named["l.9"])[0, 0] = math.nan
    assert model.table.rows is None
    statistics = ParameterStatistics(model.table, model.shards, model.shares, model.norm)
    reduced = model.reduced(statistics)
    refusals = []
    for make in (
        lambda: ReplicaChecksums(model.table),
        lambda: ParameterStatistics(model.table, model.shards, model.shares, norm("inf")),
    ):
        with pytest.raises(ConfigError) as error:
            make()
        refusals.append(str(error.value).split(":")[0])
    stats = statistics.read(reduced)
    return stats.max, statistics.first_bad(reduced), stats.bad.tolist(), refusals


def test_above_a_number_of_shards_there_is_no_maximum_and_no_rank(ranks):
    expected = (None, ("l.9", None), [0, 1, 0], ["monitor.replicas", "norm.type"])
    assert ranks(2, above_the_limit) == [expected] * 2


def test_orders_whose_statistic_is_wide_are_refused():
    model = Model.of([("w", nn.Parameter(torch.ones(2)))])
    with pytest.raises(ConfigError, match=r"up to 6.5, or inf.*found 7"):
        ParameterStatistics(model.table, model.shards, model.shares, norm(7))


def test_nothing_and_missing_gradients_have_values_of_zeros():
    for named in ([], [("w", nn.Parameter(torch.ones(2))), ("v", nn.Parameter(torch.zeros(0, 3)))]):
        for order in (2.0, 3.0, math.inf):
            model = Model.of(named, order)
            statistics = ParameterStatistics(
                model.table, model.shards, model.shares, model.norm, weights=True
            )
            reduced = model.reduced(statistics)
            stats = statistics.read(reduced)
            assert stats.norm.tolist() == stats.rms.tolist() == [0.0] * len(named)
            assert model.reduced(ReplicaChecksums(model.table)).shape == (0,)


# ---- weights that nobody may read


def with_frozen() -> Model:
    frozen, trained = (
        nn.Parameter(torch.ones(2, 3), requires_grad=False),
        nn.Parameter(torch.full((2, 3), 2.0)),
    )
    trained.grad = torch.ones(2, 3)
    model = Model.of([("a.frozen", frozen), ("a.lora", trained), ("b", nn.Parameter(torch.ones(3)))])
    model.shards[0] = UnreadableShard(**{name: getattr(model.shards[0], name) for name in FIELDS_OF_SHARDS})
    return model


@dataclass(frozen=True, slots=True)
class UnreadableShard(GradShard):
    """A shard whose values can't be read."""

    def witness(self) -> torch.Tensor:
        raise NotImplementedError("no plain values")

    def read(self) -> torch.Tensor | None:
        return self.holder.grad


FIELDS_OF_SHARDS = [field.name for field in fields(GradShard)]


def test_frozen_weights_are_never_read():
    model = with_frozen()
    for by, expected in (("parameter", [math.nan, 0.5, 0.0]), ("depth", [0.5, 0.0])):
        statistics = ParameterStatistics(
            model.table, model.shards, model.shares, model.norm, by=by, weights=True
        )
        ratios = statistics.read(model.reduced(statistics)).grad_to_weight
        assert ratios is not None
        assert ratios.tolist() == pytest.approx(expected, nan_ok=True)
    units = UnitStatistics(model.ranks, model.table, model.shards, model.shares)
    gradients, weights = units.norms(model.reduced(units))
    assert gradients.tolist() == pytest.approx([0, 0, math.sqrt(3), math.sqrt(3), 0])
    assert weights.tolist() == pytest.approx([0, 0, math.sqrt(12), math.sqrt(12), math.sqrt(3)])


def test_the_weight_of_a_frozen_parameter_with_a_gradient_counts():
    frozen = nn.Parameter(torch.full((4,), 2.0), requires_grad=False)
    frozen.grad = torch.ones(4)
    model = Model.of([("w", frozen)])
    statistics = ParameterStatistics(model.table, model.shards, model.shares, model.norm, weights=True)
    ratios = statistics.read(model.reduced(statistics)).grad_to_weight
    assert ratios is not None and ratios.tolist() == [0.5]


def test_adaptive_clipping_leaves_frozen_weights_unread():
    """By the clipper: policy agc reads weights in every step."""
    frozen = nn.Parameter(torch.empty(2, 3, device="meta"), requires_grad=False)  # has no values
    trained = nn.Parameter(torch.ones(2, 3))
    trained.grad = torch.full((2, 3), 10.0)
    clipper = distnorm.GradClipper([("frozen", frozen), ("lora", trained)], {"clip": {"policy": "agc"}})
    clipper.clip()
    assert trained.grad[0, 0].item() == pytest.approx(0.01)
