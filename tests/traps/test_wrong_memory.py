"""Gradients whose memory is not what one looks at: written unseen, of another dtype, shared or lazy."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distnorm
from tests import oracle
from tests.refusals import TIMEOUT, Heard, clipper, heard

# ---- clip.overlap: writes that raise no version counter


def local(gradient: Any) -> Tensor:
    tensor: Tensor = getattr(gradient, "_local_tensor", gradient).detach()
    return tensor


def row_by_data(gradient: Tensor) -> None:
    gradient.data[len(gradient) // 2].mul_(3)


def element_by_numpy(gradient: Tensor) -> None:
    flat = local(gradient).numpy().reshape(-1)
    flat[len(flat) // 3] = 77


def last_element_by_address(gradient: Tensor) -> None:
    at = local(gradient).data_ptr() + 4 * (local(gradient).numel() - 1)
    ctypes.c_float.from_address(at).value = 99


def foreach_on_dtensors(gradient: Tensor) -> None:
    torch._foreach_mul_([gradient], 2.0)


def all_reduced(gradient: Tensor) -> None:
    torch.distributed.all_reduce(local(gradient))


def two_trade_places(gradient: Tensor) -> None:
    flat = local(gradient).view(-1)
    flat[0], flat[-1] = 3 * flat[-1].clone(), flat[0].clone()


def unscaled_as_by_a_scaler(gradient: Tensor) -> None:
    torch._amp_foreach_non_finite_check_and_unscale_([local(gradient)], torch.zeros(()), torch.full((), 0.5))


WRITES: list[Callable[[Tensor], None]] = [
    *(row_by_data, element_by_numpy, last_element_by_address, foreach_on_dtensors),
    *(all_reduced, two_trade_places, unscaled_as_by_a_scaler),
]


def written_after_backward(kind: str, width: int) -> list[tuple[str, float, float]]:
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Linear(width, 2))
    weight = net[2].weight
    if kind == "fsdp2":
        fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
        weight = net[2].weight
    elif kind.startswith("ddp"):
        net = DistributedDataParallel(net, gradient_as_bucket_view=kind == "ddp, views")
    clipping = distnorm.GradClipper(net, {"clip": {"overlap": True}})
    inputs, steps = torch.arange(12.0).view(3, 4), []
    for write in [lambda g: None, *WRITES]:
        net.zero_grad()
        net(inputs).sum().backward()
        write(weight.grad)
        whole = [p.grad.full_tensor() if kind == "fsdp2" else p.grad for p in net.parameters()]
        expected = oracle.dense_of(whole)
        steps.append((write.__name__, float(clipping.clip().total_norm), expected))
    return steps


@pytest.mark.parametrize("width", [8, 600])
@pytest.mark.parametrize("kind", ["plain", "fsdp2", "ddp", "ddp, views"])
def test_a_write_that_autograd_does_not_see_is_measured(ranks, kind, width):
    for steps in ranks(2, written_after_backward, kind, width, timeout=TIMEOUT):
        assert len(steps) == 1 + len(WRITES)
        for name, found, expected in steps:
            assert found == pytest.approx(expected, rel=1e-6), name


# ---- dtypes that change, and memory that is shared or lazy


def another_dtype(parameters: list[nn.Parameter], step: int) -> None:
    dtype = (torch.float32, torch.bfloat16, torch.float64, torch.float32)[step]
    parameters[0].grad_dtype = None
    parameters[0].grad = torch.randn(48).to(dtype)


def neighbours_then_overlapping(parameters: list[nn.Parameter], step: int) -> None:
    flat = torch.arange(1.0, 97.0)
    parameters[0].grad = flat[:48]
    parameters[1].grad = flat[(48, 48, 24, 0)[step] :][:48]


def with_gaps_then_repeated(parameters: list[nn.Parameter], step: int) -> None:
    flat = torch.arange(1.0, 97.0)
    parameters[0].grad = flat[:48] if step < 2 else flat[::2]
    parameters[1].grad = flat[48:] if step < 2 else (flat[1::2] if step == 2 else torch.ones(1).expand(48))


def negated_lazily(parameters: list[nn.Parameter], step: int) -> None:
    numbers = torch.randn(48, dtype=torch.complex64)
    parameters[0].grad = numbers.conj().imag if step % 2 else numbers.imag


CHANGES = [another_dtype, neighbours_then_overlapping, with_gaps_then_repeated, negated_lazily]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("api", ["clipper", "function"])
def test_each_element_is_measured_and_scaled_once_whatever_changes(change, api):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(48)) for _ in range(3)]
    clipping = clipper(parameters, "propagate", 1.0)
    for step in range(4):
        for parameter in parameters:
            parameter.grad = torch.ones(48)
        change(parameters, step)
        before = [parameter.grad.double().clone() for parameter in parameters]
        norm = oracle.dense_of(before)
        call = clipping.clip if api == "clipper" else lambda: distnorm.clip_grad_norm_(parameters, 1.0)
        assert heard(call) == ("", pytest.approx(norm, rel=1e-6))
        for parameter, old in zip(parameters, before, strict=True):
            rounding = 2 * torch.finfo(parameter.grad.dtype).eps
            expected = old / (norm + 1e-6)
            assert torch.allclose(parameter.grad.double(), expected, rtol=rounding, atol=0), step


def test_a_class_with_its_own_multiplication_is_scaled_as_memory():
    class Constant(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "mul" in getattr(func, "__name__", ""):
                return args[0]
            return super().__torch_function__(func, types, args, kwargs or {})

    parameter = nn.Parameter(torch.zeros(4))
    for call in (clipper([parameter]).clip, lambda: distnorm.clip_grad_norm_([parameter], 1.0)):
        parameter.grad = torch.full((4,), 4.0).as_subclass(Constant)
        assert heard(call) == ("", 8.0)
        plain = parameter.grad.as_subclass(torch.Tensor)
        assert plain.tolist() == pytest.approx([4 / (8 + 1e-6)] * 4, rel=1e-6)
        assert math.isclose(oracle.dense_of([plain]), 1.0, rel_tol=1e-6)


# ---- rows that are one row in memory, under coefficients of each row's own


def agc_of(gradient: Tensor) -> tuple[Heard, Tensor]:
    """What adaptive clipping said; and a gradient after that step, or after a good one if it was refused."""
    weight, other = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    clip = {"max_norm": None, "policy": {"name": "agc", "lambda": 0.1}}
    clipping = distnorm.GradClipper([("weight", weight), ("other", other)], {"clip": clip})
    weight.grad, other.grad = gradient, torch.ones(3, 4)
    said = heard(clipping.clip)
    if said[0]:
        assert torch.equal(other.grad, torch.ones(3, 4)) and torch.equal(weight.grad, torch.ones(3, 4))
        weight.grad = torch.ones(3, 4)
        clipping.clip()
    return said, weight.grad


def test_agc_refuses_rows_that_share_memory() -> None:
    said, after = agc_of(torch.ones(1, 4).expand(3, 4))
    assert said[0] == "UnsupportedGradientError" and "'weight'" in said[1]
    assert torch.allclose(after, torch.full((3, 4), 0.1), rtol=1e-6)  # each row's norm is its weight's
    said, after = agc_of(torch.ones(3, 1).expand(3, 4))
    assert not said[0] and torch.allclose(after, torch.full((3, 4), 0.1), rtol=1e-6)
