"""Triton's kernels against dense fp64, and against torch bit for bit; `test_triton.py` runs these in a
process of their own, in Triton's interpreter on the CPU's memory or on a GPU."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch

from distnorm.kernels import AddressTable, FiniteMarks, Kernel, addresses, device_table, eager, gpu
from tests import oracle

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda:0")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CHUNK, BLOCK = 1 << 12, 1 << 10
SIZES = (0, 1, 3, BLOCK // 2, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 17)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
EXTREMES = (0.0, -0.0, 1e20, 1e-25, 1e-40, math.inf, -math.inf, math.nan, 1e-45, 65504.0)


def random(size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    made = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype).to(DEVICE)


def patterns(dtype: torch.dtype) -> torch.Tensor:
    """All of 16 bits on a GPU; for the interpreter, which is slow, every seventh, and both infinities."""
    if DEVICE.type == "cpu":
        infinities = torch.tensor([math.inf, -math.inf], dtype=dtype)
        return torch.cat([torch.arange(-32768, 32768, 7).to(torch.int16).view(dtype), infinities])
    return torch.arange(-32768, 32768).to(torch.int16).view(dtype).to(DEVICE)


def table(tensors: list[torch.Tensor]) -> gpu.DeviceTable:
    return gpu.DeviceTable(AddressTable.of(tensors), DEVICE)


def found(tensors: list[torch.Tensor], kernel: Kernel) -> float:
    statistic = gpu.statistic(table(tensors), kernel)
    assert (statistic.dtype, statistic.shape) == (torch.float64, (1,))
    return float(statistic)


def powers(tensors: list[torch.Tensor], kernel: Kernel) -> float:
    """The statistic in fp64, with its sum rounded once."""
    wide = np.abs(np.concatenate([np.zeros(1), *(oracle.as_numpy(t.cpu()).reshape(-1) for t in tensors)]))
    if kernel is Kernel.LARGEST or not np.isfinite(wide).all():
        return float(wide.max())  # NaN if an element is NaN
    return math.fsum((wide**2 if kernel is Kernel.SQUARES else wide).tolist())


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, but for the bits of NaN."""
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    kind = BITS[expected.element_size()]
    assert torch.equal(found[~nan].view(kind), expected[~nan].view(kind))


def by_torch(tensor: torch.Tensor, coef: float) -> torch.Tensor:
    """The coefficient in fp32 (fp64 for fp64); the product rounded to that, then to the dtype."""
    wide = torch.float64 if tensor.dtype is torch.float64 else torch.float32
    factor = torch.tensor(coef, dtype=torch.float64).to(wide).to(tensor.device)
    return (tensor.to(wide) * factor).to(tensor.dtype)


def scaled(tensors: list[torch.Tensor], coef: float) -> list[torch.Tensor]:
    gpu.scale_(table(tensors), torch.tensor(coef, dtype=torch.float64, device=DEVICE))
    return tensors


# ---- the statistic


@pytest.mark.parametrize("kernel", Kernel)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size_and_alignment(dtype, kernel):
    whole = random(SIZES[-1] + 8, dtype)
    for i, size in enumerate(SIZES):
        for start in (0, 1 + i % 7):
            tensor = whole[start : start + size]
            assert found([tensor], kernel) == pytest.approx(powers([tensor], kernel), rel=1e-14), (
                size,
                start,
            )


@pytest.mark.parametrize("kernel", Kernel)
def test_many_tensors_of_all_dtypes_at_odd_addresses(kernel):
    tensors = [random(60 + i, DTYPES[i % 4], seed=i)[1 + i % 5 : 1 + i % 5 + (i * 7) % 45] for i in range(48)]
    tensors[17] = random(2 * CHUNK + 5, torch.bfloat16)
    assert any(tensor.numel() == 0 for tensor in tensors)
    places = table(tensors)
    assert len(places.kinds) == 4
    assert float(gpu.statistic(places, kernel)) == pytest.approx(powers(tensors, kernel), rel=1e-14)
    each = gpu.statistic(places, kernel, per_tensor=True)
    assert each.tolist() == pytest.approx([powers([tensor], kernel) for tensor in tensors], rel=1e-14)


