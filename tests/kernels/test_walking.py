"""Compiled C++ that reads torch's and Python's structures: when it is there, and what it tells of dicts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import UserDict

import pytest
import torch
from torch import nn

from distnorm.kernels import Finder, hold_just, walking


def library():
    found = walking._kept() or walking._load(compiles=True)
    if found is None:
        pytest.skip("there is no C++ compiler here, or no header of Python's")
    return found


@pytest.mark.slow
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


def test_gradients_are_found_by_attributes_until_it_is_there(monkeypatch):
    compiled = library()
    monkeypatch.setattr(walking, "_ready", ready := [])
    monkeypatch.setattr(walking, "_kept", lambda: None)
    monkeypatch.setattr(walking, "_begin_to_compile", lambda: None)
    holders = [nn.Parameter(torch.ones(2)) for _ in range(300)]
    for holder in holders:
        holder.grad = torch.ones(2)
    finder = Finder([holder.grad for holder in holders])
    by_attributes = finder(holders)
    assert finder._compiled is None
    ready.append(compiled)
    by_it = finder(holders)
    assert finder._compiled is compiled
    assert by_it.addresses.tolist() == by_attributes.addresses.tolist()


@pytest.mark.slow
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
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=180, env=environ
    )
    assert done.stdout.split() == ["False", "True"], done.stderr
