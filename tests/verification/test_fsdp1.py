"""`verify` reads FSDP1 models by itself, and finds what the library's reading of them gets wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

import distnorm
from distnorm.sources import fsdp1 as source
from tests import fsdp1_models as models
from tests.verification.topologies import Ranks, check_of, same

CONFIG = {"clip": {"max_norm": 0.1}}
PLAIN = [(s, orig) for s in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD") for orig in (False, True)]
HYBRID = [(s, orig) for s in ("HYBRID_SHARD", "_HYBRID_SHARD_ZERO2") for orig in (False, True)]


def verified(strategy: str, orig: bool, fault: str = "") -> distnorm.VerifyReport:
    model = models.wrapped(strategy, orig)
    models.backward(model)
    gradients = [p.grad for p in model.parameters() if p.grad is not None and p.numel()]
    if fault == "replica" and dist.get_rank() == 3:
        gradients[0][0] += 1
    if fault == "source":
        read = source.FlatShard.read
        source.FlatShard.read = lambda shard: None if "gain" in shard.name else read(shard)
    return distnorm.verify(model, CONFIG)


@pytest.mark.parametrize(("world", "cells"), [(2, PLAIN), (3, PLAIN), (4, PLAIN + HYBRID)])
@pytest.mark.slow
def test_every_strategy_is_the_dense_oracles(ranks: Ranks, world: int, cells: list[Any]) -> None:
    exact = models.dense_gradients(range(world))
    for cell, *reports in zip(cells, *ranks(world, models.each, verified, cells), strict=True):
        report = same(list(reports))
        assert report.ok, (cell, str(report))
        assert report.true_norm == pytest.approx(models.dense_norm(exact), rel=1e-6), cell
        if cell[1]:
            assert report.elements == sum(gradient.numel() for gradient in exact.values()), cell
            assert report.parameters == len(exact), cell


@pytest.mark.parametrize("orig", [False, True])
def test_replicas_that_differ_are_found(ranks: Ranks, orig: bool) -> None:
    report = same(ranks(4, verified, "HYBRID_SHARD", orig, "replica"))
    assert not report.ok and not check_of(report, "replicas").ok


def test_a_wrong_reading_by_the_library_is_found(ranks: Ranks) -> None:
    report = same(ranks(2, verified, "FULL_SHARD", True, "source"))
    assert not check_of(report, "norm").ok and check_of(report, "coverage").ok


def experts(orig: bool) -> distnorm.VerifyReport:
    model = models.experts_on_pairs(orig)
    models.backward(model)
    for parameter in model.alone.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= 4
    return distnorm.verify(model, CONFIG)


@pytest.mark.parametrize("orig", [False, True])
def test_units_on_groups_of_their_own(ranks: Ranks, orig: bool) -> None:
    report = same(ranks(4, experts, orig))
    assert report.ok, str(report)
    assert report.true_norm == pytest.approx(models.dense_norm(models.dense_experts()), rel=1e-6)


def unreduced() -> distnorm.VerifyReport:
    model = models.wrapped("FULL_SHARD", True)
    with model.no_sync():
        models.backward(model)
    return distnorm.verify(model, CONFIG)


def test_a_gradient_that_is_not_reduced_is_not_called_right(ranks: Ranks) -> None:
    report = same(ranks(2, unreduced))
    assert not report.ok and "no_sync()" in check_of(report, "norm").detail


def lone_parameters() -> str:
    model = models.wrapped("FULL_SHARD", True)
    models.backward(model)
    with pytest.raises(distnorm.DistnormError) as caught:
        distnorm.verify(list(model.named_parameters()))
    return str(caught.value)


def test_what_it_cannot_read_is_refused_by_name(ranks: Ranks) -> None:
    assert all("expected the FSDP1 model itself" in text for text in ranks(2, lone_parameters))
