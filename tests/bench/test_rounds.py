"""Contenders in turns: the order, what is wrong with a planted one, and what one that raises shows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from distnorm.bench.contenders import Contender
from distnorm.bench.limit import Limit, work_of
from distnorm.bench.problem import Problem, describe
from distnorm.bench.report import document, text_of
from distnorm.bench.rounds import Table, Variant, run_rounds
from distnorm.trainer.world import World

NORM = 10.0
LIMIT = Limit(1e9, 1e9, 0.0)


def world() -> World:
    return World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def copied(world: World) -> Problem:
    """Gradients of norm 10, the same on every rank."""
    parameters = {name: nn.Parameter(torch.zeros(2)) for name in "ab"}
    for parameter, values in zip(parameters.values(), ([1.0, 7.0], [5.0, 5.0]), strict=True):
        parameter.grad = torch.tensor(values)
    return describe(list(parameters.items()), parameters, world)


def scaled(problem: Problem, by: float) -> None:
    for gradient in problem.locals:
        gradient.mul_(by)


def table(make: Callable[[Problem], list[Contender]], rounds: int = 3, max_norm: float | None = 5.0) -> Table:
    problem = copied(world())
    work = work_of(problem, clips=max_norm is not None)
    return run_rounds(Variant("w", "t", problem, make(problem), work, max_norm), rounds, LIMIT)


def judged() -> Table:
    def answering(problem: Problem, norm: float | None, by: float) -> Callable[[], float | None]:
        def call() -> float | None:
            scaled(problem, by)
            return norm

        return call

    def raising() -> float:
        raise ValueError("no such norm\nand more")

    def raising_on_rank_0() -> float:
        return raising() if dist.get_rank() == 0 else NORM

    def wrong_on_rank_1() -> float:
        return NORM * (1 + 1e-3 * dist.get_rank())

    return table(
        lambda problem: [
            Contender("right", answering(problem, NORM, 0.5), 1e-6, is_reference=True),
            Contender("coarse", answering(problem, NORM * (1 + 1e-5), 0.5), 1e-4),
            Contender("not exact", answering(problem, NORM * (1 + 1e-5), 0.5), 1e-6),
            Contender("silent", answering(problem, None, 0.5)),
            Contender("nan", answering(problem, math.nan, 0.5)),
            Contender("not scaled", answering(problem, NORM, 1.0)),
            Contender("on one rank", lambda: (scaled(problem, 0.5), wrong_on_rank_1())[1]),
            Contender("raising", raising),
            Contender("one raises", raising_on_rank_0),
        ]
    )


def test_each_contender_is_judged(ranks: Any) -> None:
    tables = ranks(2, judged)
    assert repr(tables[0]) == repr(tables[1])  # a NaN is not equal to itself
    rows = {row.name: row for row in tables[0].rows}
    assert [name for name, row in rows.items() if not row.agrees] == [
        "not exact", "nan", "not scaled", "on one rank",
    ]  # fmt: skip
    assert rows["right"].error == 0.0
    assert rows["coarse"].error == pytest.approx(1e-5)
    assert rows["not exact"].problem == "DISAGREES: off by 1.0e-05, and 1e-06 is allowed"
    assert rows["silent"].error is None
    assert rows["not scaled"].problem == "DISAGREES: gradients were left with norm 10, not 5"
    assert rows["on one rank"].error == pytest.approx(1e-3)
    assert rows["raising"].problem == rows["one raises"].problem == "raises ValueError: no such norm"
    assert {len(row.seconds) for row in rows.values()} == {0, 3}
    written = json.loads(json.dumps(document({}, LIMIT, tables[:1]), allow_nan=False))
    errors = {row["name"]: row["relative_error"] for row in written["workloads"][0]["contenders"]}
    assert (errors["nan"], errors["right"], errors["raising"]) == ("nan", 0.0, None)
    lines = {line.split("  ")[1]: line for line in text_of(tables[0]).splitlines()[3:]}
    assert list(lines) == list(rows)
    assert all(line.endswith(rows[name].problem or "-" * (name == "silent")) for name, line in lines.items())


def turns() -> list[str]:
    called: list[str] = []

    def contender(problem: Problem, name: str) -> Contender:
        def call() -> float:
            assert [float(gradient.sum()) for gradient in problem.locals] == [8.0, 10.0]
            called.append(name)
            scaled(problem, 0.0)
            return NORM

        return Contender(name, call)

    table(lambda problem: [contender(problem, name) for name in "abc"], rounds=3, max_norm=None)
    return called


def test_the_order_turns_and_gradients_are_restored(ranks: Any) -> None:
    (called,) = ranks(1, turns)
    rounds = ["".join(called[at : at + 3]) for at in range(0, len(called), 3)]
    assert rounds[0] == "abc"
    assert rounds[-3:] == ["abc", "bca", "cab"]


def held() -> tuple[list[tuple[int, bool]], float, float]:
    """FSDP2 and plain tensors, copied and partial ones, and the norm of the whole computed here."""
    sharded = nn.Linear(2, 4, bias=False)
    fully_shard(sharded, mesh=(mesh := init_device_mesh("cpu", (2,))))
    whole = torch.arange(8.0).reshape(4, 2)
    sharded.weight.grad = DTensor.from_local(whole.chunk(2)[dist.get_rank()].clone(), mesh, [Shard(0)])
    plain = nn.Parameter(torch.zeros(3))
    plain.grad = torch.full((3,), 2.0)
    partial = nn.Parameter(DTensor.from_local(torch.zeros(5), mesh, [Replicate()]))
    partial.grad = DTensor.from_local(torch.ones(5), mesh, [Partial()])
    named = {"sharded": sharded.weight, "plain": plain, "partial": partial}
    problem = describe(list(named.items()), named, world())
    scaled(problem, 3.0)
    changed = problem.present_norm()
    problem.restore()
    assert problem.present_norm() == problem.norm
    assert problem.any_partial
    expected = float(torch.cat([whole.flatten(), torch.full((8,), 2.0)]).double().norm())
    assert changed == pytest.approx(3 * problem.norm, rel=1e-12)
    return [(each.replicas, each.owned) for each in problem.held], problem.norm, expected


def test_who_holds_what_and_the_true_norm(ranks: Any) -> None:
    for rank, (pieces, norm, expected) in enumerate(ranks(2, held)):
        first = rank == 0
        assert pieces == [(1, True), (2, first), (2, first)]
        assert norm == pytest.approx(expected, rel=1e-14)
