"""A small part of benchmarks/attack.py, and what the whole of it has found."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import distnorm
from benchmarks.attack import Attack, Campaign, _same, run
from benchmarks.attack_oracle import Rules, Truth
from distnorm.testing import preload

preload("benchmarks.attack")


@pytest.mark.parametrize(
    ("topology", "world", "way", "overlap"),
    [
        ("plain", 1, "walker", True),
        ("plain", 1, "attributes", False),
        ("plain", 2, "no compiled code", False),
        ("ddp", 2, "attributes", True),
        ("fsdp2", 2, "walker", True),
        ("fsdp2 x tp", 4, "walker", False),
    ],
)
@pytest.mark.slow
def test_no_change_between_steps_makes_one_wrong(ranks, topology, world, way, overlap):
    told, findings = run(Campaign("tests", topology, world, way, overlap, 25), ranks)
    assert findings == []
    assert told["cases"] == 25
    assert (told["meddled steps on the fast path"] > 0) == (way != "no compiled code")
    assert (told["taken during backward"] > 0) == overlap


@pytest.mark.parametrize("expected", [5.0, math.inf, math.nan])
def test_only_the_norm_that_is_expected_passes(expected):
    for found in (5.0, 5.0001, math.inf, -math.inf, math.nan):
        is_it = found == expected or (math.isnan(found) and math.isnan(expected))
        assert _same(found, expected, is_single=False) == is_it


def test_what_can_not_be_measured_may_not_be_measured():
    truth = Truth([], True, may_refuse=True, shares=False, shares_oddly=False, trouble=1.0)
    on_a_rank = SimpleNamespace(scene=SimpleNamespace(pieces=[]))
    rules = Rules("constant", 1.0, 2.0, "propagate", "*")
    result = SimpleNamespace(total_norm=torch.tensor(1.0))
    problem = Attack._judge(on_a_rank, "clip", rules, truth, None, [0.0], result, None)
    assert problem is not None and "measured what can't be" in problem


def freed(parameter: Tensor) -> None:
    parameter.grad.untyped_storage().resize_(0)


def shrunk(parameter: Tensor) -> None:
    parameter.grad.untyped_storage().resize_(5)


def lazily_zero(parameter: Tensor) -> None:
    parameter.grad = torch._efficientzerotensor(tuple(parameter.shape))


def fill(found: list[nn.Parameter]) -> None:
    for p in found:
        p.grad = None
        p.grad = torch.full_like(p, 2.0)


def after_good_steps(count: int, **clip: Any) -> tuple[list[nn.Parameter], distnorm.GradClipper]:
    """Parameters with gradients, and a clipper on its fast path."""
    found = [nn.Parameter(torch.zeros(3, 4)) for _ in range(count)]
    clipper = distnorm.GradClipper(found, {"clip": {"max_norm": 1.0, "nonfinite": "propagate", **clip}})
    for _ in range(3):
        fill(found)
        clipper.clip()
    fill(found)
    return found, clipper


def refused_later(change: Callable[[Tensor], None], on: int, overlap: bool) -> tuple[str, bool, float]:
    """The error of a step with a changed gradient, whether the others are as they were, and the next norm."""
    found, clipper = after_good_steps(4, overlap=overlap)
    if dist.get_rank() == on:
        change(found[1])
    with pytest.raises(distnorm.DistnormError) as refusal:
        clipper.clip()
    untouched = all(bool((found[i].grad == 2).all()) for i in (0, 2, 3))
    fill(found)
    return str(refusal.value), untouched, float(clipper.clip().total_norm)


@pytest.mark.parametrize("change", (freed, shrunk, lazily_zero))
@pytest.mark.parametrize("overlap", [False, True])
def test_a_gradient_that_lost_its_memory_on_one_rank_is_refused_on_all(ranks, change, overlap):
    for error, untouched, norm in ranks(2, refused_later, change, 1, overlap):
        assert "parameter '1': expected memory for 12 elements of torch.float32, found less" in error
        assert untouched
        assert norm == pytest.approx(2 * 48**0.5, rel=1e-12)


@pytest.mark.parametrize("policy", ["constant", "per_tensor", "value"])
def test_an_inference_tensor_is_refused_before_any_gradient_changes(policy):
    found, clipper = after_good_steps(3, policy=policy)
    found[1].grad = None
    with torch.inference_mode():
        found[1].grad = torch.full((3, 4), 2.0)
    with pytest.raises(distnorm.UnsupportedGradientError, match=r"parameter .1.: .* inference mode; clone"):
        clipper.clip()
    assert all(bool((p.grad == 2).all()) for p in found)
    assert float(distnorm.get_total_norm([p.grad for p in found])) == pytest.approx(12, rel=1e-6)


@pytest.mark.parametrize("policy", ["constant", "per_tensor", "value"])
def test_lazy_zeros_are_refused_even_if_empty(policy):
    found = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (0, 3), (3, 4))]
    clip = {"max_norm": 1.0, "policy": policy}
    clipper = distnorm.GradClipper(found, {"clip": clip})
    fill(found)
    found[1].grad = torch._efficientzerotensor((0, 3))
    with pytest.raises(distnorm.UnsupportedGradientError, match=r"parameter '1': .*lazy zeros"):
        clipper.clip()
    assert all(bool((p.grad == 2).all()) for p in (found[0], found[2]))


def meta_local_tensor() -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = nn.Parameter(distribute_tensor(torch.zeros(1, 4), mesh, [Shard(0)]))
    clipper = distnorm.GradClipper([found], {"clip": {"max_norm": 1.0}})
    found.grad = distribute_tensor(torch.ones(1, 4), mesh, [Shard(0)])
    if not found.to_local().numel():
        found.grad._local_tensor = torch.empty(0, 4, device="meta")
    with pytest.raises(distnorm.DistnormError) as refusal:
        clipper.clip()
    return str(refusal.value)


def test_an_empty_meta_gradient_on_one_rank_is_refused_on_all(ranks):
    for error in ranks(2, meta_local_tensor):
        assert "parameter '0': expected memory for 0 elements of torch.float32, found less" in error


def test_overlapping_gradients_with_coefficients_of_their_own_are_refused_by_name():
    found = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    clip = {"max_norm": 1.0, "policy": "per_tensor"}
    clipper = distnorm.GradClipper(found, {"clip": clip})
    memory = torch.full((6,), 3.0)
    found[0].grad, found[1].grad = memory[:4], memory[2:]
    with pytest.raises(distnorm.UnsupportedGradientError, match="memory of its own, as coefficients"):
        clipper.clip()
    assert bool((memory == 3).all())
