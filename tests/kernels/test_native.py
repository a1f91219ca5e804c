"""The compiled kernels: against dense fp64, and against torch bit for bit where they change a tensor."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from distnorm.kernels import (
    AddressTable,
    Kernel,
    addresses_of,
    compiling,
    eager,
    measure,
    native,
    samples,
    scale_,
)
from tests import oracle

COMPILED = native.library()
DTYPES = tuple(COMPILED.code) if COMPILED is not None else ()
SMALL = tuple(dtype for dtype in DTYPES if dtype.itemsize == 2)
UNIT = 1 << 16
SIZES = (0, 1, 3, 31, 32, 33, 1000, UNIT - 1, UNIT, UNIT + 1, 300_001)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

pytestmark = pytest.mark.skipif(COMPILED is None, reason="there is no C compiler here")


def random(size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def powers(tensors: list[torch.Tensor], kernel: Kernel) -> float:
    """The statistic in fp64, with its sum rounded once."""
    wide = np.abs(np.concatenate([np.zeros(1), *(oracle.as_numpy(t).reshape(-1) for t in tensors)]))
    if kernel is Kernel.LARGEST or not np.isfinite(wide).all():
        return float(wide.max())  # NaN if an element is NaN
    return math.fsum((wide**2 if kernel is Kernel.SQUARES else wide).tolist())


def found(tensors: list[torch.Tensor], kernel: Kernel) -> float:
    assert native.split(tensors)[1] == []
    return native.statistic(AddressTable.of(tensors), kernel)


def all_patterns(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, but for the bits of NaN."""
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    kind = BITS[expected.element_size()]
    assert torch.equal(found[~nan].view(kind), expected[~nan].view(kind))


def test_which_dtypes_are_done():
    """fp16 only where the CPU converts it."""
    assert set(DTYPES) >= {torch.float32, torch.float64, torch.bfloat16}
    if " f16c " in compiling._cpu_features():
        assert torch.float16 in DTYPES


# ---- the statistic


@pytest.mark.parametrize("kernel", Kernel)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size(dtype, kernel):
    for size in SIZES:
        tensor = random(size, dtype)
        assert found([tensor], kernel) == pytest.approx(powers([tensor], kernel), rel=1e-14), size


@pytest.mark.parametrize("kernel", Kernel)
@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_every_finite_pattern_of_the_small_dtypes(dtype, kernel):
    tensor = all_patterns(dtype)
    tensor = tensor[tensor.isfinite()]
    assert found([tensor], kernel) == pytest.approx(powers([tensor], kernel), rel=1e-14)
    for one in tensor[::97].split(1):
        assert found([one], kernel) == powers([one], kernel)


@pytest.mark.parametrize("kernel", Kernel)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_at_the_ends_of_the_range(dtype, kernel):
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps  # the smallest subnormal
    largest = 1e100 if dtype is torch.float64 else info.max
    for value in (0.0, -0.0, 1e20, 1e-25, -largest, least, -info.smallest_normal / 2):
        value = max(-largest, min(largest, value))
        tensor = torch.full((45,), value, dtype=torch.float64).to(dtype)
        exact = powers([tensor], kernel)
        assert found([tensor], kernel) == pytest.approx(exact, rel=1e-14, abs=0), value
        assert math.copysign(1, found([tensor], kernel)) == 1


@pytest.mark.parametrize("kernel", Kernel)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 31, 40, UNIT + 5, UNIT + 36])
def test_one_bad_value_anywhere(dtype, kernel, place):
    tensor = random(UNIT + 37, dtype)
    for bad in (math.inf, -math.inf, math.nan, -math.nan):
        tensor[place] = bad
        assert str(found([tensor], kernel)) == str(abs(bad)).lstrip("-")
    tensor[7] = math.inf
    assert math.isnan(found([tensor], kernel))  # a NaN beside an inf


