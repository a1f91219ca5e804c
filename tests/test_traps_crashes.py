"""Where this field's norms crash, hang, or spread what is not finite: a test each, torch's fault first."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import distnorm
from tests.refusals import TIMEOUT, Heard, clipper, heard, rank, with_gradient, with_ones


def torch_raises(parameters: list[nn.Parameter]) -> str:
    try:
        torch.nn.utils.clip_grad_norm_(parameters, math.inf)
    except RuntimeError as error:
        return str(error)
    return ""


# ---- crashes and hangs


def mixed_meshes_and_plain_tensors() -> list[Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    one, other = (
        with_ones(nn.Parameter(distribute_tensor(torch.ones(4), mesh[n], [Shard(0)]))) for n in "ab"
    )
    plain = with_ones(nn.Parameter(torch.ones(4)))
    return [
        *(torch_raises(tensors) for tensors in ([one, other], [one, plain])),
        distnorm.clip_grad_norm_([("one", one), ("other", other), ("plain", plain)], 1.0).item(),
    ]


def test_gradients_on_two_meshes_and_plain_ones_in_one_call(ranks):
    for two_meshes, with_plain, found in ranks(4, mixed_meshes_and_plain_tensors, timeout=TIMEOUT):
        assert re.search(
            "must have the same mesh|does not support cross-mesh|Sharding propagation failed", two_meshes
        )
        assert "mixed torch.Tensor and DTensor" in with_plain
        assert found == pytest.approx(math.sqrt(12), rel=1.2e-7)


def no_gradient_on_some_ranks(order: float) -> list[Heard]:
    """Ranks 0 and 1 hold rows; rank 2 an empty shard, rank 3 nothing at all."""
    three = DeviceMesh("cpu", [0, 1, 2])
    named = []
    if rank() < 3:
        shape = {"shape": (2, 2), "stride": (2, 1), "run_check": False}
        local = torch.ones(1 if rank() < 2 else 0, 2)
        parameter = nn.Parameter(DTensor.from_local(local, three, [Shard(0)], **shape))
        named.append(("w", parameter))
    clipping = distnorm.GradClipper(named, {"norm": {"type": order}})
    said = []
    for who in [(), (0,), (0, 1, 2), (1, 2), (2,), ()]:
        for _, parameter in named:
            parameter.grad = torch.ones_like(parameter) if rank() in who else None
        said.append(heard(clipping.clip))
    return said


@pytest.mark.parametrize("order", [2.0, math.inf])
def test_ranks_with_no_gradients_or_another_set_of_them(ranks, order):
    """AReaL #1139, DeepSpeed #1522 and #8478, torchtitan #1541; inf of an empty shard: pytorch #173238."""
    with pytest.raises(RuntimeError, match="inf norm on an empty tensor"):
        torch.linalg.vector_norm(torch.empty(0), math.inf)
    expected = [0.0, 1.0, 1.0, 1.0, 0.0, 0.0] if order == math.inf else [0.0, 2**0.5, 2.0, 2**0.5, 0.0, 0.0]
    assert (
        ranks(4, no_gradient_on_some_ranks, order, timeout=TIMEOUT) == [[("", norm) for norm in expected]] * 4
    )


def test_a_generator_of_parameters_clips():
    """torchtitan #1258, AReaL #335: read twice, the second time it is empty."""
    ours = [with_gradient(3.0), with_gradient(4.0)]
    assert distnorm.clip_grad_norm_((p for p in ours), 1.0).item() == 5.0
    assert [p.grad.item() for p in ours] == pytest.approx([0.6, 0.8], rel=1e-6)
    clipping = clipper((p for p in ours), max_norm=0.5)
    assert clipping.clip().total_norm.item() == pytest.approx(1.0, rel=1e-6)
    assert clipping.clip().total_norm.item() == pytest.approx(0.5, rel=1e-5)


def test_gradients_passed_where_parameters_are_meant():
    """transformers #46113: clipping is a silent no-op. (And 2**31 elements: test_precision.py.)"""
    gradients = [torch.tensor([3.0, 4.0])]
    assert torch.nn.utils.clip_grad_norm_(gradients, 1.0).item() == 0.0
    for call in (lambda: distnorm.clip_grad_norm_(gradients, 1.0), lambda: clipper(gradients)):
        with pytest.raises(distnorm.DistnormError, match="gradients passed where parameters are meant"):
            call()


# ---- non-finite


def test_nan_is_no_magic_number():
    """DeepSpeed ZeRO fp32: NaN became -1, was squared, and reported as 1.0 without overflow."""
    result = clipper([with_gradient(math.nan), with_gradient(1.0)], "skip").clip().to_dict()
    assert math.isnan(result["total_norm"])
    assert (result["is_finite"], result["was_clipped"]) == (False, False)


def test_an_all_zero_gradient_has_norm_zero():
    """DeepSpeed BF16_Optimizer: an assert fails."""
    for dtype in (torch.float32, torch.bfloat16):
        result = clipper([with_gradient(0.0, -0.0, dtype=dtype)]).clip().to_dict()
        assert (result["total_norm"], result["clip_coef"], result["is_finite"]) == (0.0, 1.0, True)


def shrinking_inf_norms() -> list[float]:
    parameter = with_gradient(0.0)
    clipping = distnorm.GradClipper([("w", parameter)] if rank() == 0 else [], {"norm": {"type": math.inf}})
    norms = []
    for value in (100.0, 1.0, 0.01):
        parameter.grad = torch.tensor([value], dtype=torch.float64).float()
        norms.append(clipping.clip().total_norm.item())
    return norms


def test_inf_norms_do_not_stick_where_a_rank_has_no_gradients(ranks):
    """FSDP1: an all-reduce wrote into a cached zero, so 100, 1, 0.01 were 100, 100, 100."""
    assert ranks(2, shrinking_inf_norms, timeout=TIMEOUT) == [[100.0, 1.0, float(torch.tensor(0.01))]] * 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_element_does_not_spoil_every_gradient(bad):
    theirs = [with_gradient(1.0, bad), with_gradient(2.0)]
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    assert not 0 < theirs[1].grad.item() < math.inf  # torch
    for nonfinite, expected in (("skip", 2.0), ("zero", 0.0)):
        ours = [with_gradient(1.0, bad), with_gradient(2.0)]
        assert not clipper(ours, nonfinite).clip().is_finite
        assert ours[1].grad.item() == expected
