"""Triton's statistics of tensors, rows and samples against dense fp64, and against the CPU's bit for bit;
launches, counted. `test_triton.py` runs these in a process of their own, as it does `triton_cases.py`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import GridExecutor

import distnorm
from distnorm import kernels
from distnorm.config import MonitorConfig
from distnorm.kernels import (
    AddressTable,
    Kernel,
    eager,
    gpu,
    gpu_code,
    gpu_statistics,
    gpu_statistics_code,
    native,
    sampling,
)
from distnorm.measure.norms import norm
from distnorm.measure.replica_check import ReplicaCheck
from distnorm.monitor.snapshot import LayerSnapshot
from distnorm.payload.finite_loss import LossFiniteness
from tests import oracle
from tests.kernels.triton_cases import (
    BITS,
    CHUNK,
    COEFFICIENTS,
    DEVICE,
    DTYPES,
    EXTREMES,
    SIZES,
    assert_all_same,
    assert_same,
    by_torch,
    mixed,
    random,
    table,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # numpy's, in the interpreter
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
INTERPRETED = DEVICE.type == "cpu"
quickly = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


def expected(tensor: torch.Tensor, kernel: Kernel) -> list[float]:
    wide = np.abs(oracle.as_numpy(tensor.cpu())).reshape(-1)
    largest = float(wide.max(initial=0.0))  # NaN if an element is NaN
    sums = wide**2 if kernel is Kernel.SQUARES else wide
    finite = np.isfinite(wide).all()
    statistic = largest if kernel is Kernel.LARGEST or not finite else math.fsum(sums.tolist())
    return [statistic, largest, float((wide == 0).sum()), float((~np.isfinite(wide)).sum())]


def assert_summaries(tensors: list[torch.Tensor], kernel: Kernel) -> None:
    found = gpu_statistics.summaries(table(tensors), kernel)
    assert (found.dtype, found.shape) == (torch.float64, (len(tensors), 4))
    for row, tensor in zip(found.tolist(), tensors, strict=True):
        assert row == pytest.approx(expected(tensor, kernel), rel=1e-13, abs=0, nan_ok=True)


@st.composite
def tensors_of(draw: st.DrawFn, most: int = 6) -> list[torch.Tensor]:
    """Any dtypes, sizes and addresses; some elements are extreme, and some are zeros."""
    made = []
    for i in range(draw(st.integers(1, most))):
        size, start = draw(st.sampled_from([*SIZES[:7], 63, 64, 65, 200])), draw(st.integers(0, 9))
        tensor = random(size + start, draw(st.sampled_from(DTYPES)), seed=i)[start:]
        for place in draw(st.lists(st.integers(0, max(size - 1, 0)), max_size=4)) if size else ():
            tensor[place] = draw(st.sampled_from([*EXTREMES, -3.0]))
        made.append(tensor)
    return made


# ---- several statistics of each tensor


@pytest.mark.parametrize("kernel", Kernel)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_summaries_of_every_size_and_alignment(dtype, kernel):
    whole = random(SIZES[-1] + 8, dtype)
    whole[::5] = 0
    assert_summaries([whole[i % 8 : i % 8 + size] for i, size in enumerate(SIZES)], kernel)
    assert_summaries([whole[:size] for size in SIZES], kernel)


@pytest.mark.parametrize("kernel", Kernel)
@given(tensors=tensors_of())
@quickly
def test_summaries_of_anything(kernel, tensors):
    assert_summaries(tensors, kernel)


def test_summaries_of_nothing():
    assert gpu_statistics.summaries(table([]), Kernel.SQUARES).shape == (0, 4)
    empty = table([random(0, torch.float32), random(0, torch.float16)])
    assert gpu_statistics.summaries(empty, Kernel.LARGEST).tolist() == [[0.0] * 4] * 2


# ---- samples


def by_cpu(tensors: list[torch.Tensor]) -> torch.Tensor:
    here = [tensor.cpu().clone() for tensor in tensors]
    found = sampling._by_torch(here)
    if native.library() is not None:
        compiled = native.samples(AddressTable.of(here), sampling._SIGNS)
        assert_same(found, compiled)
    return found


def assert_samples(tensors: list[torch.Tensor]) -> None:
    assert_same(gpu_statistics.samples(table(tensors), sampling._SIGNS).cpu(), by_cpu(tensors))


def test_samples_have_the_bits_of_the_cpu():
    sizes = (0, 1, 5, 16, 17, 63, 64, 65, 66, 67, 100, 1000, 3 * CHUNK + 17, 70_001)
    for dtypes in (DTYPES, DTYPES[1:], DTYPES[2:3]):  # the chunks of a dtype begin elsewhere
        tensors = [random(size + 3, dtype, size)[size % 4 :][:size] for size in sizes for dtype in dtypes]
        assert_samples([tensor * 10.0 ** (i % 7 - 3) for i, tensor in enumerate(tensors)])


@given(tensors=tensors_of())
@quickly
def test_samples_of_anything(tensors):
    assert_samples(tensors)


def test_samples_of_nothing():
    assert gpu_statistics.samples(table([]), sampling._SIGNS).shape == (0, 2)
    assert gpu_statistics.samples(table([random(0, torch.float64)]), sampling._SIGNS).tolist() == [[0.0, 0.0]]


# ---- rows

SHAPES = (
    *((3, 5), (40, 33, 2), (1, 7), (5, 1), (3, 0), (0, 3), (7,), (130, 16), (70, 17), (9, 128), (9, 129)),
    *((5, 2048), (3, CHUNK), (2, CHUNK + 1), (2, 3 * CHUNK + 17), (1, 2 * CHUNK)),
)


def matrices() -> list[torch.Tensor]:
    return [
        random(math.prod(shape) + 3, dtype, i)[i % 4 :][: math.prod(shape)].view(shape)
        for i, shape in enumerate(SHAPES)
        for dtype in DTYPES
    ]


def test_squares_of_rows():
    tensors = matrices()
    tensors[5][1, 1], tensors[60][0, 5] = math.nan, -math.inf
    rows = [one.reshape(-1) for t in tensors for one in t]
    exact = [expected(row, Kernel.SQUARES)[0] for row in rows]
    found = gpu_statistics.rows_of(tensors).squares()
    assert found.tolist() == pytest.approx(exact, rel=1e-13, abs=0, nan_ok=True)
    assert torch.equal(
        gpu_statistics.rows_of([t.clone() for t in tensors[:4]]).squares().cpu(), found[:12].cpu()
    )


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_each_row_has_its_own_coefficient():
    tensors = matrices()
    count = sum(map(len, tensors))
    coefs = [COEFFICIENTS[i % len(COEFFICIENTS)] if i % 3 else 1.0 for i in range(count)]
    factors = torch.tensor(coefs, dtype=torch.float64, device=DEVICE)
    peers, scaled, left = [t.clone() for t in tensors], [], iter(coefs)
    for tensor in tensors:
        rows = [(row, next(left)) for row in tensor]
        parts = [row.clone() if coef == 1 else by_torch(row, coef) for row, coef in rows]
        scaled.append(torch.stack(parts) if parts else tensor)
    gpu_statistics.rows_of(tensors).scale_(factors)
    eager.scale_rows_(peers, factors)
    assert_all_same(tensors, scaled)
    assert_all_same(peers, scaled)


@pytest.mark.parametrize("width", [5, 100, 2 * CHUNK])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling_rows_changes_nothing_else(dtype, width):
    """Not the neighbours in memory, nor, by a coefficient of 1, the bits of a NaN that signals."""
    whole = torch.full((4 * width + 3,), math.inf, dtype=dtype).view(BITS[dtype.itemsize]).add_(1).to(DEVICE)
    before, part = whole.clone(), whole.view(dtype)[1 : 3 * width + 1].view(3, width)
    part[1] = 0.5
    coefs = torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64, device=DEVICE)
    gpu_statistics.rows_of([part]).scale_(coefs)
    before.view(dtype)[1 + width : 1 + 2 * width] = 0.25
    assert torch.equal(whole, before)


def test_tables_of_rows_are_made_anew_only_if_something_moved():
    tensors = [random(12, torch.float32).view(3, 4), random(6, torch.bfloat16).view(2, 3)]
    first = gpu_statistics.rows_of(tensors)
    assert gpu_statistics.rows_of(list(tensors)) is first
    assert gpu_statistics.rows_of([tensors[0].view(4, 3), tensors[1]]) is not first
    assert gpu_statistics.rows_of([tensor.clone() for tensor in tensors]) is not first


def test_rows_beyond_32_bits(monkeypatch):
    """The places are made up: nothing is read."""
    monkeypatch.setattr(
        gpu_statistics.AddressTable,
        "of",
        lambda tensors: AddressTable(
            DEVICE,
            np.array([1 << 40, 1 << 44]),
            np.array([3 << 32, 2 << 33]),
            np.array([2, 0], dtype=np.int32),
            np.zeros(2, dtype=np.int64),
        ),
    )
    made = gpu_statistics.RowTable([range(3), range(1 << 20)])  # type: ignore[list-item]
    programs = made._table.cpu().numpy()
    assert len(programs) < 1 << 15
    elements = programs[:, 1] * programs[:, 2]
    assert elements.max() < 1 << 31
    for base, size, numel in ((1 << 40, 2, 3 << 32), (1 << 44, 4, 2 << 33)):
        mine = (programs[:, 0] >= base) & (programs[:, 0] < 2 * base)
        order = np.argsort(programs[mine, 0])
        ends = programs[mine, 0][order] + elements[mine][order] * size
        assert programs[mine, 0].min() == base and ends[-1] == base + numel * size
        assert (ends[:-1] == programs[mine, 0][order][1:]).all(), "each element once"
    cut = made._cut.cpu().numpy()
    assert cut[:, 2].tolist() == [0, 1, 2] and (cut[1:, 0] == cut[:-1, 1]).all()
    assert (cut[0, 0], cut[-1, 1]) == (made.count, made.length)
    places = np.concatenate([np.arange(p, p + r) for _, r, _, p, _ in programs])
    assert sorted(places) == list(range(3, made.length)), "each result has its own place"


# ---- as callers reach them

KERNELS = [
    kernel
    for module in (gpu_code, gpu_statistics_code)
    for name, kernel in vars(module).items()
    if hasattr(kernel, "add_pre_run_hook") and not name.startswith("_")
]


@pytest.fixture
def launched(monkeypatch):
    """The name of each launch. What is dense counts as a GPU's; each launch does its work."""
    names: list[str] = []
    if INTERPRETED:
        monkeypatch.setattr(gpu, "usable", lambda device: True)
        monkeypatch.setattr(native, "split", lambda tensors: ([], list(tensors)))
    for kernel in KERNELS:

        def hook(*arguments: object, name: str = kernel.fn.__name__, **named: object) -> None:
            names.append(name)

        monkeypatch.setattr(kernel, "pre_run_hooks", [hook])
    return names


