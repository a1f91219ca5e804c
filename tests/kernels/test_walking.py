"""Gradients found by compiled C++: where Python's attributes find them, and never where something is odd."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import UserDict

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import distnorm
from distnorm.kernels import SpanTable, Walker, hold_just, walking

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def library():
    found = walking._kept() or walking._load(compiles=True)
    if found is None:
        pytest.skip("there is no C++ compiler here, or no header of Python's")
    return found


def parameters(count: int = 40) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.ones(3, i + 1, dtype=DTYPES[i % 4])) for i in range(count)]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape).to(parameter.dtype)
    return made


def walker_of(holders: list[nn.Parameter]) -> Walker:
    return Walker(library(), SpanTable.of([p.grad for p in holders]), None)


def found(walker: Walker, holders: list[Tensor] | tuple[Tensor, ...]) -> list[int] | None:
    out = np.zeros(len(holders), dtype=np.int64)
    return out.tolist() if walker(holders, out) else None


def test_it_finds_what_attributes_find():
    holders = parameters()
    walker = walker_of(holders)
    assert walker.works
    for _ in range(2):
        assert found(walker, holders) == [p.grad.data_ptr() for p in holders]
        assert found(walker, tuple(holders)) == [p.grad.data_ptr() for p in holders]
        for p in holders:
            p.grad = p.grad.clone()


class Subclass(Tensor):
    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("which", [0, 17, 39])
@pytest.mark.parametrize(
    "change",
    [
        lambda p: None,
        lambda p: torch.zeros(p.numel() + 1, dtype=p.dtype),
        lambda p: p.grad.double() if p.dtype is not torch.float64 else p.grad.float(),
        lambda p: torch.zeros(3, p.shape[1] * 2, dtype=p.dtype)[:, ::2],
        lambda p: p.grad.to("meta"),
        lambda p: p.grad.to_sparse(),
        lambda p: Tensor._make_subclass(Subclass, p.grad.detach().clone()),
    ],
    ids=["none", "size", "dtype", "strides", "device", "sparse", "subclass"],
)
def test_what_is_odd_is_left_to_others(which, change):
    holders = parameters()
    walker = walker_of(holders)
    odd = change(holders[which])
    holders[which].grad = None
    if odd is not None:  # torch refuses some of these, and frameworks get round that as well
        try:
            holders[which].grad = odd
        except RuntimeError:
            holders[which] = nn.Parameter(torch.zeros(odd.shape, dtype=odd.dtype, device=odd.device))
            try:
                holders[which].grad = odd
            except RuntimeError:
                pytest.skip("torch takes no such gradient at all")
    assert found(walker, holders) is None


def test_freed_memory_is_no_address():
    holders = parameters()
    walker = walker_of(holders)
    holders[3].grad.untyped_storage().resize_(0)
    addresses = found(walker, holders)
    assert addresses is None or addresses[3] == 0


def of_dtensors() -> None:
    """In a process group of one rank: local tensors' addresses, until a spec or a class is another."""
    mesh = init_device_mesh("cpu", (1,))
    holders = [nn.Parameter(DTensor.from_local(torch.ones(4, i + 1), mesh)) for i in range(20)]
    for p in holders:
        p.grad = DTensor.from_local(torch.randn(p.shape), mesh)
    specs = [p.grad._spec for p in holders]
    walker = Walker(library(), SpanTable.of([p.grad._local_tensor for p in holders]), specs)
    assert walker.works
    assert found(walker, holders) == [p.grad._local_tensor.data_ptr() for p in holders]
    local, holders[7].grad._local_tensor = holders[7].grad._local_tensor, torch.ones(4, 9)
    assert found(walker, holders) is None
    holders[7].grad._local_tensor = local
    assert found(walker, holders) is not None
    holders[7].grad = DTensor.from_local(local, mesh)  # equal, and another object
    assert found(walker, holders) is None
    plain = nn.Parameter(torch.ones(4, 8))
    plain.grad = torch.ones(4, 8)
    assert found(walker, [*holders[:7], plain, *holders[8:]]) is None


def test_dtensors(ranks):
    ranks(1, of_dtensors)


def test_dicts_hold_just_the_same_objects():
    library()
    first, second, third = object(), object(), object()
    dicts = [{}, {"a": first, "b": second}, {}, {"c": third}, *({i: first} for i in range(40))]
    values = [first, second, third, *[first] * 40]
    assert hold_just(dicts, values)
    assert not hold_just(dicts, values[:-1]) and not hold_just(dicts, [*values, first])
    assert hold_just([*dicts, UserDict(d=third)], [*values, third])
    assert not hold_just([*dicts, UserDict(d=third)], [*values, first])
    for change in (
        lambda: dicts[1].update(b=third),
        lambda: dicts[0].update(new=first),
        lambda: dicts[3].pop("c"),
        lambda: dicts[30].clear(),
    ):
        before = [dict(each) for each in dicts]
        change()
        assert not hold_just(dicts, values)
        for each, old in zip(dicts, before, strict=True):
            each.clear()
            each.update(old)
        assert hold_just(dicts, values)


def test_a_thousand_rounds_leak_no_reference():
    holders = parameters()
    walker = walker_of(holders)
    counts = [sys.getrefcount(p) for p in holders] + [sys.getrefcount(p.grad) for p in holders]
    for _ in range(1000):
        assert found(walker, holders) is not None
    assert counts == [sys.getrefcount(p) for p in holders] + [sys.getrefcount(p.grad) for p in holders]


def test_steps_go_by_attributes_until_it_is_there(monkeypatch):
    compiled = library()
    monkeypatch.setattr(walking, "_ready", ready := [])
    monkeypatch.setattr(walking, "_kept", lambda: None)
    monkeypatch.setattr(walking, "_begin_to_compile", lambda: None)
    holders = parameters(300)
    clipper = distnorm.GradClipper(holders)
    norms = [float(clipper.measure().total_norm) for _ in range(3)]
    (kind,) = clipper._meter._steady._kinds[:1]
    assert kind.walker is None
    ready.append(compiled)
    norms.append(float(clipper.measure().total_norm))
    assert kind.walker is not None
    assert len(set(norms)) == 1


def test_it_is_not_compiled_for_a_few_gradients():
    """Ten seconds are too much for a model whose gradients attributes find in no time."""
    code = """
import os, torch, distnorm
from distnorm.kernels import compiling
load, asked = compiling.load, []
compiling.load = lambda *a, **k: (asked.append((a[0].source.name, k.get("compiles", True))), load(*a, **k))[1]
os.environ["CXX"] = "/nowhere/c++"
for count in (3, 300):
    model = torch.nn.ParameterList(torch.ones(2) for _ in range(count))
    for p in model: p.grad = torch.ones(2)
    clipper = distnorm.GradClipper(model)
    clipper.measure(), clipper.measure()
    print(("walk.cpp", True) in asked, end=" ")
"""
    environ = {**os.environ, "DISTNORM_NATIVE": "now"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=environ
    )
    assert done.stdout.split() == ["False", "True"], done.stderr
