"""A flipped bit at any position is found, on the rank and in the parameter where it is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import distnorm
from distnorm import DistnormError, GradClipper, kernels
from distnorm.measure.gradients import Gradients
from distnorm.testing import preload
from distnorm.trainer.run import build
from distnorm.trainer.torch_trainer import TorchTrainer
from distnorm.trainer.world import open_world
from distnorm.verification.doctor.fingerprints import Fingerprints, fingerprints_of
from tests.trainer.tiny import shipped
from tests.verification.topologies import Block, Ranks, backward

preload("distnorm.verification.doctor.fingerprints")
KEPT = {"monitor": {"fingerprints": 3}}

INTS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64}


@pytest.mark.parametrize("dtype", INTS)
@pytest.mark.parametrize("native", [True, False])
def test_every_bit_counts(dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr("distnorm.kernels.fingerprints", lambda table: None)
    gradient = torch.randn(65, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    bits = gradient.view(INTS[dtype])
    before = fingerprints_of([gradient])
    for bit in range(8 * dtype.itemsize):
        flip = 1 << bit if bit < 8 * dtype.itemsize - 1 else -(1 << bit)
        bits[41, 3] ^= flip
        assert fingerprints_of([gradient]) != before, bit
        bits[41, 3] ^= flip
        assert fingerprints_of([gradient]) == before


def test_what_is_large_is_read_whole() -> None:
    gradient = torch.zeros((1 << 23) + 5, dtype=torch.bfloat16)
    before = fingerprints_of([gradient])
    for at in (0, 12_345, (1 << 23) - 1, (1 << 23) + 4):
        gradient[at] = 1e-30
        assert fingerprints_of([gradient]) != before
        gradient[at] = 0


def replayed(flips: bool) -> list[tuple[int, str]]:
    model = Block()
    prints = Fingerprints(model, keep=3)
    for step in range(5):
        model.zero_grad()
        backward(model, step)
        prints.record(step)
    assert prints.steps == (2, 3, 4)
    model.zero_grad()
    backward(model, 4)
    if flips and dist.get_rank() == 1:
        assert isinstance(model.up.weight, nn.Parameter) and model.up.weight.grad is not None
        model.up.weight.grad.view(torch.int32)[3, 2] ^= 1
    return prints.differing(4)


def test_the_rank_and_the_parameter_are_named(ranks: Ranks) -> None:
    assert ranks(2, replayed, False) == [[], []]
    assert ranks(2, replayed, True) == [[(1, "up.weight")]] * 2


def test_a_step_that_is_forgotten_is_refused() -> None:
    with pytest.raises(DistnormError, match="expected one of the steps"):
        Fingerprints(Block()).differing(1)


# ---- in the read of the norm


def weighed(tensor: torch.Tensor) -> int:
    """A print as kernels.printed_statistic documents it, by numpy."""
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    words = np.frombuffer(data + bytes(-len(data) % 4), dtype=np.uint32).astype(np.uint64)
    weights = (np.arange(len(words), dtype=np.uint64) * 0x9E3779B2 + 0x85EBCA6B) & 0xFFFFFFFF
    return int((words * weights).sum(dtype=np.uint64).astype(np.int64))


@pytest.mark.skipif(not kernels.has_kernel(torch.zeros(1)), reason="no compiled code here")
@pytest.mark.parametrize("dtype", [*INTS, torch.float16])
def test_one_read_gives_the_norms_bits_and_prints_that_no_cut_changes(dtype: torch.dtype) -> None:
    dice = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=dice).to(dtype) for n in (7, 0, 65537, 1, 70001, 33)]
    table = kernels.AddressTable.of(tensors)
    for kernel in kernels.Kernel:
        found = kernels.printed_statistic(table, kernel)
        assert found is not None
        assert torch.equal(found[0], kernels.statistic_at(table.merged, kernel))
        assert found[1].tolist() == list(map(weighed, tensors))


@pytest.mark.parametrize("dtype", INTS)
@pytest.mark.parametrize("native", [True, False])
def test_every_bit_of_a_gradient_shows(
    dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr("distnorm.kernels.printed_statistic", lambda table, kernel: None)
    model = Block(dtype=dtype)
    backward(model)
    clipper = GradClipper(model, {"monitor": {"fingerprints": 1}, "clip": {"nonfinite": "propagate"}})
    assert clipper.fingerprints == {}
    clipper.measure()
    (before,) = clipper.fingerprints.values()
    assert set(before) == {name for name, _ in model.named_parameters()}
    assert model.up.weight.grad is not None
    bits = model.up.weight.grad.view(INTS[dtype])
    for bit in range(8 * dtype.itemsize):
        flip = 1 << bit if bit < 8 * dtype.itemsize - 1 else -(1 << bit)
        bits[3, 5] ^= flip
        clipper.measure()
        (now,) = clipper.fingerprints.values()
        assert [name for name in before if before[name] != now[name]] == ["up.weight"], bit
        bits[3, 5] ^= flip


@pytest.mark.parametrize("native", [True, False])
def test_both_of_two_tied_tensors_on_one_rank_count(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are replicas of one name, each of which is counted in half: a flip in either half shows."""
    if not native:
        monkeypatch.setattr("distnorm.kernels.printed_statistic", lambda table, kernel: None)
    first, second = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    for parameter in (first, second):
        parameter.grad = torch.arange(12.0).view(4, 3)
    target, tied = [("in", first), ("out", second)], [("in", "out")]
    clipper = GradClipper(target, {"monitor": {"fingerprints": 1}}, tied=tied)
    prints = Fingerprints(target, tied=tied)

    def taken() -> list[int]:
        clipper.measure()
        prints.record(0)
        return [*next(iter(clipper.fingerprints.values())).values(), *prints._steps[0].values()]

    before = taken()
    assert len(before) == 2
    for element in range(12):
        for parameter in (first, second):
            assert parameter.grad is not None
            parameter.grad.view(torch.int32).view(-1)[element] ^= 1
        assert all(now != then for now, then in zip(taken(), before, strict=True)), element
        for parameter in (first, second):
            assert parameter.grad is not None
            parameter.grad.view(torch.int32).view(-1)[element] ^= 1
    assert taken() == before


