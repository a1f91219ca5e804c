"""Steps whose gradients lie as before are read without care; whatever else happens to them is noticed."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import distnorm
from distnorm.measure.fast_path import FastPath
from tests import oracle

CLIP = {"clip": {"max_norm": 0.5, "nonfinite": "propagate"}}


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]


def fill(found: list[nn.Parameter], seed: int) -> None:
    """New gradients, in new memory."""
    generator = torch.Generator().manual_seed(seed)
    for p in found:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def dense(found: list[nn.Parameter]) -> float:
    return oracle.dense_of([p.grad for p in found if p.grad is not None])


@pytest.fixture
def count_careful(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one with every careful reading that led to a new `FastPath`."""
    calls: list[None] = []
    original = FastPath.of.__func__

    def counted(cls: type[FastPath], *args: Any) -> FastPath | None:
        calls.append(None)
        return original(cls, *args)

    monkeypatch.setattr(FastPath, "of", classmethod(counted))
    return calls


def clipped_rightly(clipper: distnorm.GradClipper, found: list[nn.Parameter]) -> None:
    before = [None if p.grad is None else p.grad.clone() for p in found]
    expected = dense(found)
    result = clipper.clip()
    assert float(result.total_norm) == pytest.approx(expected, rel=1e-12)
    coef = min(1.0, 0.5 / (expected + 1e-6))
    for p, old in zip(found, before, strict=True):
        assert (p.grad is None) == (old is None)
        if old is not None:
            assert torch.equal(p.grad, old * torch.tensor(coef, dtype=torch.float64).float().to(old.dtype))


def test_later_steps_are_read_without_care_and_rightly(count_careful):
    found = parameters((3, 4), (7,), (), (0, 2), (5, 5))
    clipper = distnorm.GradClipper(found, CLIP)
    for seed in range(5):
        fill(found, seed)
        clipped_rightly(clipper, found)
    assert len(count_careful) == 1


def changes() -> dict[str, Any]:
    def missing(found: list[nn.Parameter]) -> None:
        found[1].grad = None

    def strided(found: list[nn.Parameter]) -> None:
        found[0].grad = torch.randn(4, 3).t()

    def overlapping(found: list[nn.Parameter]) -> None:
        found[0].grad = torch.ones(1, 1).expand(3, 4)

    def converted(found: list[nn.Parameter]) -> None:
        for p in found:
            p.grad = None
            p.data = p.data.double()
        fill(found, 9)

    def subclass(found: list[nn.Parameter]) -> None:
        found[2].grad = torch.nn.Parameter(torch.randn(5, 5), requires_grad=False)

    return {f.__name__: f for f in (missing, strided, converted, subclass)} | {"expanded": overlapping}


@pytest.mark.parametrize("change", changes().values(), ids=changes().keys())
def test_whatever_changes_is_noticed_and_measured_rightly(change):
    found = parameters((3, 4), (7,), (5, 5))
    clipper = distnorm.GradClipper(found, {"clip": {"nonfinite": "propagate"}})
    for seed in range(3):
        fill(found, seed)
        clipper.clip()
    change(found)
    assert float(clipper.clip().total_norm) == pytest.approx(dense(found), rel=1e-12)
    fill(found, 20)
    assert float(clipper.clip().total_norm) == pytest.approx(dense(found), rel=1e-12)


def test_a_sparse_gradient_is_refused_later_too():
    found = parameters((4, 2))
    clipper = distnorm.GradClipper(found, {"clip": {"nonfinite": "propagate"}})
    for seed in range(2):
        fill(found, seed)
        clipper.clip()
    found[0].grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(distnorm.UnsupportedGradientError, match="parameter '0': expected a dense gradient"):
        clipper.clip()


def test_a_parameter_that_is_replaced_or_added_is_measured():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    clipper = distnorm.GradClipper(model, CLIP)
    for step in range(4):
        if step == 1:
            model[0].weight = nn.Parameter(torch.zeros(2, 3))
        if step == 2:
            model.append(nn.Linear(2, 1))
        if step == 3:
            del model[0]
        found = list(model.parameters())
        fill(found, step)
        clipped_rightly(clipper, found)


@pytest.mark.parametrize("later", [float("nan"), float("inf")])
def test_a_later_step_that_is_not_finite_is_raised_with_its_parameter(later: float):
    model = nn.Linear(3, 2)
    clipper = distnorm.GradClipper(model, {"clip": {"max_norm": 1.0}})
    for _ in range(3):
        fill(list(model.parameters()), 0)
        clipper.clip()
    model.bias.grad[1] = later
    with pytest.raises(distnorm.NonFiniteGradientError, match="bias"):
        clipper.clip()


