"""Coefficients for single tensors, and clamps, by compiled code and by torch's operators alike."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from distnorm import kernels
from distnorm.kernels import eager
from tests import oracle

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
SHAPES = ((), (3,), (4, 5), (0,), (2, 3))
WAYS = {"dispatch": kernels.scale_each_, "eager": eager.scale_each_}


def made() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for dtype in DTYPES
        for shape in SHAPES
    ]
    return [
        *tensors,
        torch.randn(6, 4, generator=generator).t(),
        torch.randn(6, 4, generator=generator)[:, ::2],
    ]


@pytest.mark.parametrize("way", WAYS)
def test_each_tensor_has_its_own_coefficient(way: str) -> None:
    tensors = made()
    before = [oracle.as_numpy(tensor).copy() for tensor in tensors]
    coefs = torch.rand(len(tensors), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    coefs[::4] = 0.3  # equal ones go together
    WAYS[way](tensors, coefs)
    for tensor, old, coef in zip(tensors, before, coefs.tolist(), strict=True):
        assert oracle.is_scaled(tensor, old, coef), (tensor.dtype, tensor.shape)


def test_a_coefficient_of_1_is_no_change() -> None:
    kept, scaled = torch.tensor([math.nan, -0.0]), torch.ones(2)
    versions = kept._version, scaled._version
    kernels.scale_each_([kept, scaled], torch.tensor([1.0, 0.5], dtype=torch.float64))
    assert (kept._version, scaled.tolist()) == (versions[0], [0.5, 0.5])
    assert scaled._version > versions[1], "autograd is told"


def test_a_coefficient_that_is_nan_reaches_its_tensors_alone() -> None:
    tensors = [torch.ones(2), torch.ones(2), torch.ones(2)]
    kernels.scale_each_(tensors, torch.tensor([math.nan, 0.5, math.nan], dtype=torch.float64))
    assert [bool(tensor.isnan().all()) for tensor in tensors] == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elements_are_clamped(dtype: torch.dtype) -> None:
    values = [0.75, -0.25, math.inf, -math.inf, math.nan, -3.0]
    tensor = torch.tensor(values).to(dtype)
    if dtype.is_complex:
        torch.view_as_real(tensor)[:, 1] = torch.tensor(values[::-1])
    wanted = np.clip(oracle.as_numpy(tensor).view(np.float64), -0.5, 0.5)
    kernels.clamp_([tensor, torch.zeros(0, dtype=dtype), torch.tensor(2.0).to(dtype)], 0.5)
    np.testing.assert_array_equal(oracle.as_numpy(tensor).view(np.float64), wanted)


def test_a_bound_beyond_the_range_of_a_dtype() -> None:
    """torch's own operators refuse it."""
    tensor = torch.tensor([3.0, math.inf, -65504.0], dtype=torch.float16)
    kernels.clamp_([tensor, wide := torch.tensor([3.0, math.inf])], 1e5)
    assert tensor.tolist() == [3.0, math.inf, -65504.0] and wide.tolist() == [3.0, 1e5]
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        most = torch.finfo(dtype).max
        for bound in (most, 65519.0, 65520.0, 3.395e38, 3.397e38, 1e308):
            kernels.clamp_([tensor := torch.tensor([math.inf, -math.inf], dtype=dtype)], bound)
            rounded = torch.tensor(bound, dtype=torch.float64).to(dtype)
            assert torch.equal(tensor, torch.stack([rounded, -rounded])), (dtype, bound)


def test_missing_tensors_have_coefficients_too() -> None:
    tensors = [torch.ones(2), None, torch.ones(2)]
    for way in WAYS.values():
        way(tensors, torch.tensor([0.5, 7.0, 0.25], dtype=torch.float64))
    assert [t.tolist() for t in tensors if t is not None] == [[0.25] * 2, [0.0625] * 2]


# ---- float8, which torch's operators can't compute with

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)


def patterns(dtype: torch.dtype) -> list[Tensor]:
    """Every value of the dtype, in tensors of several strides."""
    every = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype)
    return [every, every.clone().view(16, 16).t(), every.repeat(2).view(256, 2)[:, :1], every[:0]]


def assert_same_float8(found: Tensor, wanted: Tensor) -> None:
    nan = wanted.float().isnan()
    assert torch.equal(found.float().isnan(), nan)
    assert torch.equal(found.view(torch.uint8)[~nan], wanted.view(torch.uint8)[~nan])


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("coef", [0.5, 0.3, 1e-3, 0.0])
@pytest.mark.parametrize("way", ["scale_", "scale_each_", "on another device"])
def test_float8_is_scaled_in_fp32_and_rounded_once(dtype: torch.dtype, coef: float, way: str) -> None:
    tensors = patterns(dtype)
    wanted = [(tensor.float() * torch.tensor(coef)).to(dtype) for tensor in tensors]
    factor = torch.tensor(coef, dtype=torch.float64)
    if way == "scale_":
        kernels.scale_([*tensors, ones := torch.ones(2)], factor)
        assert ones.tolist() == pytest.approx([coef] * 2)
    else:
        scale = kernels.scale_each_ if way == "scale_each_" else eager.scale_each_
        scale(tensors, factor.expand(len(tensors)))
    for tensor, one in zip(tensors, wanted, strict=True):
        assert_same_float8(tensor, one)


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8_is_clamped_and_zeroed(dtype: torch.dtype) -> None:
    tensors = patterns(dtype)
    wanted = [tensor.float().clamp(-0.5, 0.5).to(dtype) for tensor in tensors]
    kernels.clamp_(tensors, 0.5)
    for tensor, one in zip(tensors, wanted, strict=True):
        assert_same_float8(tensor, one)
    kept = [tensor.clone() for tensor in tensors]
    kernels.zero_unless_(tensors, torch.tensor(True))
    for tensor, one in zip(tensors, kept, strict=True):
        assert torch.equal(tensor.view(torch.uint8), one.view(torch.uint8))
    kernels.zero_unless_(tensors, torch.tensor(False))
    assert all((tensor.view(torch.uint8) == 0).all() for tensor in tensors)


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8_is_measured(dtype: torch.dtype) -> None:
    values = torch.tensor([0.5, -1.5, 2.0, 0.0]).to(dtype)
    total = sum(float((block * block).sum()) for block in kernels.blocks([values]))
    assert total == 0.25 + 2.25 + 4
    assert kernels.summaries([values], kernels.Kernel.SQUARES).tolist() == [[6.5, 2.0, 1.0, 0.0]]


def test_a_large_float8_tensor_is_widened_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(eager._BLOCK, "cpu", 1000)
    tensor = torch.full((5001,), 4.0).to(torch.float8_e5m2)
    kernels.scale_([tensor], torch.tensor(0.5, dtype=torch.float64))
    assert (tensor.float() == 2).all()


def test_lazily_conjugated_tensors_are_clamped_and_summed_by_bits() -> None:
    memory = torch.tensor([3 + 0.25j, -0.25 - 4j], dtype=torch.complex64)
    assert kernels.checksum(memory.conj()) == kernels.checksum(memory.conj().resolve_conj())
    kernels.clamp_([memory.conj()], 0.5)
    assert memory.tolist() == [0.5 + 0.25j, -0.25 - 0.5j]
