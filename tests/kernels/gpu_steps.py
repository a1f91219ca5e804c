"""Whole steps as a GPU makes them, by Triton's kernels; `test_gpu_steps.py` runs these in a process of their
own, in Triton's interpreter, which takes the CPU's memory for a GPU's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import distnorm
from distnorm.kernels import gpu_clip_code, gpu_code
from distnorm.measure.fast_path import FastPath, FoundGradients
from distnorm.measure.gradients import Gradients
from distnorm.plan.collectives import Ranks
from tests import oracle
from tests.counting import as_on_a_gpu, collectives_and_reads

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # numpy's, in the interpreter
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
KERNELS = {"partials": gpu_code, "totals": gpu_code, "scale": gpu_code, "clip": gpu_clip_code}
FIELDS = ("total_norm", "clip_coef", "clipped_norm", "threshold", "is_finite", "was_clipped", "skipped")


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels, as they are launched."""
    names: list[str] = []
    for name, module in KERNELS.items():
        monkeypatch.setattr(module, name, Counted(getattr(module, name), name, names))
    return names


class Counted:
    def __init__(self, kernel: Any, name: str, names: list[str]) -> None:
        self.kernel, self.name, self.names = kernel, name, names

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any) -> None:
            self.names.append(self.name)
            if self.kernel is not None:
                self.kernel[grid](*arguments)

        return launch


def parameters(*sizes: int, dtype: torch.dtype = torch.float32, sharded: bool = False) -> list[nn.Parameter]:
    made: list[Tensor] = [torch.zeros(size, dtype=dtype) for size in sizes]
    if sharded:
        mesh = init_device_mesh("cpu", (1,))
        made = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in made]
    return [nn.Parameter(tensor) for tensor in made]


def fill(found: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    """New gradients, in the memory of those of before if they have it."""
    generator = torch.Generator().manual_seed(seed)
    for p in found:
        new = torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale
        if p.grad is None:
            p.grad = torch.zeros_like(p).detach()
        local(p.grad).copy_(new)


def local(gradient: Any) -> Tensor:
    tensor: Tensor = getattr(gradient, "_local_tensor", gradient)
    return tensor


def gradients(found: list[nn.Parameter]) -> list[Tensor]:
    return [local(p.grad).clone() for p in found if p.grad is not None]


@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "DTensor"])
def test_steps_are_right_by_three_launches(launched, sharded):
    found = parameters(3, 700, 0, 5000, 1, sharded=sharded)
    with as_on_a_gpu():
        clipper = distnorm.GradClipper(found, {"clip": {"max_norm": 0.5}})
        for seed in range(4):
            fill(found, seed)
            before, expected = gradients(found), oracle.dense_of(gradients(found))
            launched.clear()
            result = clipper.clip()
            assert seed == 0 or launched == ["partials", "totals", "clip"]
            assert float(result.total_norm) == pytest.approx(expected, rel=1e-14)
            coef = torch.tensor(0.5 / (expected + 1e-6), dtype=torch.float64)
            for new, old in zip(gradients(found), before, strict=True):
                assert torch.allclose(new, old * coef.float(), rtol=1e-7, atol=0)
        clipper.flush()


def test_no_operator_but_the_results_and_no_wait(launched, monkeypatch):
    found = parameters(*[7] * 40)
    with as_on_a_gpu():
        clipper = distnorm.GradClipper(found, {"clip": {"max_norm": 0.5, "nonfinite": "skip"}})
        for seed in range(3):
            fill(found, seed)
            clipper.clip()
        for name, module in KERNELS.items():  # the interpreter uses operators itself
            monkeypatch.setattr(module, name, Counted(None, name, launched))
        seen: list[str] = []
        with Operators(seen):
            clipper.clip()
        assert set(seen) <= {"aten::empty.memory_format", "aten::unbind.int", "aten::slice.Tensor"}
        assert seen.count("aten::empty.memory_format") == 3
        assert collectives_and_reads(clipper.clip) == ({}, {})


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("moves", ["all", "one", "none"])
def test_moved_gradients_are_found_where_they_are(launched, moves, monkeypatch):
    careful = mock.Mock(wraps=FastPath.of)
    monkeypatch.setattr(FastPath, "of", careful)
    found, kept = parameters(40, 5000, 3), []
    with as_on_a_gpu():
        clipper = distnorm.GradClipper(found, {"clip": {"max_norm": 0.5}})
        for seed in range(4):
            for p in {"all": found, "one": found[1:2], "none": []}[moves]:
                kept.append(p.grad)  # so that its address isn't taken again
                p.grad = None
            fill(found, seed)
            expected = oracle.dense_of(gradients(found))
            assert float(clipper.clip().total_norm) == pytest.approx(expected, rel=1e-14)
            assert oracle.dense_of(gradients(found)) == pytest.approx(0.5, rel=1e-6)
    assert careful.call_count == 1


