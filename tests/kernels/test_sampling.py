"""Fingerprints, which any change shows in, and samples, which are the same numbers on every path."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from distnorm.kernels import AddressTable, fingerprints, native, samples, samples_of

COMPILED = native.library()
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
needs_compiler = pytest.mark.skipif(COMPILED is None, reason="there is no C compiler here")
LARGEST_WHOLE = 1 << 24  # bytes


def sample_of(tensor: torch.Tensor) -> torch.Tensor:
    return samples_of([tensor])[0]


def prints(*tensors: Tensor) -> list[int]:
    found = fingerprints(AddressTable.of(tensors))
    assert found is not None
    return found.tolist()


# ---- fingerprints


@needs_compiler
@pytest.mark.parametrize("numel", [1, 2, 15, 16, 17, 64, 65, 127, 129, 1000])
def test_any_byte_that_changes_shows(numel):
    tensor = torch.randn(numel)
    (before,) = prints(tensor)
    octets = tensor.view(torch.uint8)
    for i in range(len(octets)):
        old = int(octets[i])
        for new in (old ^ 1, old ^ 0x80):
            octets[i] = new
            assert prints(tensor) != [before], i
        octets[i] = old
    assert prints(tensor) == [before]
    assert prints(tensor.clone()) == [before]


@needs_compiler
@pytest.mark.parametrize("distance", [1, 2, 7, 8, 15, 16, 32, 64, 128, 512])
def test_elements_that_trade_places_show(distance):
    """Also a number and its negative, of which a weighted sum of words can be equal."""
    tensor = torch.randn(1024, dtype=torch.float64)
    tensor[3 + distance] = -tensor[3]
    (before,) = prints(tensor)
    tensor[3], tensor[3 + distance] = float(tensor[3 + distance]), float(tensor[3])
    assert prints(tensor) != [before]
    single = torch.arange(2000.0)
    (before,) = prints(single)
    single[5], single[5 + distance] = float(single[5 + distance]), float(single[5])
    assert prints(single) != [before]


@needs_compiler
@pytest.mark.parametrize("size", [LARGEST_WHOLE, LARGEST_WHOLE + 4, LARGEST_WHOLE + 900_000])
@pytest.mark.slow
def test_large_tensors_are_read_in_part(size):
    """Whole at up to 16 MiB; else the ends, and 1/16 of what is between, in every KiB."""
    tensor = torch.randn(size // 4)
    (before,) = prints(tensor)
    seen = []
    octets = tensor.view(torch.uint8)
    for i in [*range(0, size, 256 * 61), size - 1]:
        octets[i] ^= 4
        seen.append(prints(tensor) != [before])
        octets[i] ^= 4
    assert seen[0] and seen[-1]
    share = sum(seen) / len(seen)
    assert share == 1 if size == LARGEST_WHOLE else 1 / 20 < share < 1 / 8
    tensor.mul_(1.0000001)
    assert prints(tensor) != [before], "scaled as a whole"


@needs_compiler
@pytest.mark.parametrize("width", [256, 2048, 5376, 8192])
def test_a_column_shows_as_surely_as_a_row(width):
    """Of rows that are as long as one, 8, 21 or 32 of the periods in which a line is sampled."""
    matrix = torch.ones(LARGEST_WHOLE // 4 // width + 30, width)
    (before,) = prints(matrix)
    for column in range(0, width, width // 8 + 16):
        matrix[8:-8, column] = 2
        assert prints(matrix) != [before]
        matrix[8:-8, column] = 1
    assert prints(matrix) == [before]


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_fingerprint_is_of_the_bytes_alone(monkeypatch, threads):
    tensors = [torch.randn(1 + 37 * i % 500).to(DTYPES[i % 4]) for i in range(50)]
    tensors += [torch.zeros(0), torch.randn(400_000), torch.randn(11)[1:]]
    one_by_one = [prints(tensor)[0] for tensor in tensors]
    monkeypatch.setattr(native, "_threads", lambda elements: threads)
    assert prints(*tensors) == one_by_one
    assert prints(*(tensor.clone() for tensor in tensors)) == one_by_one
    assert len(set(one_by_one)) == len(one_by_one)
    assert prints(torch.zeros(3)) != prints(torch.zeros(4))


def test_without_compiled_code_there_is_none(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    assert fingerprints(AddressTable.of([torch.ones(3)])) is None


# ---- samples


SIGNS = 0xB5297A4D68E31DA4  # of a sample's elements, from the lowest bit on: the published bits of replicas


def expected(tensor: Tensor) -> list[float]:
    """The two sums by another way: element by element, with one rounding each."""
    flat = tensor.resolve_conj().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    values = flat.to(torch.float64).tolist()
    if len(values) > 64:
        starts = [k * (len(values) - 16) // 3 for k in range(4)]
        values = [values[start + i] for start in starts for i in range(16)]
    signs = [-1 if SIGNS >> k & 1 else 1 for k in range(len(values))]
    return [math.fsum(s * x for s, x in zip(signs, values, strict=True)), math.fsum(map(abs, values))]


SIZES = (0, 1, 5, 16, 17, 63, 64, 65, 66, 67, 100, 1000, 70_001)


@pytest.fixture(params=["compiled", "eager"])
def path(request, monkeypatch):
    if request.param == "eager":
        monkeypatch.setattr(native, "split", lambda tensors: ([], list(tensors)))
    elif COMPILED is None:
        pytest.skip("there is no C compiler here")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_a_sample_of_every_size(path, dtype):
    wide = torch.complex128 if dtype.is_complex else torch.float64
    tensors = [torch.randn(size, dtype=wide).to(dtype) for size in SIZES]
    found = samples_of(tensors)
    assert (found.dtype, found.shape) == (torch.float64, (len(SIZES), 2))
    for row, tensor in zip(found.tolist(), tensors, strict=True):
        # 6 additions in a row, each of which rounds once.
        bound = 6 * 2**-53 * expected(tensor)[1]
        assert row == pytest.approx(expected(tensor), rel=0, abs=bound), tensor.numel()
        assert sample_of(tensor).tolist() == row
    assert samples_of([]).shape == (0, 2)


@needs_compiler
def test_the_same_bits_by_compiled_code_and_by_torch(monkeypatch):
    tensors = [
        (torch.randn(size, dtype=torch.float64) * 10.0 ** (size % 7 - 3)).to(dtype)
        for size in SIZES
        for dtype in DTYPES
    ]
    compiled = samples(AddressTable.of(tensors))
    assert torch.equal(samples_of(tensors), compiled)
    strided = [torch.stack([tensor, tensor], dim=1)[:, 0] for tensor in tensors]
    assert torch.equal(samples_of(strided), compiled)
    monkeypatch.setattr(native, "split", lambda tensors: ([], list(tensors)))
    assert torch.equal(samples_of(tensors), compiled)


def test_elements_are_taken_in_the_order_of_their_indices(path):
    matrix = torch.randn(40, 50)
    assert torch.equal(sample_of(matrix.t().contiguous().t()), sample_of(matrix))
    assert torch.equal(sample_of(torch._neg_view(matrix)), sample_of(-matrix))
    expanded = torch.randn(1, 90).expand(30, 90)
    assert torch.equal(sample_of(expanded), sample_of(expanded.contiguous()))


def test_replicas_that_differ_differ(path):
    """By as much as one unit in the last place of one element of the sample."""
    tensor = torch.randn(5000)
    before = sample_of(tensor)
    for place in (0, 15, 1661, 1676, 3322, 4984, 4999):
        other = tensor.clone()
        other[place] = torch.nextafter(other[place], torch.tensor(10.0))
        assert sample_of(other)[0] != before[0], place
    tensor[0] = math.nan
    assert sample_of(tensor).isnan().all()
    assert np.isfinite(samples_of([torch.ones(3), tensor]).tolist()[0]).all()