def on_suspicion(flips: bool) -> Any:
    """Two ranks, each with experts of its own and one shared norm, whose second rank computes wrongly."""
    rank = dist.get_rank()
    model = nn.ModuleDict({"norm": nn.LayerNorm(8), f"expert{rank}": nn.Linear(8, 8)})
    clipper = GradClipper(model, {**KEPT, "clip": {"max_norm": 0.01}})

    def compute(again: bool = False) -> None:
        model.zero_grad()
        model[f"expert{rank}"](model["norm"](torch.arange(32.0).view(4, 8))).square().mean().backward()
        for parameter in model["norm"].parameters():
            dist.all_reduce(parameter.grad)
        if again and flips and rank == 1:
            model["expert1"].weight.grad.view(torch.int32)[3, 2] ^= 1 << 30

    for _ in range(5):
        compute()
        clipper.clip()
    assert list(clipper.fingerprints) == [3, 4, 5]
    kept = clipper.fingerprints[5]
    found = distnorm.replay(clipper, lambda: compute(again=True))
    compute()
    clipper.clip()
    return found, kept == clipper.fingerprints[6]


def test_a_replay_names_the_rank_and_the_parameter(ranks: Ranks) -> None:
    """Also where the flipped bit makes the norm overflow, and where nobody has a replica."""
    assert ranks(2, on_suspicion, False) == [([], True)] * 2
    assert ranks(2, on_suspicion, True) == [([(1, "expert1.weight")], True)] * 2


def test_a_replay_needs_fingerprints() -> None:
    model = Block()
    backward(model)
    with pytest.raises(DistnormError, match=r"whose fingerprints are kept \(monitor\.fingerprints\)"):
        distnorm.replay(GradClipper(model), lambda: None)


@pytest.mark.parametrize("native", [True, False])
def test_fingerprints_are_the_same_where_backward_reads_gradients(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norm too, and it is still that which backward has read."""
    if not native:
        monkeypatch.setattr("distnorm.kernels.printed_statistic", lambda table, kernel: None)
    found = []
    for overlap in (False, True):
        model = Block()
        clipper = GradClipper(model, {**KEPT, "clip": {"max_norm": 0.01, "overlap": overlap}})
        for _ in range(4):
            model.zero_grad()
            backward(model)
            with monkeypatch.context() as patch:
                if overlap:
                    patch.setattr(Gradients, "statistic", _not_again)
                norm = clipper.clip().total_norm
        found.append((float(norm), dict(clipper.fingerprints)))
    assert list(found[0][1]) == [2, 3, 4]
    assert found[0] == found[1]
    assert model.up.weight.grad is not None
    model.zero_grad()
    backward(model)
    model.up.weight.grad.view(torch.int32)[3, 5] ^= 1
    clipper.clip()
    before, now = clipper.fingerprints[4], clipper.fingerprints[5]
    assert [name for name in before if before[name] != now[name]] == ["up.weight"]


def _not_again(*_: Any) -> None:
    raise AssertionError("a gradient that backward has read is read again for its norm")


@pytest.mark.parametrize("value", [1e4, math.inf])
def test_the_trainer_replays_a_spike(value: float, tmp_path: Path) -> None:
    """A fault that strikes once, in step 7, is told from a step that is so by its data."""
    config = shipped("single", tmp_path, "monitor.fingerprints=4", "train.steps=8", "clip.nonfinite=skip")
    with open_world(config) as world:
        trainer = build(config, world)
        assert isinstance(trainer, TorchTrainer)
        usual, struck = trainer.compute_gradient, []

        def compute(step: int) -> torch.Tensor:
            share = usual(step)
            if step == 7 and not struck:
                struck.append(step)
                gradient = trainer.engine.named_parameters()["tok.weight"].grad
                assert gradient is not None
                gradient[0, 0] = value
            return share

        trainer.compute_gradient = compute  # type: ignore[method-assign]
        for step in range(1, 9):
            trainer.step(step)
    (row,) = map(json.loads, (tmp_path / "replays.jsonl").read_text().splitlines())
    assert row["step"] == 7 and row["differing"] == [{"rank": 0, "parameter": "tok.weight"}]
