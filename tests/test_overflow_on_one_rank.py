"""A gradient that overflows on one of its replicas alone, in the first step and in later ones."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distnorm


def total_norm(position: int, step: int) -> float:
    """The norm in a step in which one element overflows on rank 0 alone; two ranks count half of it each."""
    weight = nn.Parameter(torch.ones(8))
    clipper = distnorm.GradClipper([("w", weight)], {"clip": {"max_norm": 1.0, "nonfinite": "skip"}})
    for number in range(1, step + 1):
        weight.grad = torch.ones(8)
        if number == step and dist.get_rank() == 0:
            weight.grad[position] = math.inf
        result = clipper.clip()
    return float(result.total_norm)


@pytest.mark.parametrize("step", [1, 2])
def test_an_overflow_on_one_rank_is_decided_by_the_norm(ranks, step):
    assert ranks(2, total_norm, 0, step) == [math.inf, math.inf]


@pytest.mark.parametrize("step", [1, 2])
def test_an_overflow_that_another_replica_does_not_have_is_refused(ranks, step):
    """The norm is finite: rank 1 counts this element, and has a finite one."""
    for failure in ranks(2, total_norm, 7, step, expect_errors=True):
        assert isinstance(failure.exception, distnorm.ReplicaError)
        assert "'w'" in str(failure.exception)
