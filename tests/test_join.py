"""Rows that meet by key: over all ranks, and in two hops over a grid of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard

import distnorm
from distnorm.errors import DistnormError
from distnorm.plan import join as joining
from distnorm.plan.collectives import Ranks
from distnorm.plan.join import Grid, hops, join
from tests.refusals import TIMEOUT, clipper, distributed, parameter

SIZES = (2, 3, 4, 5, 6, 7, 8)


def in_two_hops() -> None:
    joining.MOST_IN_ONE_HOP = 1


def rows_of(rank: int, size: int) -> torch.Tensor:
    """Rows of a few keys, some of which many ranks have; rank 1 has none."""
    dice = torch.Generator().manual_seed(rank)
    count = 0 if rank == 1 else 40
    keys = torch.randint(0, 3 * size, (count,), generator=dice) * 1_000_003
    return torch.stack([keys, torch.full((count,), rank), torch.arange(count)], dim=1)


def whose_came_before(rows: torch.Tensor) -> torch.Tensor:
    """[m, (key, rank, place)] -> [m, (how many rows of this key came before, the sum of all its ranks)]."""
    assert rows[:, 1].tolist() == sorted(rows[:, 1].tolist())
    seen: dict[int, list[int]] = {}
    before = []
    for key, rank, _ in rows.tolist():
        before.append(len(seen.setdefault(key, [])))
        seen[key].append(rank)
    return torch.tensor(
        [[n, sum(seen[key])] for n, key in zip(before, rows[:, 0].tolist(), strict=True)]
    ).view(-1, 2)


def joined(two_hops: bool) -> tuple[list[list[int]], int]:
    if two_hops:
        in_two_hops()
    ranks = Ranks()
    met: list[int] = []

    def answer(rows: torch.Tensor) -> torch.Tensor:
        met.extend((rows[:, 0] % ranks.size).tolist())
        return whose_came_before(rows)

    answers = join(ranks, rows_of(ranks.rank, ranks.size), answer).tolist()
    assert set(met) <= {ranks.rank}
    return answers, len(met)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("two_hops", [False, True], ids=["one hop", "two hops"])
def test_every_row_is_answered_by_who_sees_all_of_its_key(ranks, size: int, two_hops: bool) -> None:
    everything = torch.cat([rows_of(rank, size) for rank in range(size)])
    expected = whose_came_before(everything).split([len(rows_of(rank, size)) for rank in range(size)])
    found = ranks(size, joined, two_hops, timeout=TIMEOUT)
    assert [answers for answers, _ in found] == [part.tolist() for part in expected]
    assert sum(met for _, met in found) == len(everything)


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 127, 1000, 1021, 16381, 16384])
def test_a_rank_of_the_grid_has_few_peers_and_reaches_all(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "MOST_IN_ONE_HOP", 0)
    everyone = torch.arange(size)
    asked = range(size) if size < 300 else {0, 1, size // 2, size - 2, size - 1}
    way = cache(lambda rank: tuple(hops(rank, size)))
    for rank in asked:
        first, second = way(rank)
        peers = set(torch.cat([first.to, first.of, second.to, second.of]).tolist()) - {rank}
        assert len(peers) <= 2 * math.sqrt(size) + 1
        for hop in (first, second):
            for listed in (hop.to.tolist(), hop.of.tolist()):
                assert listed == sorted(set(listed))
                assert rank in listed
        through = first.next(everyone)
        assert set(through.tolist()) <= set(first.to.tolist())
        for owner in everyone[:: max(1, size // 50)].tolist():
            _, theirs = way(int(through[owner]))
            assert owner in theirs.to
            assert int(through[owner]) in way(owner)[1].of


@pytest.mark.parametrize("size", [5, 7, 12, 13, 30, 61])
def test_who_sends_is_expected(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a rank would wait for a count that nobody sends."""
    monkeypatch.setattr(joining, "MOST_IN_ONE_HOP", 0)
    ways = [list(hops(rank, size)) for rank in range(size)]
    for hop in range(2):
        sent = {(rank, to) for rank in range(size) for to in ways[rank][hop].to.tolist()}
        expected = {(of, rank) for rank in range(size) for of in ways[rank][hop].of.tolist()}
        assert sent == expected


def test_a_square_world_has_square_grids() -> None:
    grid = Grid(16384)
    assert grid.rows == 128
    assert grid.through(torch.tensor(3), torch.tensor([0, 127, 128, 16383])).tolist() == [384, 511, 384, 511]


def exchanges(size_of_hop: int) -> list[int]:
    """How many other ranks this one sends to or hears from in a plan, exchange by exchange."""
    joining.MOST_IN_ONE_HOP = size_of_hop
    counted: list[int] = []
    exchange = Ranks.exchange

    def counting(self: Ranks, rows: torch.Tensor, send: Any, receive: Any) -> torch.Tensor:
        counted.append(len({*send, *receive} - {self.rank}))
        return exchange(self, rows, send, receive)

    Ranks.exchange = counting  # type: ignore[method-assign]
    clipper([("w", parameter(4))])
    return counted


def test_a_plan_of_eight_ranks_takes_one_hop_and_of_more_than_the_limit_two(ranks) -> None:
    assert ranks(8, exchanges, joining.MOST_IN_ONE_HOP, timeout=TIMEOUT) == [[7] * 6] * 8
    assert ranks(8, exchanges, 7, timeout=TIMEOUT) == [[3, 3, 1, 1, 1, 3] * 2] * 8


def refused(act: Callable[[], Any]) -> str:
    in_two_hops()
    try:
        act()
    except DistnormError as error:
        return type(error).__name__
    return ""


def a_piece_missing() -> None:
    piece = distributed((5,), [Shard(0)], 10, 2)
    clipper([("w", piece)] if dist.get_rank() != 3 else [("v", parameter(4))])


def no_config_on_one_rank() -> None:
    bad = {"norm": {"type": -1.0}} if dist.get_rank() == 2 else None
    distnorm.GradClipper([("w", parameter(4))], bad)


@pytest.mark.parametrize(
    ("act", "kind"), [(a_piece_missing, "CoverageError"), (no_config_on_one_rank, "ConfigError")]
)
def test_what_is_wrong_on_one_rank_all_refuse(ranks, act: Callable[[], Any], kind: str) -> None:
    assert ranks(5, refused, act, timeout=TIMEOUT) == [kind] * 5


def answer_that_fails() -> str:
    in_two_hops()

    def answer(rows: torch.Tensor) -> torch.Tensor:
        if dist.get_rank() == 2:
            raise RuntimeError("out of memory")
        return rows[:, :1]

    try:
        join(Ranks(), rows_of(dist.get_rank(), dist.get_world_size()), answer)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_rank_that_dies_between_the_hops_leaves_nobody_waiting(ranks) -> None:
    failures = ranks(5, answer_that_fails, timeout=TIMEOUT, collective_timeout=3)
    assert failures[2] == "out of memory"