@pytest.mark.parametrize("kernel", Kernel)
def test_rows_of_all_dtypes_at_odd_addresses(kernel):
    tensors = [
        random(50 + i, DTYPES[i % len(DTYPES)], seed=i)[1 + i % 5 : 1 + i % 5 + (i * 7) % 45]
        for i in range(400)
    ]
    assert {tensor.data_ptr() % 64 for tensor in tensors if tensor.numel()} > {2, 4, 6, 8, 12}
    assert any(tensor.numel() == 0 for tensor in tensors)
    assert found(tensors, kernel) == pytest.approx(powers(tensors, kernel), rel=1e-14)
    assert found([], kernel) == found([torch.empty(0)], kernel) == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_number_of_elements_that_fp32_could_not_count(dtype):
    """1, 2, ... 8 again and again: an integer, exact in fp64."""
    tensor = torch.arange(1, 9, dtype=dtype).repeat(5_000_000)
    assert found([tensor], Kernel.SQUARES) == 204 * 5_000_000
    assert found([tensor], Kernel.MAGNITUDES) == 36 * 5_000_000
    assert found([tensor], Kernel.LARGEST) == 8


@pytest.mark.parametrize("kernel", Kernel)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_do_not_depend_on_threads_or_cuts(monkeypatch, dtype, kernel):
    whole = random(3_000_017, dtype)
    sizes = [1, 30, 31, 32, 33, 1, 100_000, UNIT, 1_000_003, 17]
    cut = [piece.clone() for piece in whole.split([*sizes, whole.numel() - sum(sizes)])]
    results = set()
    for threads in (1, 2, 3, 200):
        monkeypatch.setattr(native, "_threads", lambda elements, threads=threads: threads)
        results |= {found(tensors, kernel) for tensors in ([whole], cut, list(whole.split(777)))}
    assert len(results) == 1
    assert results.pop() == pytest.approx(powers([whole], kernel), rel=1e-14)


def test_threads_are_as_many_as_torch_has_and_no_more_than_pay(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    assert [native._threads(n) for n in (0, 1_000_000, 1_200_000, 10**9)] == [1, 1, 2, 4]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3}, raising=False)
    assert native._threads(10**9) == 1
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert native._threads(10**9) == 1


