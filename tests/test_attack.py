"""A small part of benchmarks/attack.py, and what the whole of it has found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distnorm
from benchmarks.attack import Campaign, run
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
def test_no_change_between_steps_makes_one_wrong(ranks, topology, world, way, overlap):
    told, findings = run(Campaign("tests", topology, world, way, overlap, 25), ranks)
    assert findings == []
    assert told["cases"] == 25
    assert (told["steps on the fast path"] > 0) == (way != "no compiled code")


def freed(gradient: Tensor) -> None:
    gradient.untyped_storage().resize_(0)


def shrunk(gradient: Tensor) -> None:
    gradient.untyped_storage().resize_(5)


def moved_to_meta(gradient: Tensor) -> None:
    gradient.data = torch.empty_like(gradient, device="meta")


def without_memory(gradient: Tensor) -> None:
    gradient.data = torch._efficientzerotensor(tuple(gradient.shape))


WITHOUT_MEMORY = (freed, shrunk, moved_to_meta, without_memory)


def fill(found: list[nn.Parameter]) -> None:
    for p in found:
        p.grad = None
        p.grad = torch.full_like(p, 2.0)


def refused_later(change: Callable[[Tensor], None], on: int, overlap: bool) -> tuple[str, bool, float]:
    """The error of a step with a changed gradient, whether the others are as they were, and the next norm."""
    found = [nn.Parameter(torch.zeros(3, 4)) for _ in range(4)]
    clip = {"max_norm": 1.0, "nonfinite": "propagate", "overlap": overlap}
    clipper = distnorm.GradClipper(found, {"clip": clip})
    for _ in range(3):
        fill(found)
        clipper.clip()
    fill(found)
    if dist.get_rank() == on:
        found[1].grad.requires_grad_(False)
        try:
            change(found[1].grad)
        except RuntimeError:  # torch doesn't take it for this gradient's data, but as a new one
            found[1].grad = torch._efficientzerotensor((3, 4))
    with pytest.raises(distnorm.DistnormError) as refusal:
        clipper.clip()
    untouched = all(bool((found[i].grad == 2).all()) for i in (0, 2, 3))
    fill(found)
    return str(refusal.value), untouched, float(clipper.clip().total_norm)


@pytest.mark.parametrize("change", WITHOUT_MEMORY)
@pytest.mark.parametrize("overlap", [False, True])
def test_a_gradient_that_lost_its_memory_on_one_rank_is_refused_on_all(ranks, change, overlap):
    for error, untouched, norm in ranks(2, refused_later, change, 1, overlap):
        assert "parameter '1': expected memory for 12 elements of torch.float32, found less" in error
        assert untouched
        assert norm == pytest.approx(2 * 48**0.5, rel=1e-12)


@pytest.mark.parametrize("policy", ["constant", "per_tensor", "value"])
def test_an_inference_tensor_is_refused_before_any_gradient_changes(policy):
    found = [nn.Parameter(torch.zeros(3, 4)) for _ in range(3)]
    clip = {"max_norm": 1.0, "nonfinite": "propagate", "policy": policy}
    clipper = distnorm.GradClipper(found, {"clip": clip})
    for _ in range(3):
        fill(found)
        clipper.clip()
    fill(found)
    found[1].grad = None
    with torch.inference_mode():
        found[1].grad = torch.full((3, 4), 2.0)
    with pytest.raises(
        distnorm.UnsupportedGradientError, match=r"parameter .1.: .* inference mode; clone it"
    ):
        clipper.clip()
    assert all(bool((p.grad == 2).all()) for p in found)
    assert float(distnorm.get_total_norm([p.grad for p in found])) == pytest.approx(12, rel=1e-6)


def test_an_empty_meta_gradient_is_refused_by_name():
    found = [nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.zeros(2))]
    clipper = distnorm.GradClipper(found, {"clip": {"max_norm": 1.0}})
    fill(found)
    moved_to_meta(found[0].grad)
    with pytest.raises(distnorm.UnsupportedGradientError, match="parameter '0': expected memory for 0"):
        clipper.clip()


def test_overlapping_gradients_with_coefficients_of_their_own_are_refused_by_name():
    found = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    clip = {"max_norm": 1.0, "policy": "per_tensor"}
    clipper = distnorm.GradClipper(found, {"clip": clip})
    memory = torch.full((6,), 3.0)
    found[0].grad, found[1].grad = memory[:4], memory[2:]
    with pytest.raises(distnorm.UnsupportedGradientError, match="memory of its own, as coefficients"):
        clipper.clip()
    assert bool((memory == 3).all())
