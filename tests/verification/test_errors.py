"""What fails on one rank is raised on all; what is not finite is found on all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import distnorm
from distnorm.clipper import GradClipper
from distnorm.verification import VerifyReport, verify
from tests.verification.topologies import (
    Ranks,
    bits,
    check_of,
    replicated,
    same,
    verified,
)


def one_rank_errs(fault: str) -> str:
    model, _ = replicated()
    bad = dist.get_rank() == 1
    config = {"clip": {"max_nrom": 1}} if bad and fault == "config" else None
    target: Any = [object()] if bad and fault == "target" else model
    if bad and fault == "sparse" and model.bias.grad is not None:
        model.bias.grad = model.bias.grad.to_sparse()
    if fault == "none":
        model.zero_grad()
    with pytest.raises(distnorm.DistnormError) as caught:
        verify(target, config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("config", "max_nrom"),
        ("target", "found object"),
        ("sparse", "'bias': expected a dense gradient"),
        ("none", "found none on any"),
    ],
)
@pytest.mark.slow
def test_an_error_on_one_rank_is_raised_on_all(ranks: Ranks, fault: str, said: str) -> None:
    texts = ranks(3, one_rank_errs, fault)
    assert len(set(texts)) == 1
    assert said in texts[0] and ("on rank 1" in texts[0] or fault == "none")


def _crash(self: GradClipper) -> Any:
    raise ZeroDivisionError("planted")


def crashing_clipper() -> str:
    GradClipper.measure = _crash  # type: ignore[method-assign]
    model, parameters = replicated()
    before = bits(parameters)
    with pytest.raises(distnorm.DistnormError) as caught:
        verify(model)
    assert bits(parameters) == before
    return str(caught.value)


def test_a_crash_in_the_fast_path_is_an_error_on_all(ranks: Ranks) -> None:
    assert all("ZeroDivisionError: planted" in text for text in ranks(2, crashing_clipper))


def nan_on_one_rank(nonfinite: str) -> VerifyReport:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    weight = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    weight.grad = torch.ones_like(weight)
    if dist.get_rank() == 1:
        weight.grad.to_local()[0] = math.nan
    return verified([("w", weight)], [weight], {"clip": {"max_norm": 1.0, "nonfinite": nonfinite}})


@pytest.mark.parametrize("nonfinite", ["raise", "zero"])
def test_nan_is_found_by_both(ranks: Ranks, nonfinite: str) -> None:
    report = same(ranks(2, nan_on_one_rank, nonfinite))
    assert report.ok and math.isnan(report.true_norm)
    assert "'w' on rank 1" in check_of(report, "norm").detail