@pytest.mark.parametrize("kernel", Kernel)
def test_nothing(kernel):
    assert found([], kernel) == found([random(0, torch.float32)], kernel) == 0.0
    empty = table([random(0, torch.float32), random(0, torch.float16)])
    assert gpu.statistic(empty, kernel, per_tensor=True).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kernel", Kernel)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_at_the_ends_of_the_range(dtype, kernel):
    info = torch.finfo(dtype)
    largest = 1e100 if dtype is torch.float64 else info.max
    for value in (
        0.0,
        -0.0,
        1e20,
        1e-25,
        -largest,
        info.smallest_normal * info.eps,
        -info.smallest_normal / 2,
    ):
        value = max(-largest, min(largest, value))
        tensor = torch.full((BLOCK + 45,), value, dtype=torch.float64).to(dtype).to(DEVICE)
        assert found([tensor], kernel) == pytest.approx(powers([tensor], kernel), rel=1e-14, abs=0), value
        assert math.copysign(1, found([tensor], kernel)) == 1


@pytest.mark.parametrize("kernel", Kernel)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, BLOCK - 1, BLOCK + 5, CHUNK + 36])
def test_one_bad_value_anywhere(dtype, kernel, place):
    others = random(9, torch.float32)
    tensor = random(CHUNK + 37, dtype)
    for bad in (math.inf, -math.inf, math.nan, -math.nan):
        tensor[place] = bad
        assert str(found([others, tensor, others], kernel)) == str(abs(bad)).lstrip("-")
    tensor[7] = math.inf
    assert math.isnan(found([tensor], kernel))  # a NaN beside an inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_finite_pattern_of_the_small_dtypes(dtype):
    tensor = patterns(dtype)
    tensor = tensor[tensor.isfinite()]
    for kernel in Kernel:
        assert found([tensor], kernel) == pytest.approx(powers([tensor], kernel), rel=1e-14)


@pytest.mark.parametrize("kernel", Kernel)
def test_tensors_with_a_bad_value_are_marked(kernel):
    sizes = [0, 5, 3 * CHUNK + 17, 1, CHUNK, 40]
    tensors = [random(size, DTYPES[i % 4], i) for i, size in enumerate(sizes)]
    tensors[2][-1], tensors[5][0] = math.nan, -math.inf
    marks = FiniteMarks({id(tensor): [10 * i] for i, tensor in enumerate(tensors)})
    plain = found(tensors, kernel)
    marked = gpu.statistic(table(tensors), kernel, marks, tensors)
    assert marks.bad() == [20, 50] and math.isnan(plain) and math.isnan(float(marked))


@pytest.mark.parametrize("kernel", Kernel)
def test_the_same_bits_twice(kernel):
    tensors = [random(4000 + 70 * i, DTYPES[i % 4], seed=i) for i in range(8)]
    assert len({found(tensors, kernel) for _ in range(3)}) == 1
    assert found([tensor.clone() for tensor in tensors], kernel) == found(tensors, kernel)


# ---- the table


def test_chunks_of_a_tensor_beyond_32_bits():
    """The places are made up: nothing is read."""
    numels = np.array([5, 3 << 32, 0, CHUNK + 1])
    starts, codes = np.array([1 << 40, 1 << 41, 0, 1 << 50]), np.array([2, 0, 1, 2], dtype=np.int32)
    places = AddressTable(DEVICE, starts, numels, codes, np.zeros(4, dtype=np.int64))
    cut = places.chunks
    rows, runs, kinds = cut.at(places.starts), cut.runs, cut.kinds
    assert len(rows) <= addresses._CHUNKS + len(numels)
    for address, size, numel, (first, last) in zip(
        places.starts, (2, 4, 8, 2), numels.tolist(), runs.tolist(), strict=True
    ):
        taken = [(address, packed % (1 << 32)) for address, packed in rows[first:last].tolist()]
        assert sum(count for _, count in taken) == numel
        assert all(0 < count < 1 << 31 for _, count in taken)
        for start, count in taken:
            assert start == address
            address += count * size
    assert [set(rows[first:last, 1] >> 32) for first, last in runs] == [{0}, {1}, set(), {3}]
    assert [code for code, _, _ in kinds] == [0, 2]
    counts = rows[:, 1] % (1 << 32)
    assert [sum(counts[first : first + many]) for _, first, many in kinds] == [3 << 32, CHUNK + 6]


