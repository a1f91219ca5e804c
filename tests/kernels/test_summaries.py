"""Statistics of single tensors, their rows and their bits: against dense fp64, on every path."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distnorm.kernels import Kernel, checksum, eager, native, row_squares, summaries
from tests import oracle

UNIT = 1 << 16
SIZES = (0, 1, 3, 31, 32, 33, 1000, UNIT - 1, UNIT, UNIT + 1, 3 * UNIT + 7)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
BLOCK = 1 << 18


def random(size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    tensor = torch.randn(size, generator=generator, dtype=wide)
    tensor[torch.rand(size, generator=generator) < 0.2] = 0
    return tensor.to(dtype)


def expected(tensor: torch.Tensor, kernel: Kernel) -> list[float]:
    wide = np.abs(oracle.as_numpy(tensor)).reshape(-1)
    largest = float(wide.max(initial=0.0))  # NaN if an element is NaN
    sums = wide**2 if kernel is Kernel.SQUARES else wide
    finite = np.isfinite(wide).all()
    statistic = largest if kernel is Kernel.LARGEST or not finite else math.fsum(sums.tolist())
    return [statistic, largest, float((wide == 0).sum()), float((~np.isfinite(wide)).sum())]


@pytest.fixture(params=["compiled", "eager"])
def path(request, monkeypatch):
    if request.param == "eager":
        monkeypatch.setattr(native, "split", lambda tensors: ([], list(tensors)))
    elif native.library() is None:
        pytest.skip("there is no C compiler here")


@pytest.mark.parametrize("kernel", Kernel)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size(path, dtype, kernel):
    tensors = [random(size, dtype, seed=size) for size in SIZES]
    found = summaries(tensors, kernel)
    assert found.shape == (len(SIZES), 4)
    assert found.dtype is torch.float64
    for row, tensor in zip(found.tolist(), tensors, strict=True):
        assert row == pytest.approx(expected(tensor, kernel), rel=1e-13, abs=0), tensor.numel()
    assert summaries([], kernel).shape == (0, 4)


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
@pytest.mark.parametrize("place", [0, 31, 40, UNIT + 5, UNIT + 36])
def test_bad_elements_are_counted_and_a_nan_is_told(path, dtype, place):
    for bad in ([math.inf], [-math.inf], [math.nan], [math.nan, math.inf], [-math.inf, math.nan, math.nan]):
        tensor = random(UNIT + 37, dtype)
        spots = torch.arange(place, place - len(bad), -1)
        tensor[spots] = torch.tensor(bad).to(dtype)
        worst = math.nan if any(map(math.isnan, bad)) else math.inf
        for kernel in Kernel:
            statistic, largest, _, count = summaries([tensor], kernel)[0].tolist()
            assert repr((statistic, largest, count)) == repr((worst, worst, float(len(bad))))


def test_values_at_the_ends_of_the_range(path):
    for value in (1e20, 1e-25, -3e38, 1e-45, -0.0):
        tensor = torch.full((45,), value)
        found = summaries([tensor], Kernel.SQUARES)[0].tolist()
        assert found == pytest.approx(expected(tensor, Kernel.SQUARES), rel=1e-13, abs=0)
        assert math.copysign(1, found[1]) == 1


def test_any_layout_and_any_company(path):
    base = random(4000, torch.float32).view(40, 100)
    tensors = [
        *(base.t(), base[:, ::3], base[3:7, 5:9], base.expand(2, 40, 100), base[:, :0], base[1, 1]),
        *(random(77, dtype, seed=3)[1:70] for dtype in DTYPES),
    ]
    found = summaries(tensors, Kernel.MAGNITUDES).tolist()
    for row, tensor in zip(found, tensors, strict=True):
        assert row == pytest.approx(expected(tensor, Kernel.MAGNITUDES), rel=1e-13, abs=0)


def test_threads_change_no_bit(monkeypatch):
    tensors = [random(size, torch.float32, seed=size) for size in (5, 3 * UNIT + 7, 1 << 20, 1, 1 << 20)]
    monkeypatch.setattr(native, "_threads", lambda elements: 1)
    one = summaries(tensors, Kernel.SQUARES)
    monkeypatch.setattr(native, "_threads", lambda elements: 7)
    for _ in range(3):
        assert torch.equal(summaries(tensors, Kernel.SQUARES), one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(3, 5), (40, 33, 2), (1, 7), (5, 1), (3, 0), (0, 3), (2, UNIT + 3)], ids=str
)
def test_squares_of_rows(path, shape, dtype):
    tensor = random(math.prod(shape), dtype).view(shape)
    wide = np.abs(oracle.as_numpy(tensor)).reshape(shape[0], math.prod(shape[1:]))
    exact = [math.fsum((row**2).tolist()) for row in wide]
    for given in (tensor, tensor.transpose(0, 1).contiguous().transpose(0, 1)):
        before = given.clone()
        assert row_squares([given]).tolist() == pytest.approx(exact, rel=1e-13, abs=0)
        assert torch.equal(given, before)
    other = torch.full((2, 3), 2.0)
    assert row_squares([other, tensor, other]).tolist() == pytest.approx(
        [12.0, 12.0, *exact, 12.0, 12.0], rel=1e-13, abs=0
    )


def weighted_bits(tensor: torch.Tensor) -> int:
    """The checksum's definition, in Python's integers."""
    size = tensor.element_size()
    held = np.frombuffer(oracle.bits(tensor), dtype=f"i{size}").tolist()
    total = 0
    for start in range(0, len(held), BLOCK):
        block = held[start : start + BLOCK]
        total = total * 0x5DEECE66D + sum((2 * i + 1) * bits for i, bits in enumerate(block))
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
def test_checksums_are_the_same_by_every_path(dtype):
    for size in (0, 1, 3, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5):
        tensor = random(size, dtype, seed=size)
        assert int(checksum(tensor)) == int(eager.checksum(tensor)) == weighted_bits(tensor)
    square = random(900, dtype).view(30, 30)
    assert int(checksum(square.t())) == int(checksum(square.t().contiguous())) != int(checksum(square))


def test_every_flipped_bit_changes_the_checksum():
    tensor = random(70, torch.float32)
    whole = int(checksum(tensor))
    for place in (0, 33, 69):
        for bit in range(32):
            flipped = tensor.clone()
            flipped.view(torch.int32)[place] ^= -(1 << 31) if bit == 31 else 1 << bit
            assert int(checksum(flipped)) != whole
