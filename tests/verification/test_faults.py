"""Every planted fault is named, on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import distnorm
from distnorm.clipper import GradClipper
from distnorm.verification import VerifyReport, verify
from tests.verification.topologies import (
    Block,
    Ranks,
    backward,
    check_of,
    failed,
    replicated,
    same,
    sequence_parallel_model,
    verified,
)


def diverged_replica() -> VerifyReport:
    model, parameters = replicated()
    if dist.get_rank() == 1 and model.weight.grad is not None:
        model.weight.grad[2, 1] += 1.0
    return verified(model, parameters)


def test_a_diverged_replica_is_named(ranks: Ranks) -> None:
    report = same(ranks(3, diverged_replica))
    detail = check_of(report, "replicas").detail
    assert "'weight'" in detail and "rank 1" in detail and "rank 0" in detail
    assert "1 of 12 elements differ, first local index (2, 1)" in detail
    assert not report.ok and "FAIL" in str(report)


def one_replica_without_gradient() -> VerifyReport:
    model, parameters = replicated()
    if dist.get_rank() == 1:
        model.bias.grad = None
    return verified(model, parameters)


def test_a_replica_without_gradient_is_named(ranks: Ranks) -> None:
    report = same(ranks(2, one_replica_without_gradient))
    assert (
        "'bias': expected a gradient on rank 1 as on rank 0, found none"
        in check_of(report, "replicas").detail
    )


def wrong_claim() -> VerifyReport:
    torch.manual_seed(dist.get_rank())
    model = nn.Linear(4, 3)
    model(torch.ones(2, 4)).sum().backward()
    return verified(model, model.parameters())


def test_a_wrong_claim_of_replicas_is_named(ranks: Ranks) -> None:
    report = same(ranks(2, wrong_claim))
    assert {"norm", "coverage", "scaling"} <= failed(report)
    detail = check_of(report, "coverage").detail
    assert "'weight'" in detail and "no replicas" in detail and "rank 1" in detail
    assert "ReplicaError" in check_of(report, "norm").detail
    assert report.measured_norm is None


def missing_piece() -> VerifyReport:
    model = Block()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",)))
    backward(model, dist.get_rank())
    pairs = [(n, p) for n, p in model.named_parameters() if dist.get_rank() == 0 or n != "up.weight"]
    return verified(pairs, model.parameters())


def test_a_missing_piece_is_named(ranks: Ranks) -> None:
    report = same(ranks(2, missing_piece))
    detail = check_of(report, "coverage").detail
    assert "'up.weight': expected 128 elements of the parameter, found 64: 64 are missing" in detail
    assert "[0:8, 0:8] on rank 0" in detail
    assert "CoverageError" in check_of(report, "norm").detail


def overlapping_pieces() -> VerifyReport:
    """The same name whole on one rank and cut in two on the others."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    whole = nn.Parameter(torch.ones(4))
    cut = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    mine = whole if dist.get_rank() == 0 else cut
    mine.grad = torch.ones_like(mine)
    return verified([("w", mine)], [mine])


def test_overlapping_pieces_are_named(ranks: Ranks) -> None:
    report = same(ranks(2, overlapping_pieces))
    assert "'w': expected every element of the parameter in one piece, found 2 of 4 in several" in str(report)


def _half_scaled(self: GradClipper, clip: Any = GradClipper.clip) -> Any:
    result = clip(self)
    if dist.get_rank() == 1:
        next(iter(self._target.parameters())).grad.div_(result.clip_coef)  # one gradient as it was
    return result


def broken_scaling() -> VerifyReport:
    GradClipper.clip = _half_scaled  # type: ignore[method-assign]
    model, parameters = replicated()
    return verified(model, parameters)


def test_a_gradient_left_unscaled_is_named(ranks: Ranks) -> None:
    report = same(ranks(2, broken_scaling))
    assert failed(report) == {"scaling"}
    detail = check_of(report, "scaling").detail
    assert detail.startswith("rank 1: 'weight': 12 of 12 elements are not gradient * 0.4999")


def _unscaled(self: GradClipper, clip: Any = GradClipper.clip) -> Any:
    gradient = self._target.norm.weight.grad
    result = clip(self)
    self._target.norm.weight.grad = None
    self._target.norm.weight.grad = gradient  # partial, as it was
    return result


def partial_left_alone() -> VerifyReport:
    GradClipper.clip = _unscaled  # type: ignore[method-assign]
    model = sequence_parallel_model()
    return verified(model, model.parameters())


def test_a_partial_gradient_left_alone_is_named(ranks: Ranks) -> None:
    report = same(ranks(2, partial_left_alone))
    assert failed(report) == {"scaling"}
    assert "'norm.weight' was partial: expected a norm of" in check_of(report, "scaling").detail
    assert "still is after clip()" in check_of(report, "scaling").detail


def _other_bits(self: GradClipper, measure: Any = GradClipper.measure) -> Any:
    result = measure(self)
    if dist.get_rank() == 1:
        result.total_norm.copy_(torch.nextafter(result.total_norm, result.total_norm * 2))
    return result


def other_bits() -> VerifyReport:
    GradClipper.measure = _other_bits  # type: ignore[method-assign]
    model, parameters = replicated()
    return verified(model, parameters)


def test_a_rank_with_other_bits_is_named(ranks: Ranks) -> None:
    report = same(ranks(3, other_bits))
    assert failed(report) == {"agreement"}
    detail = check_of(report, "agreement").detail
    assert "total norm" in detail and "on ranks 0, 2" in detail and "on rank 1" in detail


def _twice(self: GradClipper, measure: Any = GradClipper.measure) -> Any:
    result = measure(self)
    result.total_norm.mul_(2**0.5)
    return result


def wrong_fast_path() -> VerifyReport:
    GradClipper.measure = _twice  # type: ignore[method-assign]
    model = DistributedDataParallel(Block())
    backward(model)
    return verified(model, model.parameters())


def test_a_wrong_fast_path_is_seen_and_its_ratio_read(ranks: Ranks) -> None:
    report = same(ranks(2, wrong_fast_path))
    assert failed(report) == {"norm"}
    assert (
        "1.414214 (sqrt(2) high): replicas counted 2 times on axis world" in check_of(report, "norm").detail
    )


def other_config() -> VerifyReport:
    model, parameters = replicated()
    return verified(model, parameters, {"clip": {"max_norm": 1.0 + dist.get_rank()}})


def test_a_rank_with_another_config_is_named(ranks: Ranks) -> None:
    report = same(ranks(2, other_config))
    assert {"norm", "agreement"} <= failed(report)
    assert "max_norm=2.0" in check_of(report, "agreement").detail


def on_a_subgroup() -> Any:
    group = dist.new_group([1, 2])
    model, _ = replicated()
    if dist.get_rank() == 0:
        with pytest.raises(distnorm.DistnormError, match=r"ranks \[1, 2\] only, found one on rank 0"):
            verify(model, group=group)
        return None
    if dist.get_rank() == 2 and model.bias.grad is not None:
        model.bias.grad.mul_(2)
    return verify(model, group=group)


def test_a_subgroup_verifies_alone_in_global_rank_numbers(ranks: Ranks) -> None:
    nothing, *reports = ranks(3, on_a_subgroup)
    assert nothing is None
    assert "'bias': expected on rank 2 the gradient of [0:3] that rank 1 holds" in str(same(reports))