def test_a_table_is_made_anew_only_if_something_moved():
    tensors = [random(10, torch.float32), random(0, torch.float64), random(7, torch.bfloat16)]
    first = device_table.table_of(tensors)
    tensors[0].fill_(2)
    assert device_table.table_of(list(tensors)) is first
    assert float(gpu.statistic(first, Kernel.MAGNITUDES)) == pytest.approx(
        20 + powers(tensors[2:], Kernel.MAGNITUDES)
    )
    assert device_table.table_of(tensors[::-1]) is not first
    assert device_table.table_of([tensors[0][:9], *tensors[1:]]) is not first
    assert device_table.table_of([tensors[0].view(torch.int32).view(torch.float32), *tensors[1:]]) is first
    for _ in range(device_table._REMEMBERED + 1):
        device_table.table_of(tensors := [*tensors, random(3, torch.float32)])
    assert len(device_table._tables) == device_table._REMEMBERED


def test_a_kernel_is_launched_on_no_element():
    gpu._try_out(DEVICE)
    assert gpu.usable(DEVICE) == (DEVICE.type == "cuda")


def test_tensors_that_overlap_are_told():
    flat = random(100, torch.float32)
    assert not table(list(flat.split([1, 0, 50, 49]))).overlap
    assert table([flat[:51], flat[50:]]).overlap
    assert table([flat, flat]).overlap


def test_a_tensor_whose_memory_was_freed():
    freed = random(3, torch.float32)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="storage was freed"):
        table([random(2, torch.float32), freed])


# ---- scaling


