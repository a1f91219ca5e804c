"""Planning by 16,384 ranks, one of which is run, against what small worlds do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from benchmarks import planning
from benchmarks.simulated_rank import TERMS, Piece, most_loaded_rank, piece, plan, simulated
from distnorm.errors import ConfigError
from distnorm.plan import join
from distnorm.plan.collectives import Ranks
from distnorm.plan.cutting import cuts_inside
from distnorm.plan.plan import make_plan
from distnorm.plan.wording import shown
from distnorm.sources import deepspeed as source

Shares = list[tuple[int, ...]]


@dataclass
class Table:
    """Each parameter's ends of pieces, and the positions of those that each rank holds."""

    size: int
    parameters: dict[str, tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]]

    def __post_init__(self) -> None:
        self.names = list(self.parameters)

    def kind(self, name: str) -> str:
        return name

    def extents(self, rank: int, name: str) -> list[tuple[int, int]]:
        ends, held = self.parameters[name]
        return [(ends[i], ends[i + 1]) for i in held[rank]]

    def pieces(self, rank: int, name: str) -> list[Piece]:
        return [piece(name, (extent,), self.shape(name)) for extent in self.extents(rank, name)]

    def shape(self, name: str) -> tuple[int]:
        return (self.parameters[name][0][-1],)


@st.composite
def tables(draw: st.DrawFn, size: int) -> Table:
    """Any pieces on any ranks, empty ones too, as long as somebody holds each piece."""
    parameters = {}
    for i in range(draw(st.integers(1, 6))):
        lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any))
        positions = range(len(lengths))
        held = [set(draw(st.lists(st.sampled_from(positions), max_size=2))) for _ in range(size)]
        for j in positions:
            if not any(j in theirs for theirs in held):
                held[draw(st.integers(0, size - 1))].add(j)
        ends = tuple(sum(lengths[:j]) for j in range(len(lengths) + 1))
        parameters[f"layers.{i}"] = ends, tuple(tuple(sorted(theirs)) for theirs in held)
    return Table(size, parameters)


def planned(worlds: Sequence[Table], most_in_one_hop: int) -> list[Shares]:
    """What the rank itself plans."""
    join.MOST_IN_ONE_HOP = most_in_one_hop
    ranks = Ranks()
    mine = [[p for name in world.names for p in world.pieces(ranks.rank, name)] for world in worlds]
    return [
        [astuple(share)[:4] for share in make_plan(ranks, pieces, TERMS, replicas_share=True).shares]
        for pieces in mine
    ]