@pytest.fixture
def counted(launched, monkeypatch):
    """The name of each launch, none of which does anything."""
    if INTERPRETED:

        def only_count(executor: GridExecutor, *arguments: object, **named: object) -> None:
            launched.append(executor.fn.__name__)

        monkeypatch.setattr(GridExecutor, "__call__", only_count)
    return launched


def test_launches_for_3000_tensors_of_one_dtype(counted):
    tensors = [torch.ones(1 + i % 7, 2 + i % 3, device=DEVICE) for i in range(3000)]
    coefs = torch.rand(3000, dtype=torch.float64, device=DEVICE)
    rows = torch.rand(sum(map(len, tensors)), dtype=torch.float64, device=DEVICE)

    def launches(call: Callable[[], object]) -> list[str]:
        counted.clear()
        call()
        return list(counted)

    assert launches(lambda: norm(2).statistic(tensors, DEVICE)) == ["partials", "totals"]
    summed = launches(lambda: kernels.summaries(tensors, Kernel.SQUARES))
    assert summed == ["summary_parts", "summary_totals"]
    assert launches(lambda: kernels.scale_(tensors, coefs[0])) == ["scale"]
    assert launches(lambda: kernels.scale_each_(tensors, coefs)) == ["scale_each"]
    assert launches(lambda: kernels.zero_unless_(tensors, coefs[0] > 2)) == ["zero_unless"]
    assert launches(lambda: kernels.clamp_(tensors, 0.5)) == ["clamp"]
    assert launches(lambda: kernels.samples_of(tensors)) == ["samples"]
    assert launches(lambda: kernels.row_squares(tensors)) == ["row_squares"]
    assert launches(lambda: kernels.scale_rows_(tensors, rows)) == ["scale_rows"]
    both = [*tensors, torch.ones(3, device=DEVICE, dtype=torch.float64)]
    assert len(launches(lambda: kernels.summaries(both, Kernel.SQUARES))) == 3
    assert len(launches(lambda: kernels.samples_of(both))) == 1, "of all dtypes"


