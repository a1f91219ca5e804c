"""Norms of the caller's own are judged, and their ratio to the true one is read."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distnorm.verification import VerifyReport, verify
from tests.verification.topologies import (
    Block,
    Ranks,
    backward,
    check_of,
    failed,
    same,
)


def judged(mistake: str) -> VerifyReport:
    """An HSDP gradient and a norm taken of it by the caller, in one of the ways that go wrong."""
    model = Block()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard")))
    backward(model, dist.get_rank())
    gradients = [p.grad for p in model.parameters()]
    if mistake == "torch":
        total = torch.nn.utils.get_total_norm(gradients)
        assert isinstance(total, DTensor)
        return verify(model, measured=total.full_tensor())
    if mistake == "not final":
        return verify(model, measured=torch.linalg.vector_norm(gradients[0]))
    local = torch.stack([g.to_local().double().square().sum() for g in gradients]).sum()
    if mistake == "local":
        return verify(model, measured=local.sqrt())
    if mistake == "one rank only":
        return verify(model, measured=local.sqrt() if dist.get_rank() == 0 else None)
    dist.all_reduce(local)
    return verify(model, measured=local.sqrt() if mistake == "twice" else (local / 2).sqrt() * 2**12)


def test_a_right_norm_of_ones_own(ranks: Ranks) -> None:
    report = same(ranks(4, judged, "torch"))
    assert report.ok, str(report)
    assert math.isclose(report.measured_norm or 0, report.true_norm, rel_tol=1e-6)


def test_replicas_counted_twice(ranks: Ranks) -> None:
    report = same(ranks(4, judged, "twice"))
    assert failed(report) == {"measured"}
    said = "1.414214 (sqrt(2) high): replicas counted 2 times on axis dp_replicate"
    assert check_of(report, "measured").detail.endswith(said)


def test_a_norm_that_was_never_reduced(ranks: Ranks) -> None:
    report = same(ranks(4, judged, "local"))
    detail = check_of(report, "measured").detail
    assert "expected the same norm on every rank" in detail
    assert "the pieces of each of ranks 0, 2 alone, never reduced over ranks" in detail


def test_a_dtensor_that_is_not_final(ranks: Ranks) -> None:
    detail = check_of(same(ranks(4, judged, "not final")), "measured").detail
    assert "not final: hand in its full_tensor()" in detail


def test_a_norm_on_one_rank_only(ranks: Ranks) -> None:
    detail = check_of(same(ranks(4, judged, "one rank only")), "measured").detail
    assert "expected a norm from every rank, found none on ranks 1-3" in detail


def test_a_loss_scale_left_in(ranks: Ranks) -> None:
    detail = check_of(same(ranks(4, judged, "scale")), "measured").detail
    assert "a factor of 2**12 left in: a loss scale" in detail


def test_readings_in_one_process() -> None:
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    parameters[0].grad, parameters[1].grad = torch.full((3,), 3.0), torch.full((2,), 4.0)

    def read(measured: float) -> str:
        return check_of(verify(parameters, measured=measured), "measured").detail

    true = math.sqrt(3 * 9 + 2 * 16)
    assert "'0' not counted" in read(math.sqrt(2 * 16))
    assert "'1' counted twice (tied weights?)" in read(math.sqrt(3 * 9 + 4 * 16))
    assert "norm of order 1, not 2" in read(17.0)
    assert "norms of parameters added" in read(math.sqrt(27) + math.sqrt(32))
    assert "rounding" in read(true * (1 + 1e-6))
    assert "a factor of 1/3 left in" in read(true / 3)
    assert "no single known mistake" in read(true * 1.2345)
    assert "found nan" in read(math.nan)
