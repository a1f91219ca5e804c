"""Gradients that are partial for the first time while other ranks' are not, or go on without them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

import distnorm
from tests.refusals import TIMEOUT, Heard, clipper, heard, rank, with_ones


def replicated(mesh: DeviceMesh, numel: int = 4, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    local = torch.ones(numel, dtype=dtype)
    return nn.Parameter(DTensor.from_local(local, mesh, [Replicate()], run_check=False))


def give(tensor: nn.Parameter, local: torch.Tensor, placement: Placement) -> None:
    assert isinstance(tensor.data, DTensor)
    tensor.grad = DTensor.from_local(local, tensor.device_mesh, [placement], run_check=False)


def is_as_its_parameter(tensor: nn.Parameter) -> bool:
    held, gradient = tensor.data, tensor.grad
    return not isinstance(held, DTensor) or gradient is None or gradient.placements == held.placements


def settled(tensors: list[nn.Parameter], said: list[Heard]) -> tuple[list[Heard], bool]:
    return said, all(map(is_as_its_parameter, tensors))


def beside_one_that_was_agreed_on(own_group: bool) -> tuple[list[Heard], bool]:
    """`a` is partial in both steps, on ranks 0 and 1; `b` in the second, where rank 0 has none of it."""
    mesh = DeviceMesh("cpu", [0, 1])
    if own_group and rank() == 2:
        rest = with_ones(nn.Parameter(torch.zeros(3)))
        clipping = clipper([("rest", rest)], max_norm=None)
        return settled([rest], [heard(clipping.clip), heard(clipping.clip)])
    a, b = replicated(mesh), replicated(mesh)
    clipping, said = clipper([("a", a), ("b", b)], max_norm=None), []
    for of_b in (Replicate(), Partial() if rank() else None):
        give(a, torch.ones(4), Partial())
        b.grad = None
        if of_b is not None:
            give(b, torch.ones(4), of_b)
        said.append(heard(clipping.clip))
    return settled([a, b], said)


@pytest.mark.parametrize("own_group", [False, True])
def test_what_was_agreed_on_is_reduced_before_more_is_agreed_on(ranks, own_group):
    expected = ("", pytest.approx(math.sqrt(20 + 3 * own_group), rel=1e-14))
    for found in ranks(2 + own_group, beside_one_that_was_agreed_on, own_group, timeout=TIMEOUT):
        assert found == ([expected, expected], True)


N = 200_001
PLACES = (5_001, 77_777, 150_003)  # most elements are in no sample by which replicas are compared


def while_others_agree(call: str) -> list[tuple[list[Heard], bool]]:
    """Ranks 0 and 1 agreed on `a`, of which rank 0 has none in the second step, in which `b` is partial for
    the first time, on ranks 2 and 3: these ask the others to agree again."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mesh, holds_a = DeviceMesh.from_group(groups[rank() // 2], "cpu"), rank() < 2
    found = []
    for place in PLACES:
        tensor = replicated(mesh, N if holds_a else 4)
        clipping, said = clipper([("ab"[rank() // 2], tensor)], max_norm=None), []
        local = torch.zeros(N).index_fill_(0, torch.tensor(place), 3.0) if holds_a else torch.ones(4)
        for is_late in (False, True):
            tensor.grad = None
            if not (is_late and rank() == 0):
                give(tensor, local.clone(), Partial() if holds_a or is_late else Replicate())
            said.append(heard(getattr(clipping, call if is_late else "clip")))
        found.append(settled([tensor], said))
    return found


@pytest.mark.parametrize("call", ["clip", "measure"])
def test_ranks_that_are_asked_to_agree_again_reduce_nothing_twice(ranks, call):
    said = [("", pytest.approx(math.sqrt(36 + 4), rel=1e-14)), ("", pytest.approx(5.0, rel=1e-14))]
    for r, found in enumerate(ranks(4, while_others_agree, call, timeout=TIMEOUT)):
        is_settled = call == "clip" or r == 0  # where it was only measured, it stays as it was
        assert found == [(said, is_settled)] * len(PLACES)


def without_a_norm() -> list[Heard]:
    """Policy `value` doesn't meet the other ranks, of which the last holds no DTensor."""
    mesh = DeviceMesh("cpu", [0, 1])
    tensor = replicated(mesh) if rank() < 2 else with_ones(nn.Parameter(torch.zeros(3)))
    clip = {"max_norm": 1.0, "policy": {"name": "value"}}
    said, clipping = [], distnorm.GradClipper([("az"[rank() // 2], tensor)], {"clip": clip})
    for placement in (Replicate(), Partial()):
        if rank() < 2:
            give(tensor, torch.ones(4), placement)
        said.append(heard(clipping.clip))
    return said


def test_where_ranks_do_not_meet_a_new_partial_gradient_is_refused(ranks):
    *mesh, plain = ranks(3, without_a_norm, timeout=TIMEOUT)
    assert plain == [("", pytest.approx(math.nan, nan_ok=True))] * 2
    for said in mesh:
        assert [name for name, _ in said] == ["", "UnsupportedGradientError"]
        assert "'a': its gradient is Partial now" in said[1][1]


def hard_to_write(kind: str) -> list[Heard]:
    mesh = DeviceMesh("cpu", [0, 1])
    dtype: Any = getattr(torch, kind, torch.float32)
    tensor = replicated(mesh, 4, dtype) if rank() < 2 else with_ones(nn.Parameter(torch.zeros(4)))
    clipping = clipper([("ab"[rank() // 2], tensor)], max_norm=None)
    said = []
    for _ in range(2):
        local = torch.ones(4).to(dtype)
        if kind == "expanded" or (kind == "expanded on one rank" and rank()):
            local = torch.ones(1).expand(4)
        elif kind == "of inference mode":
            with torch.inference_mode():
                local = torch.ones(4)
        if rank() < 2:
            give(tensor, local, Partial())
        said.append(heard(clipping.clip))
    return said


WRITTEN = ("expanded", "expanded on one rank", "of inference mode")


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_sum_is_stored_in_place_of_what_can_not_be_written(ranks, kind):
    for said in ranks(3, hard_to_write, kind, timeout=TIMEOUT):
        assert said == [("", pytest.approx(math.sqrt(20), rel=1e-14))] * 2


@pytest.mark.parametrize("kind", ["complex32", "float8_e4m3fn", "float8_e4m3fnuz"])
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_dtypes_that_can_not_be_added_up_are_refused_on_every_rank(ranks, kind):
    for said in ranks(3, hard_to_write, kind, timeout=TIMEOUT):
        for name, message in said:
            assert name == "UnsupportedGradientError" and "'a': expected a dtype" in message
