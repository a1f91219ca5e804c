"""Parameters in blocks: none twice, none left out, on all ranks alike; and weights that are shaken."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
import torch

from distnorm.verification.doctor import blocks
from distnorm.verification.doctor.blocks import Spread, block_around, cut, overlap, shape_of
from distnorm.verification.doctor.holdings import FlatRun, Index, select
from distnorm.verification.doctor.shaking import Shaken

SHAPES: list[tuple[int, ...]] = [(), (1,), (17,), (0, 3), (5, 3), (2, 40), (3, 5, 4), (1, 1, 30), (4, 0)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "ELEMENTS", 7)


def elements(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(prod(shape)).view(shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_follow_each_other_in_memory(shape: tuple[int, ...]) -> None:
    whole = elements(shape)
    found = [whole[tuple(slice(*limits) for limits in block)] for block in cut(shape)]
    assert all(0 < block.numel() <= 7 for block in found)
    assert [int(e) for block in found for e in block.flatten()] == list(range(prod(shape)))


@pytest.mark.parametrize(
    ("shape", "index"),
    [
        ((5, 3), (((0, 5),), ((1, 3),))),
        ((5, 3), (((1, 2), (3, 5)), ((0, 1), (2, 3)))),
        ((5, 3), FlatRun(4, 11)),
        ((17,), FlatRun(16, 17)),
        ((2, 40), (((1, 2),), ((3, 39),))),
        ((3, 5, 4), FlatRun(2, 59)),
        ((), ()),
    ],
)
def test_what_a_piece_and_a_block_have_in_common(shape: tuple[int, ...], index: Index) -> None:
    whole = elements(shape)
    flat = isinstance(index, FlatRun)
    if flat:
        held = whole.flatten()[index.start : index.stop]  # type: ignore[union-attr]
    else:
        held = whole
        for dim, runs in enumerate(index):  # type: ignore[arg-type]
            held = held.index_select(dim, torch.cat([torch.arange(*run) for run in runs]))
    found: list[int] = []
    for block in cut(shape):
        inside = whole[tuple(slice(*limits) for limits in block)]
        common = overlap(index, block, shape)
        expected = sorted({int(e) for e in held.flatten()} & {int(e) for e in inside.flatten()})
        if common is None:
            assert not expected
            continue
        three = (select(whole, common.whole), select(inside, common.in_block), select(held, common.in_piece))
        for one in three:
            assert tuple(one.shape) == common.shape
            assert one.flatten().tolist() == expected
        found += expected
    assert sorted(found) == sorted(held.flatten().tolist())
    around = whole[tuple(slice(*limits) for limits in block_around(index, shape))]
    assert {int(e) for e in held.flatten()} <= {int(e) for e in around.flatten()}


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_block_has_one_owner_and_nobody_much_more_than_the_others(size: int) -> None:
    shapes = {str(i): shape for i, shape in enumerate(SHAPES * 3)}
    spread = Spread(shapes, size)
    each = [list(spread.blocks(rank)) for rank in range(size)]
    assert [one for theirs in each for one in theirs] == [(n, b) for n, s in shapes.items() for b in cut(s)]
    for rank, theirs in enumerate(each):
        assert all(spread.owner(*one) == rank and rank in spread.owners(one[0]) for one in theirs)
    held = [sum(prod(shape_of(block)) for _, block in theirs) for theirs in each]
    assert max(held) - min(held) <= 14
    assert all(set(a).isdisjoint(b) for a, b in pairwise(each))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_shaken_weights_differ_by_some_units_in_the_last_place_and_come_back(dtype: torch.dtype) -> None:
    dice = torch.Generator().manual_seed(0)
    weights = [torch.randn(40, 9, generator=dice).to(dtype), torch.ones(3, 8).to(dtype).t()]
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).tiny / 4]).to(
        dtype
    )
    weights.append(special)
    before = [weight.clone() for weight in weights]
    shaken = Shaken(weights, 1)
    for now, then in zip(weights[:2], before[:2], strict=True):
        apart = ((now.double() - then.double()) / then.double()).abs()
        assert bool((apart > 0).all())
        assert float(apart.max()) <= 2 * torch.finfo(dtype).eps
    assert torch.equal(special.view(torch.uint8), before[2].view(torch.uint8))
    assert shaken.restore() == []
    for now, then in zip(weights, before, strict=True):
        assert torch.equal(now.contiguous().view(torch.uint8), then.contiguous().view(torch.uint8))
    other = Shaken(weights, 2)
    first = weights[0].clone()
    other.restore()
    shaken = Shaken(weights, 1)
    assert not torch.equal(weights[0], first)
    weights[0].fill_(3)
    assert [id(one) for one in shaken.restore()] == [id(weights[0])]
    assert bool((weights[0] == 3).all())
    assert torch.equal(weights[1], before[1])