def counted(world: Table, rank: int) -> Shares:
    """What it should be."""
    shares = []
    for name in world.names:
        for start, stop in world.extents(rank, name):
            holders = [r for r in range(world.size) if (start, stop) in world.extents(r, name)]
            n, of, which = stop - start, len(holders), holders.index(rank)
            shares.append((n * which // of, n * (which + 1) // of, of, which) if n else (0, 0, 1, 0))
    return shares


@pytest.mark.parametrize(("size", "most_in_one_hop"), [(2, 16), (4, 16), (8, 16), (3, 1), (5, 1), (8, 1)])
@settings(
    max_examples=3,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
@pytest.mark.slow
def test_a_simulated_rank_plans_what_a_real_one_does(
    ranks, size: int, most_in_one_hop: int, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "MOST_IN_ONE_HOP", most_in_one_hop)
    worlds = [data.draw(tables(size)) for _ in range(6)]
    real = ranks(size, planned, worlds, most_in_one_hop)
    for rank in range(size):
        simulations = []
        for world in worlds:
            with simulated(rank, world) as group:
                simulations.append([astuple(share)[:4] for share in plan(group).shares])
        assert simulations == real[rank] == [counted(world, rank) for world in worlds]


def test_a_meshs_simulated_ranks_cover_it() -> None:
    mesh = planning.Mesh(32, pp=2, shard=4, tp=2, ep=2, norms=1, experts=1, shards=3)
    covered = dict.fromkeys(mesh.names, 0)
    for rank in range(mesh.size):
        with simulated(rank, mesh) as group:
            for share, shard in zip(plan(group).shares, group.mine, strict=True):
                covered[shard.name] += share.stop - share.start
    held = [pieces[0] for rank in range(32) for name in mesh.names if (pieces := mesh.pieces(rank, name))]
    assert covered == {shard.name: shard.global_numel for shard in held}


@pytest.mark.parametrize("case", ["FSDP", "DDP"])
@pytest.mark.slow
def test_the_most_loaded_of_16384_ranks_plans_1000_shards_in_64_megabytes(case: str) -> None:
    row = planning.in_a_process(case, 16384)
    assert row["rows"] >= 16384
    assert 1 < row["plan_mb"] <= row["both_mb"] <= 64
    assert max(row["sent"], row["received"]) < 8e6
    assert row["peers"] == 2 * 127


def test_the_most_loaded_rank_owns_most_rows() -> None:
    mesh = planning.Mesh(4, pp=2, shards=5)
    rows = []
    for rank in range(4):
        with simulated(rank, mesh) as group:
            rows.append(len(group.met.plan))
    assert sum(rows) == 4 * 5
    assert rows[most_loaded_rank(mesh)] == max(rows)


def engine_pieces(world: Table, rank: int) -> list[source.Piece]:
    parameter = torch.empty(0)
    return [
        source.Piece(
            name, parameter, (world.parameters[name][0][-1],), *extent, lambda: None, lambda: parameter
        )
        for name in world.names
        for extent in world.extents(rank, name)
    ]


def cut(worlds: Sequence[Table]) -> list[list[tuple[str, int, int]]]:
    """How engines' pieces are cut again."""
    ranks = Ranks()
    found = []
    for world in worlds:
        pieces = engine_pieces(world, ranks.rank)
        shards = source.shards(pieces, cuts_inside(ranks, pieces))
        found.append([(shard.name, *shard.piece[0]) for shard in shards])
    return found


@st.composite
def overlapping(draw: st.DrawFn, size: int) -> Table:
    """Pieces that each rank cut for itself."""
    parameters = {}
    for i in range(draw(st.integers(1, 4))):
        numel = draw(st.integers(1, 12))
        ends = tuple(range(numel + 1))
        parameters[f"layers.{i}"] = (
            ends,
            draw(st.tuples(*[st.tuples(st.integers(0, numel), st.integers(0, numel)).map(sorted)] * size)),
        )
    return Cuttings(size, parameters)


class Cuttings(Table):
    """Each rank's piece is given by its own start and stop."""

    def extents(self, rank: int, name: str) -> list[tuple[int, int]]:
        start, stop = self.parameters[name][1][rank]
        return [(start, stop)] if start < stop else []


@pytest.mark.parametrize("size", [1, 2, 4])
@settings(
    max_examples=3,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_engines_pieces_are_cut_where_any_ranks_pieces_end(ranks, size: int, data: st.DataObject) -> None:
    worlds = [data.draw(overlapping(size)) for _ in range(10)]
    found = ranks(size, cut, worlds)
    for rank in range(size):
        for world, shards in zip(worlds, found[rank], strict=True):
            expected = []
            for name in world.names:
                everybody = [extent for r in range(size) for extent in world.extents(r, name)]
                ends = {end for extent in everybody for end in extent}
                for start, stop in world.extents(rank, name):
                    inside = [start, *sorted(end for end in ends if start < end < stop), stop]
                    expected += [(name, a, b) for a, b in pairwise(inside)]
            assert shards == expected


def test_what_16384_ranks_say_in_an_error_stays_short() -> None:
    long = "x" * 100_000
    with simulated(0, planning.Mesh(16384, shards=1)):
        ranks = Ranks()
        first, again, other = (ranks.shortened(text, 2) for text in (f"{long}a", f"{long}a", f"{long}b"))
        with pytest.raises(ConfigError) as refused:
            ranks.raise_together(ConfigError(long))
    assert first == again != other
    assert len(first) * 2 * 16384 < 16e6
    assert len(str(refused.value)) < 1000


def test_few_ranks_say_all_of_it_and_many_facts_are_counted() -> None:
    with simulated(0, planning.Mesh(8, shards=1)), pytest.raises(ConfigError) as refused:
        Ranks().raise_together(ConfigError("x" * 100_000))
    assert str(refused.value) == "x" * 100_000
    assert shown(list("abcdefgh")) == list("abcdefgh")
    assert shown(list("abcdefghij")) == [*"abcdefgh", "and 2 more"]