def test_launches_of_a_monitored_step(counted):
    """Gradients and weights are summarised together."""
    model = torch.nn.ParameterList(torch.ones(3, 1 + i, device=DEVICE) for i in range(300))
    for weight in model:
        weight.grad = torch.ones_like(weight)
    meter = distnorm.GradClipper(model)._step.meter
    held = (meter.ranks, norm(2), meter.shards, meter.shares)
    snapshot = LayerSnapshot(MonitorConfig(every=1), *held, LossFiniteness())
    counted.clear()
    snapshot.local([weight.grad for weight in model], DEVICE)
    assert counted == ["summary_parts", "summary_totals"]


def test_all_replicas_are_compared_in_every_step(counted, monkeypatch):
    monkeypatch.setattr(gpu, "usable", lambda device: True)
    gradients = [random(70 + i, torch.bfloat16) for i in range(30)]
    one, weights = np.arange(30), np.ones(30)
    check = ReplicaCheck(one, weights, one, one, unread_tolerance=0.0, turns=10)
    asked: list[int] = []
    samples_of = kernels.samples_of
    monkeypatch.setattr(kernels, "samples_of", lambda given: asked.append(len(given)) or samples_of(given))
    for _ in range(2):
        check.of_tensors(gradients, DEVICE)
    assert asked == [30, 30] and counted == ["samples"] * 2