FORK = """
import os, torch
from distnorm.kernels import AddressTable, Kernel, native
native._threads = lambda elements: 4
table = AddressTable.of([tensor := torch.ones(3_000_000)])
assert native.statistic(table, Kernel.SQUARES) == 3_000_000
child = os.fork()
assert native.statistic(table, Kernel.SQUARES) == 3_000_000
native.scale_(table, 2.0)
if not child:
    os._exit(int(native.statistic(table, Kernel.SQUARES) != 12_000_000))  # torch's own sum may hang here
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_process_forked_after_threads_were_used():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=180)


# ---- the addresses


def test_neighbours_in_one_buffer_are_one_row():
    flat = random(1000, torch.float32)
    pieces = list(flat.split([1, 499, 0, 300, 200]))
    assert AddressTable.of(pieces).merged.numels.tolist() == [1000]
    assert AddressTable.of([*pieces[3:], *pieces[:3]]).merged.numels.tolist() == [500, 500]
    halves = [flat[:500], flat[500:].view(torch.bfloat16)]  # neighbours of two dtypes
    assert AddressTable.of(halves).merged.numels.tolist() == [500, 1000]
    gap = [flat[:500], flat[501:]]
    table = AddressTable.of(gap)
    assert table.merged.numels.tolist() == [500, 499]
    assert native.statistic(table, Kernel.SQUARES) == pytest.approx(powers(gap, Kernel.SQUARES), rel=1e-14)


def test_a_table_is_used_again_and_sees_new_values():
    tensors = [random(100, torch.float32), torch.ones(5, dtype=torch.float64)]
    table = AddressTable.of(tensors)
    tensors[0].fill_(2)
    assert native.statistic(table, Kernel.SQUARES) == 405


def test_parts_of_tensors_and_the_same_parts_elsewhere():
    tensors = [torch.arange(10.0), torch.arange(6.0, dtype=torch.float64), torch.zeros(0)]
    part = AddressTable.of(tensors).part(np.array([2, 5, 0]), np.array([3, 1, 0]))
    assert native.statistic(part, Kernel.MAGNITUDES) == 2 + 3 + 4 + 5
    others = [tensor + 1 for tensor in tensors]
    assert native.statistic(part.at(addresses_of(others)), Kernel.MAGNITUDES) == 3 + 4 + 5 + 6
    later = part.part(np.array([1, 0, 0]), np.array([1, 1, 0]))
    assert native.statistic(later.at(addresses_of(others)), Kernel.MAGNITUDES) == 4 + 6
    both = np.array([[2, 3], [5, 1], [0, 0]])  # a column of it is no array without gaps
    again = AddressTable.of(tensors).part(both[:, 0], both[:, 1])
    assert samples(again).tolist() == samples(part).tolist()


def test_a_table_keeps_no_tensor_alive():
    tensor = torch.ones(10)
    storage = tensor.untyped_storage()._weak_ref()
    table = AddressTable.of([tensor])
    del tensor
    assert torch.UntypedStorage._expired(storage)
    assert table.total == 10
    torch.UntypedStorage._free_weak_ref(storage)


def test_what_fits():
    whole = torch.ones(4, 6)
    dense = [whole, whole.t(), whole[1:3], torch.ones(2, 3, 4).permute(2, 0, 1), torch.ones(0, 3)]
    dense += [torch.tensor(1.0), torch.nn.Parameter(whole)]
    unfit = [whole[:, 1:], whole[:, :1].expand(4, 3), whole[::2], whole.to(torch.complex64), whole.long()]
    unfit += [
        torch._neg_view(whole),
        torch._efficientzerotensor((3,)),
        whole.to("meta"),
        whole.to(torch.float8_e5m2),
        whole.as_subclass(type("Mine", (torch.Tensor,), {})),
    ]
    fitting, rest = native.split([*unfit[:4], *dense, *unfit[4:]])
    assert [id(tensor) for tensor in fitting] == [id(tensor) for tensor in dense]
    assert [id(tensor) for tensor in rest] == [id(tensor) for tensor in unfit]


@pytest.mark.parametrize("left", [0, 8])
@pytest.mark.parametrize("offset", [0, 1])
def test_a_tensor_whose_memory_was_freed_or_made_smaller(left, offset):
    freed = torch.ones(4)[offset:]
    freed.untyped_storage().resize_(left)
    with pytest.raises(ValueError, match=f"found a storage of {left} bytes: its storage was freed"):
        AddressTable.of([torch.ones(2), freed])
    assert AddressTable.of([torch.empty(0), torch.ones(2)]).total == 2
    with pytest.raises(ValueError, match="storage was freed"):
        native.statistic(AddressTable.of([torch.ones(2)]).at(np.array([0])), Kernel.SQUARES)


def test_dense_tensors_of_other_dim_orders():
    tensors = [
        random(24, torch.float32).view(4, 6).t(),
        random(120, torch.bfloat16).view(2, 3, 4, 5).permute(3, 0, 2, 1),
    ]
    assert found(tensors, Kernel.SQUARES) == pytest.approx(powers(tensors, Kernel.SQUARES), rel=1e-14)


def test_what_does_not_fit_is_left():
    fitting, unfit = torch.ones(3), torch.ones(4, 4)[:, :2]
    statistics, rest = measure([unfit, fitting], Kernel.SQUARES)
    assert [s.tolist() for s in statistics] == [[3.0]]
    assert len(rest) == 1 and rest[0] is unfit
    assert measure([unfit], Kernel.SQUARES) == ([], [unfit])


# ---- scaling


def by_torch(tensor: torch.Tensor, coef: float) -> torch.Tensor:
    """The coefficient in fp32 (fp64 for fp64); the product rounded to that, then to the dtype."""
    wide = torch.float64 if tensor.dtype is torch.float64 else torch.float32
    return (tensor.to(wide) * torch.tensor(coef, dtype=torch.float64).to(wide)).to(tensor.dtype)


COEFFICIENTS = (0.5, 0.1, 1 / 3, 0.9999999, 1e-3, 1e-30, 1e-41, 3.0, 1e30, 0.0, -0.7, math.inf, math.nan)


def scale_both_ways(tensor: torch.Tensor, coef: float) -> list[torch.Tensor]:
    ways = [tensor.clone(), tensor.clone()]
    native.scale_(AddressTable.of(ways[:1]), coef)
    eager.scale_(ways[1:], torch.tensor(coef, dtype=torch.float64))
    return ways


@pytest.mark.parametrize("dtype", SMALL, ids=str)
@pytest.mark.parametrize("coef", COEFFICIENTS)
def test_scaling_every_pattern_of_the_small_dtypes(dtype, coef):
    tensor = all_patterns(dtype)
    for scaled in scale_both_ways(tensor, coef):
        assert_same(scaled, by_torch(tensor, coef))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("coef", COEFFICIENTS)
def test_scaling_random_patterns_of_the_large_dtypes(dtype, coef):
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (100_000,), generator=torch.Generator().manual_seed(1))
    tensor = torch.cat(
        [words.view(dtype), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=dtype)]
    )
    for scaled in scale_both_ways(tensor, coef):
        assert_same(scaled, by_torch(tensor, coef))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling_changes_nothing_beside_the_rows(dtype):
    for size in SIZES:
        whole = random(size + 4, dtype)
        expected = torch.cat([whole[:3], by_torch(whole[3:-1], 0.3), whole[-1:]])
        native.scale_(AddressTable.of([whole[3:-1]]), 0.3)
        assert_same(whole, expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_scaling_many_rows_by_many_threads(monkeypatch, threads):
    monkeypatch.setattr(native, "_threads", lambda elements: threads)
    tensors = [random(1 + (i * 7919) % 9000, DTYPES[i % len(DTYPES)], seed=i) for i in range(300)]
    expected = [by_torch(tensor, 0.77) for tensor in tensors]
    scale_(tensors, torch.tensor(0.77, dtype=torch.float64))
    for tensor, one in zip(tensors, expected, strict=True):
        assert_same(tensor, one)


def test_a_tensor_given_twice_is_scaled_twice(monkeypatch):
    """As by torch: by one thread, or two would race for it."""
    asked = []
    monkeypatch.setattr(native, "_threads", lambda elements: asked.append(elements) or 2)
    tensor = torch.ones(1_000_000)
    table = AddressTable.of([tensor, tensor])
    assert table.overlap and not AddressTable.of(list(tensor.split(999))).overlap
    native.scale_(table, 0.5)
    assert asked == [2_000_000]
    assert (tensor == 0.25).all()


def test_scaling_is_seen_by_autograd():
    weight = torch.ones(3, requires_grad=True)
    held = torch.full((3,), 2.0)
    product = (weight * held).sum()
    scale_([held], torch.tensor(0.5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_coefficient_of_one_changes_no_bit():
    tensor = torch.tensor([math.nan, 1e-45, 1.0]).view(torch.int32) | 1
    before = tensor.clone()
    scale_([tensor.view(torch.float32)], torch.tensor(1.0))
    assert torch.equal(tensor, before)


def test_mixed_lists_are_scaled_whole():
    whole = torch.ones(4, 4)
    tensors = [
        torch.ones(3),
        whole[:, :2],
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2, dtype=torch.float16),
    ]
    scale_(tensors, torch.tensor(0.5, dtype=torch.float64))
    assert all((tensor == 0.5).all() for tensor in tensors)
    assert (whole[:, 2:] == 1).all()