COEFFICIENTS = (0.5, 1 / 3, 0.9999999, 1e-30, 1e-41, 3.0, 1e30, 0.0, -0.7, math.inf, math.nan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("coef", COEFFICIENTS)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_scaling_every_pattern_of_the_small_dtypes(dtype, coef):
    tensor = patterns(dtype)
    expected = by_torch(tensor, coef)
    peer = tensor.clone()
    eager.scale_([peer], torch.tensor(coef, dtype=torch.float64, device=DEVICE))
    assert_same(peer, expected)
    assert_same(scaled([tensor], coef)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("coef", COEFFICIENTS)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_scaling_random_patterns_of_the_large_dtypes(dtype, coef):
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (10_000,), generator=torch.Generator().manual_seed(1))
    tensor = torch.cat([words.view(dtype), torch.tensor(EXTREMES, dtype=dtype)]).to(DEVICE)
    expected = by_torch(tensor, coef)
    assert_same(scaled([tensor], coef)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling_changes_nothing_beside_the_tensors(dtype):
    for start in (3, 8):
        for size in SIZES:
            whole = random(size + start + 1, dtype)
            expected = torch.cat([whole[:start], by_torch(whole[start:-1], 0.3), whole[-1:]])
            scaled([whole[start:-1]], 0.3)
            assert_same(whole, expected)


def test_scaling_many_tensors_of_all_dtypes():
    tensors = [random(1 + (i * 7919) % 900, DTYPES[i % 4], seed=i) for i in range(40)]
    expected = [by_torch(tensor, 0.77) for tensor in tensors]
    for tensor, one in zip(scaled(tensors, 0.77), expected, strict=True):
        assert_same(tensor, one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_coefficient_of_one_changes_no_bit(dtype):
    """Not even those of a NaN that signals."""
    kind = BITS[dtype.itemsize]
    patterns = torch.arange(-500, 500).to(kind)
    tensor = torch.cat([patterns, torch.full((CHUNK,), math.inf, dtype=dtype).view(kind) + 1]).to(DEVICE)
    before = tensor.clone()
    scaled([tensor.view(dtype)], 1.0)
    assert torch.equal(tensor, before)


# ---- coefficients for single tensors, bounds, zeros


def assert_all_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for tensor, one in zip(found, expected, strict=True):
        assert_same(tensor, one)


def mixed(count: int) -> list[torch.Tensor]:
    """Of all dtypes, at odd addresses, some of them empty or longer than a chunk."""
    sizes = [SIZES[i % len(SIZES)] if i % 9 == 0 else (i * 7919) % 90 for i in range(count)]
    return [random(size + 3, DTYPES[i % 4], seed=i)[i % 4 :][:size] for i, size in enumerate(sizes)]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_each_tensor_has_its_own_coefficient():
    tensors = mixed(66)
    for i, tensor in enumerate(tensors):
        if len(tensor):
            tensor[-1] = EXTREMES[i % len(EXTREMES)]
    coefs = [COEFFICIENTS[i % len(COEFFICIENTS)] if i % 2 else 1.0 for i in range(len(tensors))]
    expected = [t.clone() if coef == 1 else by_torch(t, coef) for t, coef in zip(tensors, coefs, strict=True)]
    peers = [tensor.clone() for tensor in tensors]
    factors = torch.tensor(coefs, dtype=torch.float64, device=DEVICE)
    gpu.scale_each_(table(tensors), factors)
    eager.scale_each_(peers, factors)
    assert_all_same(tensors, expected)
    assert_all_same(peers, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_single_coefficients_change_nothing_else(dtype):
    """Not the neighbours in memory, nor, by a coefficient of 1, the bits of a NaN that signals."""
    kind = BITS[dtype.itemsize]
    signalling = torch.full((CHUNK + 3,), math.inf, dtype=dtype).view(kind).add_(1).to(DEVICE)
    whole = random(2 * CHUNK + 9, dtype)
    for start in (3, 8):
        before, kept = whole.clone(), signalling.clone()
        parts = [signalling.view(dtype), whole[start : CHUNK + 5], whole[CHUNK + 5 : -1]]
        gpu.scale_each_(table(parts), torch.tensor([1.0, 0.3, 1.0], dtype=torch.float64, device=DEVICE))
        assert torch.equal(signalling, kept)
        before[start : CHUNK + 5] = by_torch(before[start : CHUNK + 5], 0.3)
        assert_same(whole, before)


@pytest.mark.parametrize("bound", [0.5, 0.1, 1e-30, 3e38, 1e300, 7])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_elements_are_put_within_a_bound(bound):
    tensors = mixed(40)
    for tensor in tensors:
        tensor[: len(EXTREMES)] = torch.tensor(EXTREMES, dtype=torch.float64)[: len(tensor)].to(tensor.dtype)
    peers = [tensor.clone() for tensor in tensors]
    gpu.clamp_(table(tensors), bound)
    eager.clamp_(peers, bound)
    assert_all_same(tensors, peers)
    for tensor in tensors:
        wide = oracle.as_numpy(tensor.cpu())
        most = torch.tensor(bound, dtype=torch.float64).to(tensor.dtype).double().item()
        assert (np.isnan(wide) | (np.abs(wide) <= most)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bound", [1.0, 1 / 3, 1e-6, 60000.0])
def test_bounds_of_every_pattern_of_the_small_dtypes(dtype, bound):
    tensor = patterns(dtype)
    peer, before = tensor.clone(), tensor.clone()
    gpu.clamp_(table([tensor]), bound)
    eager.clamp_([peer], bound)
    assert_same(tensor, peer)
    within = ~(before.double().abs() > bound)  # NaN too, with all its bits
    assert torch.equal(tensor[within].view(torch.int16), before[within].view(torch.int16))


def test_all_becomes_zero_or_nothing_does():
    whole = [random(CHUNK + 7, dtype) for dtype in DTYPES]
    parts = [tensor[start:-1] for tensor, start in zip(whole, (1, 2, 3, 8), strict=True)]
    for part in parts:
        part[:3] = math.nan
    before = [tensor.clone() for tensor in whole]
    gpu.zero_unless_(table(parts), torch.tensor(True, device=DEVICE))
    assert_all_same(whole, before)
    gpu.zero_unless_(table(parts), torch.tensor(False, device=DEVICE))
    for tensor, old, start in zip(whole, before, (1, 2, 3, 8), strict=True):
        assert not tensor[start:-1].view(BITS[tensor.element_size()]).any()
        assert torch.equal(tensor[:start], old[:start]) and torch.equal(tensor[-1:], old[-1:])
