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