def company() -> list[torch.Tensor]:
    """Some that the kernels take, and some that they leave to torch."""
    made = mixed(12)
    return [*made, random(40, torch.float32).view(8, 5)[:, ::2], made[7].to(torch.complex64), *mixed(3)]


def test_other_tensors_are_left_to_torch(launched):
    tensors = company()
    for call, mine in (
        (lambda: kernels.summaries(tensors, Kernel.SQUARES), [eager_summary(t) for t in tensors]),
        (lambda: kernels.samples_of(tensors), sampling._by_torch(tensors).tolist()),
    ):
        found = call()
        for row, other in zip(found.tolist(), mine, strict=True):
            assert row == pytest.approx(other, rel=1e-13)
    assert set(launched) == {"summary_parts", "summary_totals", "samples"}
    wide = [t.reshape(1, -1) for t in tensors]
    squares = [float(eager.row_squares(t)) for t in wide]
    assert kernels.row_squares(wide).tolist() == pytest.approx(squares, rel=1e-13)
    assert "row_squares" in launched


def eager_summary(tensor: torch.Tensor) -> list[float]:
    return eager.summary(tensor, Kernel.SQUARES).tolist() if tensor.numel() else [0.0] * 4


@pytest.mark.parametrize("name", ["scale_each_", "scale_rows_", "clamp_", "zero_unless_", "scale_"])
def test_changes_of_any_company(launched, name):
    tensors = company()
    tensors = [t if t.dim() > 1 else t.view(1, -1) for t in tensors]
    peers = [tensor.clone() for tensor in tensors]
    versions = [tensor._version for tensor in tensors]
    last = {
        "scale_each_": torch.rand(len(tensors), dtype=torch.float64, device=DEVICE),
        "scale_rows_": torch.rand(sum(map(len, tensors)), dtype=torch.float64, device=DEVICE),
        "clamp_": 0.5,
        "zero_unless_": torch.tensor(False, device=DEVICE),
        "scale_": torch.tensor(0.3, dtype=torch.float64, device=DEVICE),
    }[name]
    getattr(kernels, name)(tensors, last)
    getattr(eager, name)(peers, last)
    assert {name.rstrip("_")} == set(launched)
    for tensor, peer, version in zip(tensors, peers, versions, strict=True):
        assert torch.equal(tensor, peer) and (tensor._version > version or not tensor.numel())


@pytest.mark.parametrize("name", ["scale_each_", "scale_rows_"])
def test_tensors_that_overlap_are_left_to_torch(launched, name):
    """Programs would race for what two of them multiply."""
    flat = torch.ones(9, device=DEVICE)
    half = torch.full((2,), 0.5, dtype=torch.float64, device=DEVICE)
    getattr(kernels, name)([flat[:5].view(1, 5), flat[4:].view(1, 5)], half)
    assert not launched and flat.tolist() == [0.5] * 4 + [0.25] + [0.5] * 4
