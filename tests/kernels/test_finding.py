"""Gradients found again by compiled C++ and by Python's attributes alike, and never where one is odd."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from distnorm.kernels import Finder, Found, walking

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WAYS = ("compiled", "attributes")


def compiled() -> Any:
    found = walking._kept() or walking._load(compiles=True)
    if found is None:
        pytest.skip("there is no C++ compiler here, or no header of Python's")
    return found


def finder_of(holders: list[nn.Parameter], way: str) -> Finder:
    finder = Finder([p.grad for p in holders])
    finder._asks = False
    if way == "compiled":
        finder._take(compiled())
        assert finder._compiled is not None
    return finder


def parameters(count: int = 40) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.ones(3, i + 1, dtype=DTYPES[i % 4])) for i in range(count)]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape).to(parameter.dtype)
    return made


def addresses(found: Found | None) -> list[int] | None:
    return None if found is None else found.addresses.tolist()


def set_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Also one that torch would refuse: frameworks get round that."""
    parameter.grad = None
    if gradient.dtype is not parameter.dtype or gradient.shape != parameter.shape:
        parameter.data = torch.empty(gradient.shape, dtype=gradient.dtype)
    parameter.grad = gradient


@pytest.mark.parametrize("way", WAYS)
def test_the_same_gradients_are_found_step_after_step(way):
    holders = parameters()
    holders.append(nn.Parameter(torch.ones(0, 3)))
    holders[-1].grad = torch.ones(0, 3)
    finder = finder_of(holders, way)
    for _ in range(2):
        for given in (holders, tuple(holders)):
            found = finder(given)
            assert addresses(found) == [p.grad.data_ptr() for p in holders]
            assert all(t is p.grad for t, p in zip(found.tensors(), holders, strict=True))
        for p in holders:
            p.grad = p.grad.clone()
    assert finder(holders[:-1]) is None
    assert finder_of([], way)([]).tensors() == []


class Dispatching(Tensor):
    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Overriding(Tensor):
    """No dispatch key of C++ tells of it."""


def resized(gradient: Tensor, size: int) -> Tensor:
    gradient.untyped_storage().resize_(size)
    return gradient


def freed_behind_a_view(gradient: Tensor) -> Tensor:
    view = torch.zeros(4, *gradient.shape, dtype=gradient.dtype)[2]
    return resized(view, 0)


