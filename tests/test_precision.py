"""The norm is within 1 fp32 ulp of the true one, for every dtype and size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import distnorm
from distnorm.kernels import native
from tests import oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MANY = 100_000_000


@pytest.fixture(autouse=True, params=["native", "eager"])
def kernels(request, monkeypatch):
    """Every test is of the compiled kernels, and of the operators that take their place."""
    if request.param == "eager":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("there is no C compiler here")


def total(*tensors: torch.Tensor, order: float = 2.0) -> float:
    found = distnorm.get_total_norm(tensors, order)
    is_double = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
    assert found.dtype is (torch.float64 if is_double else torch.float32)
    return found.item()


def chunked_norm(tensor: torch.Tensor) -> float:
    """fp64 in numpy, added up with a single rounding."""
    sums = []
    for chunk in tensor.split(1 << 20):
        wide = chunk.double().numpy()
        sums.append(float(np.dot(wide, wide)))
    return math.sqrt(math.fsum(sums))


# ---- exact norms that are known as integers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hundred_million_elements_of_known_norm(dtype):
    """1, 2, ... 8 again and again: the sum of squares is an integer, 204 for each eight."""
    tensor = torch.arange(1, 9, dtype=dtype).repeat(MANY // 8)
    assert oracle.ulps(total(tensor), math.sqrt(204 * MANY // 8)) <= 1
    counted = distnorm.GradClipper([("w", _as_gradient(tensor))]).measure()
    assert counted.total_norm.item() == math.sqrt(204 * MANY // 8)  # an integer sum in fp64 is exact


@pytest.mark.parametrize("kernels", ["native"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hundred_million_random_elements(dtype):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(MANY, generator=generator, dtype=torch.float32).to(dtype)
    exact = chunked_norm(tensor)
    assert oracle.ulps(total(tensor), exact) <= 1
    counted = distnorm.GradClipper([("w", _as_gradient(tensor))]).measure()
    assert counted.total_norm.item() == pytest.approx(exact, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_elements_round_alike_and_still_add_up(dtype):
    """Elements of 0.1: each square is rounded the same way, so errors add up instead of cancelling."""
    tensor = torch.full((10_000_000,), 0.1, dtype=dtype)
    exact = math.sqrt(10_000_000) * float(tensor[0])
    assert oracle.ulps(torch.linalg.vector_norm(tensor).item(), exact) > 100  # torch
    assert oracle.ulps(total(tensor), exact) <= 1
    for order in (1.0, 3.0):
        exact = float(tensor[0]) * 10_000_000 ** (1 / order)
        assert oracle.ulps(total(tensor, order=order), exact) <= 1


def test_every_bit_pattern_of_the_small_dtypes():
    for dtype in (torch.float16, torch.bfloat16):
        tensor = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
        tensor = tensor[tensor.isfinite() & (tensor.abs() < 1e18)]
        assert oracle.ulps(total(tensor), oracle.dense_of([tensor])) <= 1
        assert total(tensor, order=math.inf) == tensor.abs().max().item()


# ---- the range


def test_fp16_elements_that_overflow():
    tensor = torch.full((1_000_000,), 100.0, dtype=torch.float16)
    assert torch.linalg.vector_norm(tensor).item() == math.inf  # torch
    assert total(tensor) == 1e5


@pytest.mark.parametrize("value", [1e20, 1e-25, 3e38, 1e-45])
def test_fp32_elements_whose_squares_leave_the_range(value):
    tensor = torch.full((4,), value)
    exact = 2.0 * float(tensor[0])
    assert torch.linalg.vector_norm(tensor).item() in (0.0, math.inf)  # torch
    if exact < 3.4e38:
        assert total(tensor) == np.float32(exact)
    assert distnorm.GradClipper([("w", _as_gradient(tensor))]).measure().total_norm.item() == exact


@pytest.mark.parametrize("order", [0.5, 1.0, 1.5, 2.0, 3.0, 6.5, 6.6, 7.0, 20.0, 100.0, 1000.0])
@pytest.mark.parametrize("value", [1e-45, 1e-20, 1.0, 1e20, 1e38])
def test_no_order_leaves_the_range(order, value):
    """1 + 2 + 3 + 4 small values and one that is larger: |x|**p under- and overflows by far."""
    tensors = [torch.tensor([1.0, -2.0, 3.0]) * value, torch.tensor(value).view(1), torch.zeros(3)]
    exact = oracle.dense_of(tensors, order)
    found = distnorm.GradClipper([_as_gradient(t) for t in tensors], {"norm": {"type": order}}).measure()
    assert found.total_norm.item() == pytest.approx(exact, rel=1e-12)
    if exact < 3.4e38:
        assert oracle.relative_error(total(*tensors, order=order), exact) <= 1.2e-7 or exact < 1e-37


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, 7.0, 20.0, math.inf])
def test_magnitudes_that_differ_by_the_whole_range(order):
    tensors = [
        torch.logspace(-44, 38, 500),
        torch.logspace(-30, 30, 1000, dtype=torch.float64),
        torch.ones(7),
    ]
    exact = oracle.dense_of(tensors, order)
    assert oracle.ulps(total(*tensors, order=order), exact) <= 1


def test_orders_of_hand_chosen_numbers():
    tensors = [torch.tensor([3.0, -4.0]), torch.tensor([5.0], dtype=torch.float16), torch.empty(0, 2)]
    expected = {1.0: 12.0, 2.0: math.sqrt(50), 3.0: 6.0, math.inf: 5.0, 0.5: (3**0.5 + 2 + 5**0.5) ** 2}
    for order, exact in expected.items():
        assert total(*tensors, order=order) == np.float32(exact), order


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
def test_complex_elements_count_by_their_magnitude(order):
    tensors = [
        torch.tensor([3 + 4j, 5 - 12j]),
        torch.tensor([8j], dtype=torch.complex128),
        torch.tensor([6.0]),
    ]
    exact = {1.0: 32.0, 2.0: math.sqrt(294), 3.0: (125 + 2197 + 512 + 216) ** (1 / 3), math.inf: 13.0}[order]
    assert total(*tensors, order=order) == np.float32(exact)


def test_complex_magnitudes_that_would_overflow():
    tensor = torch.tensor([3e38 + 3e38j])
    exact = math.hypot(float(tensor.real), float(tensor.imag))
    assert distnorm.GradClipper([_as_gradient(tensor)]).measure().total_norm.item() == pytest.approx(
        exact, rel=1e-15
    )


# ---- layouts


def test_gradients_that_are_not_contiguous():
    whole = torch.arange(1.0, 25.0).reshape(2, 3, 4)
    views = [
        whole.transpose(0, 2),
        whole[:, ::2],
        whole[..., 1],
        whole[1:].expand(5, 3, 4),
        whole.permute(2, 0, 1)[::3],
    ]
    for view in views:
        assert not view.is_contiguous()
        assert oracle.ulps(total(view), oracle.dense_of([view])) <= 1
        parameter = nn.Parameter(torch.zeros(view.shape))
        parameter.grad = view.clone(memory_format=torch.preserve_format)
        before = oracle.as_numpy(parameter.grad)
        result = distnorm.GradClipper([parameter], {"clip": {"max_norm": 1.0}}).clip()
        assert oracle.is_scaled(parameter.grad, before, result.clip_coef.item())


@pytest.mark.parametrize(
    "sizes", [[0], [1], [0, 1, 0], [1 << 18], [(1 << 18) + 1], [3, (1 << 18) - 2, 5, 1 << 19], [7] * 999]
)
def test_sizes_around_those_of_a_block(sizes):
    tensors = [torch.full((size,), float(i % 5 + 1)) for i, size in enumerate(sizes)]
    exact = math.sqrt(sum(size * (i % 5 + 1) ** 2 for i, size in enumerate(sizes)))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert total(*(t.to(dtype) for t in tensors)) == np.float32(exact)


@pytest.mark.parametrize("kernels", ["native"], indirect=True)
@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """The only elements that are not zero are the first and those behind 2**31: 4.3 GB of bf16."""
    tensor = torch.zeros((1 << 31) + 8, dtype=torch.bfloat16)
    tensor[0], tensor[-1], tensor[1 << 31] = 2.0, 3.0, 6.0
    parameter = nn.Parameter(torch.empty(0))
    parameter.data = tensor
    parameter.grad = tensor
    result = distnorm.GradClipper([("w", parameter)], {"clip": {"max_norm": 3.5}}).clip()
    assert result.total_norm.item() == 7.0
    assert [tensor[i].item() for i in (0, 1, 1 << 31, -1)] == [1.0, 0.0, 3.0, 1.5]


@pytest.mark.parametrize("kernels", ["eager"], indirect=True)
@pytest.mark.slow
def test_an_expanded_view_of_more_than_two_to_the_31_elements():
    assert total(torch.tensor([0.5]).expand((1 << 31) + 4, 1)) == np.float32(math.sqrt((2.0**31 + 4) / 4))


def _as_gradient(tensor: torch.Tensor) -> nn.Parameter:
    result = nn.Parameter(torch.empty(0, dtype=tensor.dtype))
    result.data = tensor
    result.grad = tensor
    return result
