"""The list of the whole model's parameters, and of who holds what."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from distnorm.plan import model_table as table
from distnorm.plan.collectives import Ranks
from distnorm.plan.model_order import merged
from tests.payloads import Model


def with_gradient(*shape: int) -> nn.Parameter:
    result = nn.Parameter(torch.ones(shape))
    result.grad = torch.ones(shape)
    return result


ORDERS: dict[str, tuple[list[list[str]], list[str]]] = {
    "interleaved stages": (
        [
            ["tok", *(f"b.{i}.{w}" for i in (0, 1, 4, 5) for w in "qk")],
            [*(f"b.{i}.{w}" for i in (2, 3, 6, 7) for w in "qk"), "norm", "head"],
        ],
        ["tok", *(f"b.{i}.{w}" for i in range(8) for w in "qk"), "norm", "head"],
    ),
    "stages": (
        [["tok", "b.0.w", "b.1.w"], ["b.2.w", "b.10.w", "norm", "head"]],
        ["tok", "b.0.w", "b.1.w", "b.2.w", "b.10.w", "norm", "head"],
    ),
    "stages in a v": (
        [["tok", "b.0", "b.7", "norm", "head"], ["b.1", "b.6"], ["b.2", "b.5"], ["b.3", "b.4"]],
        ["tok", *(f"b.{i}" for i in range(8)), "norm", "head"],
    ),
    "stages backwards": (
        [["b.2", "b.3", "head"], [], ["tok", "b.0", "b.1"]],
        ["tok", "b.0", "b.1", "b.2", "b.3", "head"],
    ),
    "stages that use the same names": (
        [["tok", "pp0.b.0", "pp0.b.1"], ["pp1.b.0", "pp1.head"], ["pp2.b.0"]],
        ["tok", "pp0.b.0", "pp0.b.1", "pp1.b.0", "pp1.head", "pp2.b.0"],
    ),
    "experts": (
        [["tok", "b.0.q", "b.0.e.0", "b.1.q", "b.1.e.0", "head"], ["b.0.e.1", "b.1.e.1"]],
        ["tok", "b.0.q", "b.0.e.0", "b.0.e.1", "b.1.q", "b.1.e.0", "b.1.e.1", "head"],
    ),
    "runs of a flat model": (
        [["tok", "b.0.q"], ["b.0.k", "b.1.q"], [], ["b.1.k", "norm"], ["head"]],
        ["tok", "b.0.q", "b.0.k", "b.1.q", "b.1.k", "norm", "head"],
    ),
    "something between two layers": (
        [["tok", "b.0", "b.1", "b.4"], ["adapter", "b.2", "extra", "b.3", "norm"]],
        ["tok", "b.0", "b.1", "adapter", "b.2", "extra", "b.3", "b.4", "norm"],
    ),
    "positions": ([["0", "1", "2"], ["3"]], ["0", "1", "2", "3"]),
    "nothing alike": ([["x", "a"], ["k", "c"]], ["x", "a", "k", "c"]),
    "an order that no number follows": (
        [["b.3", "b.1", "z"], ["b.2", "b.0"]],
        ["b.3", "b.1", "b.2", "b.0", "z"],
    ),
}


@pytest.mark.parametrize("case", ORDERS)
def test_the_order_is_that_of_the_model_s_definition(case):
    lists, expected = ORDERS[case]
    assert list(merged(lists)) == expected


@given(st.data())
def test_any_order_keeps_that_of_every_rank(data):
    parts = st.sampled_from("ab"), st.integers(0, 5), st.sampled_from("xy")
    names = st.builds(lambda family, number, rest: f"{family}{number}{rest}", *parts)
    every = data.draw(st.lists(st.one_of(names, st.sampled_from(["tok", "norm", "head"])), unique=True))
    ranks = data.draw(st.integers(1, 4))
    lists: list[list[str]] = [[] for _ in range(ranks)]
    for name in every:
        lists[data.draw(st.integers(0, ranks - 1))].append(name)
    found = list(merged(lists))
    assert sorted(found) == sorted(every)
    for mine in lists:
        assert [name for name in found if name in mine] == mine


def test_16384_ranks_with_1000_names_each_have_an_order_soon():
    stages = [range(first, 1024, 64) for first in range(64)]  # 64 interleaved stages hold 16 layers each
    names = [[f"layers.{i}.w{j}" for i in stage for j in range(62)] for stage in stages]
    lists = [names[rank // 256] if rank % 256 == 0 else [] for rank in range(16384)]
    started = time.process_time()
    found = list(merged(lists))
    assert time.process_time() - started < 2.0  # a fifth of a second; quadratic work takes minutes
    assert found == [f"layers.{i}.w{j}" for i in range(1024) for j in range(62)]
    spread = [[f"layers.{rank // 8}.w{rank % 8}"] for rank in range(16384)]  # as ZeRO cuts it
    started = time.process_time()
    assert list(merged(spread)) == [name for names in spread for name in names]
    assert time.process_time() - started < 2.0


def stages_of_ranks() -> tuple[str, ...]:
    rank = dist.get_rank()
    held = (["tok", "b.0", "b.1", "b.4"], ["b.2", "b.3", "norm", "tok"])[rank // 2]
    named = [(name, with_gradient(2)) for name in held]
    return Model.of(named if rank % 2 else named[:-1]).table.names  # the others hold one more


def test_all_ranks_have_the_order_of_the_lowest_that_hold_a_name(ranks):
    assert ranks(4, stages_of_ranks) == [("tok", "b.0", "b.1", "b.2", "b.3", "b.4", "norm")] * 4


def held_by(rank: int, world: int) -> list[tuple[str, tuple[int, ...]]]:
    """Some names on all ranks, some on one, some on two; each rank in an order of its own."""
    named = [(f"blocks.{i}.w", (1 + i % 3, 2)) for i in range(60) if i % 3 == 0 or i % world == rank]
    named += [(f"two.{i}", (3,)) for i in range(10) if (i - rank) % world in (0, 1)]
    random.Random(rank).shuffle(named)
    return named


def tables_of_ranks() -> dict[str, Any]:
    named = [(name, with_gradient(*shape)) for name, shape in held_by(dist.get_rank(), dist.get_world_size())]
    made = Model.of(named).table
    rows = made.rows
    assert rows is not None
    assert [made.names[slot] for slot in made.slots] == [name for name, _ in named]
    assert rows.slots[rows.start : rows.start + len(named)].tolist() == list(made.slots)
    who = sorted(zip([made.names[slot] for slot in rows.slots], rows.ranks.tolist(), strict=True))
    return {
        "names": made.names,
        "shapes": made.shapes,
        "who": who,
        "replicated": sorted({made.names[slot] for slot in rows.slots[rows.replicated]}),
        "firsts": sorted(made.names[slot] for slot in rows.slots[rows.firsts]),
    }


@pytest.mark.parametrize("world", [3, 4])
def test_every_rank_knows_all_names_and_who_holds_them(ranks, world):
    found = ranks(world, tables_of_ranks)
    pairs = [(name, shape, rank) for rank in range(world) for name, shape in held_by(rank, world)]
    shapes = {name: shape for name, shape, _ in pairs}
    holders = {name: [rank for other, _, rank in pairs if other == name] for name in shapes}
    lowest = [[name for name, _ in held_by(rank, world) if holders[name][0] == rank] for rank in range(world)]
    for one in found:
        names = one["names"]
        assert names == found[0]["names"] and sorted(names) == sorted(shapes)
        for mine in lowest:  # every rank's own order
            assert [name for name in names if name in mine] == mine
        assert list(one["shapes"]) == [shapes[name] for name in names]
        assert one["who"] == sorted((name, rank) for name, _, rank in pairs)
        assert one["replicated"] == sorted(name for name in names if len(holders[name]) > 1)
        assert one["firsts"] == sorted(names)


def what_is_gathered() -> list[int]:
    """How many names each rank published, of 300 that every rank holds."""
    named = [(f"blocks.{i // 6}.w{i % 6}", with_gradient(1)) for i in range(300)]
    model = Model.of(named)
    published = []
    gather = Ranks.gather

    def seen(self: Ranks, fact: Any) -> list[Any]:
        everybody = gather(self, fact)
        if isinstance(fact, list):
            published.append([len(theirs) for theirs in everybody])
        else:
            assert isinstance(fact, np.ndarray)  # numbers, no text
        return everybody

    Ranks.gather = seen  # type: ignore[method-assign]
    table.make_model_table(model.ranks, model.shards, model.shares)
    (counts,) = published
    return counts


def test_each_name_travels_once_and_the_load_spreads(ranks):
    found = ranks(4, what_is_gathered)
    for counts in found:
        assert sum(counts) == 300
        assert max(counts) < 120  # 75 each is even


def pieces_and_nothing() -> Any:
    """Empty pieces have no row, ranks without parameters take part, and shards share a slot with theirs."""
    mesh = init_device_mesh("cpu", (4,))
    sharded = nn.Parameter(distribute_tensor(torch.ones(3, 2), mesh, [Shard(0)]))
    named = [("b.10", sharded), *([("b.9", with_gradient())] if dist.get_rank() == 1 else [])]
    made = Model.of(named).table
    assert made.rows is not None
    return made.names, made.shapes, made.rows.ranks.tolist(), made.rows.slots.tolist(), made.numels


def test_empty_pieces_have_no_row(ranks):
    expected = (("b.9", "b.10"), ((), (3, 2)), [0, 1, 1, 2], [1, 1, 0, 1], (1, 6))
    assert ranks(4, pieces_and_nothing) == [expected] * 4


def above_the_limit() -> bool:
    table.MOST_ROWS = 3
    return Model.of([("a", with_gradient(1)), ("b", with_gradient(2))]).table.rows is None


def test_a_limit_bounds_what_a_rank_knows_of_others(ranks):
    assert ranks(2, above_the_limit) == [True, True]
    assert ranks(1, above_the_limit) == [False]


def test_without_a_process_group():
    model = Model.of([("b", with_gradient(2)), ("a", with_gradient(3, 2))])
    assert model.table.names == ("b", "a")
    assert model.table.slots == (0, 1)
    assert Model.of([]).table.names == ()