ODD: dict[str, Callable[[Tensor], Tensor | None]] = {
    "none": lambda g: None,
    "size": lambda g: torch.zeros(g.numel() + 1, dtype=g.dtype),
    "dtype": lambda g: g.double() if g.dtype is not torch.float64 else g.float(),
    "another dtype in the same memory": lambda g: g.view(
        torch.bfloat16 if g.dtype is torch.float16 else torch.float16
    ),
    "strides": lambda g: torch.zeros(3, g.shape[1] * 2, dtype=g.dtype)[:, ::2],
    "expanded": lambda g: torch.ones((), dtype=g.dtype).expand(3, max(2, g.shape[1])),
    "transposed": lambda g: torch.zeros(g.shape[1] + 1, 3, dtype=g.dtype).t(),
    "dispatching": lambda g: Tensor._make_subclass(Dispatching, g.clone()),
    "overriding": lambda g: g.clone().as_subclass(Overriding),
    "parameter": lambda g: nn.Parameter(g.clone()),
    "negated": lambda g: torch._neg_view(g),
    "zero": lambda g: torch._efficientzerotensor(g.shape, dtype=g.dtype),
    "freed": lambda g: resized(g, 0),
    "made smaller": lambda g: resized(g, g.nbytes - 1),
    "freed behind a view": freed_behind_a_view,
    "copied on write": lambda g: torch._lazy_clone(g),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("which", [0, 17, 39])
@pytest.mark.parametrize("odd", ODD)
def test_what_is_odd_is_left_to_careful_reading(way, which, odd):
    holders = parameters()
    finder = finder_of(holders, way)
    gradient = ODD[odd](holders[which].grad)
    if gradient is None:
        holders[which].grad = None
    else:
        set_gradient(holders[which], gradient)
        assert holders[which].grad is gradient
    assert finder(holders) is None


@pytest.mark.parametrize("way", WAYS)
def test_other_devices_and_layouts(way):
    holders = parameters()
    finder = finder_of(holders, way)
    for gradient in (torch.zeros(3, 8, device="meta"), torch.zeros(3, 8).to_sparse()):
        holder = nn.Parameter(torch.zeros_like(gradient))
        holder.grad = gradient
        assert finder([*holders[:7], holder, *holders[8:]]) is None


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_that_is_copied_on_write_is_not_copied_by_being_found(way):
    holders = parameters()
    finder = finder_of(holders, way)
    holders[2].grad = torch._lazy_clone(holders[2].grad)
    assert finder(holders) is None
    assert torch._C._is_cow_tensor(holders[2].grad)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_found_is_held(way):
    holders = parameters()
    found = finder_of(holders, way)(holders)
    expected = [p.grad.clone() for p in holders]
    storages = [p.grad.untyped_storage()._weak_ref() for p in holders]
    for p in holders:
        p.grad = None
    gc.collect()
    assert not any(map(torch.UntypedStorage._expired, storages))
    if way != "compiled" or type(expected[0]) is torch.Tensor:  # of DTensors the memory alone is held
        assert all(torch.equal(t, e) for t, e in zip(found.tensors(), expected, strict=True))
    del found
    assert all(map(torch.UntypedStorage._expired, storages))
    for storage in storages:
        torch.UntypedStorage._free_weak_ref(storage)


@pytest.mark.parametrize("way", WAYS)
def test_a_change_is_seen_by_autograd(way):
    holders = parameters()
    found = finder_of(holders, way)(holders)
    before = [p.grad._version for p in holders]
    found.mark_changed()
    assert [p.grad._version for p in holders] == [version + 1 for version in before]


@pytest.mark.parametrize("way", WAYS)
def test_an_inference_tensor_is_looked_at_with_care(way):
    holders = parameters()
    finder = finder_of(holders, way)
    with torch.inference_mode():
        holders[0].grad = holders[0].grad.clone()
    assert finder(holders) is None


@pytest.mark.parametrize("way", WAYS)
def test_a_thousand_rounds_leak_no_reference(way):
    holders = parameters()
    finder = finder_of(holders, way)
    held = [*holders, *(p.grad for p in holders)]
    counts = list(map(sys.getrefcount, held))
    for _ in range(1000):
        finder(holders).tensors()
    set_gradient(holders[30], holders[30].grad[:, :1])
    held[70] = holders[30].grad
    counts[70] = sys.getrefcount(holders[30].grad)
    for _ in range(1000):
        assert finder(holders) is None
    assert counts == list(map(sys.getrefcount, held))


def of_dtensors(way: str) -> None:
    """In a process group of one rank."""
    mesh = init_device_mesh("cpu", (1,))

    def made(local: Tensor, placement: Any = None) -> DTensor:
        return DTensor.from_local(local, mesh, [placement or Shard(0)])

    holders = [nn.Parameter(made(torch.ones(4, i + 1))) for i in range(20)]
    for p in holders:
        p.grad = made(torch.randn(p.shape))
    finder = finder_of(holders, way)
    found = finder(holders)
    assert addresses(found) == [p.grad._local_tensor.data_ptr() for p in holders]
    assert all(t is p.grad._local_tensor for t, p in zip(found.tensors(), holders, strict=True))
    counts = [sys.getrefcount(p.grad._spec) for p in holders]
    for _ in range(100):
        finder(holders)
    assert counts == [sys.getrefcount(p.grad._spec) for p in holders]
    local = holders[7].grad._local_tensor
    for odd in (
        torch.ones(4, 9),
        torch.ones(4, 8, dtype=torch.float64),
        torch.ones(8, 4).t(),
        torch.ones(1).expand(4, 8),
        torch.ones(4, 8).as_subclass(Overriding),
        nn.Parameter(torch.ones(4, 8)),
        torch.ones(4, 8, device="meta"),
        resized(torch.ones(4, 8), 64),
        torch._neg_view(local),
        torch._lazy_clone(local.clone()),
    ):
        holders[7].grad._local_tensor = odd
        assert finder(holders) is None
    holders[7].grad._local_tensor = local
    assert finder(holders) is not None
    holders[7].grad = made(local)  # equal, and another object
    assert addresses(finder(holders)) == [p.grad._local_tensor.data_ptr() for p in holders]
    spec = holders[7].grad._spec
    holders[7].grad._spec = copy.copy(spec)
    assert finder(holders) is not None
    holders[7].grad._spec = made(local, Replicate())._spec
    assert finder(holders) is None
    holders[7].grad._spec = spec
    plain = nn.Parameter(torch.ones(4, 8))
    plain.grad = torch.ones(4, 8)
    assert finder([*holders[:7], plain, *holders[8:]]) is None
    holders[7].grad = None
    assert finder(holders) is None


@pytest.mark.parametrize("way", WAYS)
def test_dtensors(ranks, way):
    compiled()
    ranks(1, of_dtensors, way)


@pytest.mark.parametrize(
    "gradients",
    [
        [torch.ones(2, 3).t()],
        [torch.ones(2), nn.Parameter(torch.ones(2))],
        [torch.ones(2).as_subclass(Overriding)],
        [torch.ones(2, dtype=torch.complex64)],
        [torch.ones(2, device="meta")],
    ],
    ids=["strides", "classes", "subclass", "dtype", "device"],
)
def test_it_is_made_of_what_it_can_find(gradients):
    with pytest.raises(ValueError, match=r"expected .*, found gradient [01]"):
        Finder(gradients)


def test_where_parameters_have_no_gradient_nothing_is_held():
    holders = parameters(3)
    finder = finder_of(holders, "compiled")
    assert finder([torch.ones(1), *holders[1:]]) is None
    assert finder([np.ones(1), *holders[1:]]) is None