def test_autograd_is_told_of_the_change():
    found = parameters((3,))
    clipper = distnorm.GradClipper(found, CLIP)
    for _ in range(3):
        fill(found, 1)
        clipper.clip()
    fill(found, 1)
    weight = torch.ones(3, requires_grad=True)
    product = (weight * found[0].grad).sum()
    clipper.clip()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_nothing_is_kept_alive():
    found = parameters((3,), (4,))
    clipper = distnorm.GradClipper(found, CLIP)
    for seed in range(3):
        fill(found, seed)
        result = clipper.clip()
    gradients = [weakref.ref(p.grad) for p in found]
    for p in found:
        p.grad = None
    gc.collect()
    assert [ref() for ref in gradients] == [None, None]
    assert result.total_norm > 0


def test_the_function_reads_the_same_list_again_and_keeps_no_model_alive(count_careful):
    found = parameters((3, 4), (7,))
    for seed in range(4):
        fill(found, seed)
        expected = dense(found)
        assert float(distnorm.clip_grad_norm_(found, 0.5)) == pytest.approx(expected, rel=1e-6)
        assert dense(found) == pytest.approx(0.5, rel=1e-5)
    assert len(count_careful) == 1
    alive = [weakref.ref(p) for p in found]
    del found
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_the_function_knows_a_module_again_and_keeps_it_not_alive(count_careful):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    for step in range(4):
        if step == 2:
            model.append(nn.Linear(2, 1))
        found = list(model.parameters())
        fill(found, step)
        expected = dense(found)
        assert float(distnorm.clip_grad_norm_(model, 0.5)) == pytest.approx(expected, rel=1e-6)
        assert dense(found) == pytest.approx(0.5, rel=1e-5)
    assert len(count_careful) == 2, "of the model as it was, and as it is"
    alive = [weakref.ref(model), weakref.ref(found[0])]
    del model, found
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def fsdp2_steps(world: int) -> list[tuple[float, float, int]]:
    """Norm by distnorm, by all gathered gradients in fp64, and careful readings so far, of each step."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (world,))
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 1, bias=False))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    clipper = distnorm.GradClipper(model, {"clip": {"nonfinite": "propagate"}})
    careful: list[None] = []
    original = FastPath.of.__func__
    FastPath.of = classmethod(lambda cls, *args: (careful.append(None), original(cls, *args))[1])  # type: ignore
    steps = []
    for step in range(6):
        model.zero_grad()
        model(torch.randn(2, 7) * 10**step).square().sum().backward()
        if step == 3:  # a gradient of the caller's own, in other memory
            weight = model[2].weight
            weight.grad = distribute_tensor(torch.full((3, 5), 2.0), mesh, [Shard(0)])
        if step == 4:
            model[3].weight.grad = None
        whole = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]
        found = float(clipper.clip().total_norm)
        steps.append((found, oracle.dense_of(whole), len(careful)))
    return steps


def test_fsdp2_is_read_without_care_but_for_what_changes(ranks):
    for steps in ranks(2, fsdp2_steps, 2):
        for found, expected, _ in steps:
            assert found == pytest.approx(expected, rel=1e-6)
        assert [careful for _, _, careful in steps[:3]] == [1, 1, 1]
        assert steps[5][2] > steps[3][2], "a missing gradient is looked at with care"


def replaced_local_tensor() -> tuple[float, float]:
    mesh = init_device_mesh("cpu", (1,))
    p = nn.Parameter(distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)]))
    clipper = distnorm.GradClipper([p], {"clip": {"nonfinite": "propagate"}})
    for value in (1.0, 2.0, 3.0):
        p.grad = DTensor.from_local(torch.full((4, 2), value), mesh, [Shard(0)])
        total: Tensor = clipper.clip().total_norm
    p.grad = DTensor.from_local(torch.full((2, 4), 5.0).t(), mesh, [Shard(0)])
    return float(total), float(clipper.clip().total_norm)


def test_a_dtensor_with_other_strides_is_looked_at(ranks):
    assert ranks(1, replaced_local_tensor) == [(pytest.approx(3 * 8**0.5), pytest.approx(5 * 8**0.5))]


def norms_of_mixed_classes() -> list[tuple[float, float]]:
    """Of each seed the norm by a careful reading, and that of the same gradients by their addresses."""
    mesh, norms = init_device_mesh("cpu", (1,)), []
    for seed in range(20):
        found = parameters(*((97 + 31 * i,) for i in range(6)))
        for i in range(0, 6, 2):  # every other one is a DTensor
            found[i] = nn.Parameter(distribute_tensor(found[i].detach(), mesh, [Shard(0)]))
        generator = torch.Generator().manual_seed(seed)
        for p in found:
            gradient = torch.randn(p.shape, generator=generator)
            p.grad = distribute_tensor(gradient, mesh, [Shard(0)]) if isinstance(p, DTensor) else gradient
        clipper = distnorm.GradClipper(found)
        norms.append((clipper.measure().total_norm.item(), clipper.measure().total_norm.item()))
    return norms


def test_gradients_of_two_classes_have_the_bits_of_a_careful_reading(ranks):
    for careful, fast in ranks(1, norms_of_mixed_classes)[0]:
        assert careful == fast