@pytest.mark.parametrize(("bad", "measures"), [(math.nan, False), (math.inf, True)])
def test_a_bad_step_is_zeroed_and_raised_by_name_in_the_next(launched, bad, measures):
    found = [(name, p) for name, p in zip("abc", parameters(5, 5000, 9), strict=True)]
    with as_on_a_gpu():
        clipper = distnorm.GradClipper(found, {"clip": {"max_norm": 0.5}})
        for seed in range(3):
            fill([p for _, p in found], seed)
            if seed == 2:
                local(found[1][1].grad)[4321] = bad
            result = clipper.clip()
        assert not bool(result.is_finite) and bool(result.skipped) and float(result.clipped_norm) == 0
        assert all(not gradient.any() for gradient in gradients([p for _, p in found]))
        fill([p for _, p in found], 5)
        if measures:  # which leaves the numbers of the bad step alone
            assert math.isfinite(float(clipper.measure().total_norm))
        before = gradients([p for _, p in found])
        with pytest.raises(distnorm.NonFiniteGradientError, match=r"step 3: .*'b'"):
            clipper.clip()
        assert all(map(torch.equal, gradients([p for _, p in found]), before))
        clipper.clip()


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_one_kernel_does_what_the_operators_do_bit_for_bit(data):
    """The same gradients, the same all-reduced vector; whatever other ranks may have added to it."""
    mode = data.draw(st.sampled_from(["raise", "skip", "zero", "propagate"]))
    threshold = data.draw(st.sampled_from([None, 0.0, 0.3, 1e4, 1e-30]))
    scale = data.draw(st.sampled_from([1.0, 1e-20, 1e18, 0.0]))
    odd = data.draw(st.sampled_from([0, 0, 0, 1, 12345]))  # in the header: ranks don't agree
    bad = data.draw(st.sampled_from([None, None, math.nan, math.inf]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    order = data.draw(st.sampled_from([1.0, 2.0]))
    ways = []
    for at_once in (True, False):
        found = parameters(5, 2000, 3, dtype=dtype)
        with as_on_a_gpu():
            clipper = distnorm.GradClipper(
                found, {"norm": {"type": order}, "clip": {"max_norm": threshold, "nonfinite": mode}}
            )
            fill(found, 0)
            clipper.clip()
            fill(found, 1, scale)
            if bad is not None:
                local(found[1].grad)[100] = bad
            clip_ = FoundGradients.clip_ if at_once else Gradients.clip_
            with (
                mock.patch.object(FoundGradients, "clip_", clip_),
                mock.patch.object(Ranks, "all_reduce_", Meddled(odd)),
            ):
                result = clipper.clip()
        ways.append(([getattr(result, field) for field in FIELDS], gradients(found)))
    for (values, after), (values_again, after_again) in [ways]:
        for field, one, other in zip(FIELDS, values, values_again, strict=True):
            assert one.dtype == other.dtype and one.shape == other.shape == ()
            assert torch.equal(one, other) or bool(one.isnan() & other.isnan()), field
        for one, other in zip(after, after_again, strict=True):
            assert torch.equal(one.isnan(), other.isnan())
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


class Meddled:
    def __init__(self, odd: int) -> None:
        self.odd = odd

    def __get__(self, ranks: Any, kind: Any) -> Any:
        def all_reduce_(tensor: Tensor, op: str) -> Tensor:
            tensor[0] += self.odd
            return tensor

        return all_reduce_


def replicas_that_differ(by: float) -> list[Any]:
    """Two ranks with a copied parameter among sharded ones; from the third step on one copy is off."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placed = ([Shard(0)], [Replicate()], [Shard(0)])
    tensors = [distribute_tensor(torch.zeros(6, 5), mesh, placements) for placements in placed]
    found, results = [nn.Parameter(tensor) for tensor in tensors], []
    with as_on_a_gpu():
        clipper = distnorm.GradClipper(found, {"clip": {"max_norm": 0.5, "nonfinite": "skip"}})
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            for p, placements in zip(found, placed, strict=True):
                whole = torch.randn(6, 5, generator=generator)
                p.grad = distribute_tensor(whole, mesh, placements)
            if seed >= 2 and dist.get_rank() == 1:
                local(found[1].grad).mul_(1 + by)
            results.append(clipper.clip().to_dict())
    return results


@pytest.mark.parametrize("by", [0.0, 1e-7, 0.5])
def test_replicas_are_compared_in_every_step(ranks, by):
    expected = [
        math.sqrt(sum(torch.randn(6, 5, generator=g).double().square().sum().item() for _ in range(3)))
        for g in (torch.Generator().manual_seed(seed) for seed in range(4))
    ]
    for results in ranks(2, replicas_that_differ, by, timeout=240):
        for seed, result in enumerate(results):
            is_bad = by > 1e-3 and seed >= 2
            assert result["is_finite"] != is_bad and result["skipped"] == is_bad
            assert is_bad or result["total_norm"] == pytest.approx(expected[seed], rel=1e-6)
