"""FSDP1: every strategy, with both kinds of parameters, against one process in fp64."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffload, MixedPrecision
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.profiler import ProfilerActivity, profile

import distnorm
from distnorm.measure.fast_path import FastPath
from tests import fsdp1_models as models
from tests import oracle
from tests.fsdp1_models import each, same_on_all

BOTH = (True, False)
EITHER = [(orig,) for orig in BOTH]
CELLS = [(strategy, orig) for strategy in models.STRATEGIES for orig in BOTH]
ORDERS = (1.0, 2.0, 3.0, math.inf)
FP32 = 1e-5  # forward and backward of the net in fp32, against fp64
ROUNDED = 1.2e-7  # one rounding to fp32
RATE, FRACTION = 10.0, 0.25


def clipper(target: Any, max_norm: float | None = None, order: float = 2.0) -> distnorm.GradClipper:
    return distnorm.GradClipper(target, {"norm": {"type": order}, "clip": {"max_norm": max_norm}})


# ---- all strategies, with both kinds of parameters


def train_one_step(strategy: str, orig: bool, exact: float) -> dict[str, Any]:
    model = models.wrapped(strategy, orig)
    clippers = {order: clipper(model, FRACTION * exact, order) for order in ORDERS}
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    before = models.whole(model)
    models.backward(model)
    report: dict[str, Any] = {order: c.measure().total_norm.item() for order, c in clippers.items()}
    report["clip"] = clippers[2.0].clip().to_dict()
    optimizer.step()
    after = models.whole(model)
    report["change"] = {name: after[name] - before[name] for name in after}
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(1)  # the padding of flat parameters too, which must count nothing
    report["ones"] = {order: c.measure().total_norm.item() for order, c in clippers.items()}
    report["drop-in"] = distnorm.clip_grad_norm_(model, 0.5).item()
    report["after it"] = clippers[2.0].measure().total_norm.item()
    return report


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.slow
def test_every_strategy_has_the_dense_norm_and_takes_the_dense_step(ranks, world):
    gradients = models.dense_gradients(range(world))
    exact, elements = models.dense_norm(gradients), sum(g.numel() for g in gradients.values())
    norms = {order: models.dense_norm(gradients, order) for order in ORDERS}
    by_rank = ranks(world, each, train_one_step, [(*cell, exact) for cell in CELLS], timeout=180)
    coef = oracle.coefficient(exact, FRACTION * exact)
    for cell, *reports in zip(CELLS, *by_rank, strict=True):
        changes = [report.pop("change") for report in reports]
        found = same_on_all(reports)
        for order in ORDERS:
            assert found[order] == pytest.approx(norms[order], rel=FP32), (cell, order)
            ones = 1 if math.isinf(order) else elements ** (1 / order)
            assert found["ones"][order] == pytest.approx(ones, rel=1e-15), (cell, order)
        assert found["drop-in"] == pytest.approx(elements**0.5, rel=ROUNDED)
        assert found["after it"] == pytest.approx(0.5, rel=3 * ROUNDED)
        assert found["clip"]["total_norm"] == pytest.approx(exact, rel=FP32)
        assert found["clip"]["clip_coef"] == pytest.approx(coef, rel=FP32)
        for change in changes:
            assert change.keys() == gradients.keys()
            for name, moved in change.items():
                step = -RATE * coef * gradients[name]
                allowed = FP32 * float(step.abs().max()) + 2**-24  # the parameter, below 1, is rounded once
                assert torch.allclose(moved, step, rtol=0, atol=allowed), (cell, name)


def calls_of_a_step(orig: bool) -> dict[str, int]:
    model = models.wrapped("FULL_SHARD", orig)
    clips = clipper(model, 1.0)
    for step in range(2):  # the first of them agrees on more
        models.backward(model, step)
        with profile(activities=[ProfilerActivity.CPU]) if step else nullcontext() as profiled:
            clips.clip()
    return {e.key: e.count for e in profiled.key_averages() if e.key.startswith("c10d::")}


def test_a_step_takes_one_all_reduce_however_many_units(ranks):
    calls = same_on_all(ranks(2, each, calls_of_a_step, EITHER))
    assert calls == [{"c10d::allreduce_": 1}] * 2


# ---- what FSDP1's own clip_grad_norm_ gets wrong


def infinity_norms() -> list[tuple[float, float]]:
    model = models.fsdp(nn.Linear(1, 1, bias=False))  # the other rank has padding alone
    found: list[tuple[float, float]] = []
    for size in (100.0, 1.0, 0.01):
        model.zero_grad()
        model(torch.full((1, 1), size)).sum().backward()
        ours = distnorm.clip_grad_norm_(model, math.inf, math.inf).item()
        found.append((model.clip_grad_norm_(math.inf, math.inf).item(), ours))
    return found


def test_the_infinity_norm_of_a_rank_without_gradients_is_not_kept(ranks):
    """Trap: FSDP1's all-reduce writes into the zero that a rank without gradients keeps."""
    theirs, ours = zip(*same_on_all(ranks(2, infinity_norms)), strict=True)
    assert theirs == (100, 100, 100)
    assert ours == pytest.approx((100, 1, 0.01), rel=ROUNDED)


def norms_of_both(kind: str) -> tuple[float, float]:
    model = models.units_on_other_ranks(kind)
    models.backward(model, rank=dist.get_rank() % 2)
    ours = distnorm.clip_grad_norm_(model, math.inf).item()
    return model.clip_grad_norm_(math.inf).item(), ours


@pytest.mark.parametrize("kind", ["copied", "more widely sharded"])
def test_units_inside_on_other_groups_count_once(ranks, kind):
    gradients = models.dense_gradients(range(2))
    exact = models.dense_norm(gradients)
    block = models.dense_norm({n: g for n, g in gradients.items() if n.startswith("block")})
    theirs, ours = zip(*ranks(4, norms_of_both, kind), strict=True)
    assert same_on_all(ours) == pytest.approx(exact, rel=FP32)
    if kind == "copied":
        assert same_on_all(theirs) == pytest.approx(math.hypot(exact, block), rel=FP32)  # counted twice
    else:
        assert max(theirs) < exact * (1 - FP32)  # counted in part, by each pair its own
        assert len(set(theirs)) == 2


# ---- what a model may hold


def measure_experts(orig: bool) -> float:
    model = models.experts_on_pairs(orig)
    models.backward(model)
    for parameter in model.module.alone.parameters():  # FSDP1 leaves these to the caller
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    return clipper(model).measure().total_norm.item()


def test_experts_on_their_own_groups_and_ignored_modules(ranks):
    exact = models.dense_norm(models.dense_experts())
    for found in same_on_all(ranks(4, each, measure_experts, EITHER)):
        assert found == pytest.approx(exact, rel=FP32)


def measure_tied() -> tuple[float, float]:
    model = models.fsdp(models.make(models.Tied))
    models.backward(model)
    return clipper(model).measure().total_norm.item(), models.dense_norm(models.whole(model, gradients=True))


def test_tied_frozen_and_unused_parameters_of_one_unit(ranks):
    exact = models.dense_norm(models.dense_gradients(range(2), kind=models.Tied))
    for found in same_on_all(ranks(2, measure_tied)):
        assert found == pytest.approx(exact, rel=FP32)


def clip_mixed(strategy: str, orig: bool, keep: bool) -> dict[str, Any]:
    bf16 = torch.bfloat16
    precision = MixedPrecision(param_dtype=bf16, reduce_dtype=bf16, keep_low_precision_grads=keep)
    model = models.wrapped(strategy, orig, mixed_precision=precision)
    models.backward(model)
    held = [p for p in model.parameters() if p.grad is not None]
    before = [p.grad.clone() for p in held]
    found = clipper(model, 1e-3).clip().to_dict()
    return {**found, "before": before, "after": [p.grad for p in held]}


def test_mixed_precision(ranks):
    """Against the norm of the gradients that FSDP1 itself leaves, their rounding included."""
    kinds = [("FULL_SHARD", True), ("FULL_SHARD", False), ("NO_SHARD", True)]
    cells = [(*kind, keep) for kind in kinds for keep in BOTH]
    for (strategy, _, keep), *reports in zip(cells, *ranks(2, each, clip_mixed, cells), strict=True):
        pairs = [pair for r in reports for pair in zip(r.pop("before"), r.pop("after"), strict=True)]
        found = same_on_all(reports)
        copies = 2 if strategy == "NO_SHARD" else 1
        exact = oracle.dense_of([gradient for gradient, _ in pairs[: len(pairs) // copies]])
        assert found["total_norm"] == pytest.approx(exact, rel=1e-14)
        for gradient, scaled in pairs:
            assert scaled.dtype == (torch.bfloat16 if keep else torch.float32)
            assert oracle.is_scaled(scaled, oracle.as_numpy(gradient), found["clip_coef"])


def measure_offloaded(strategy: str, orig: bool, exact: list[float]) -> list[float]:
    torch.Tensor.pin_memory = lambda self, *_, **__: self  # a CPU has nothing to pin, and nothing to wait for
    torch.cpu.Stream.synchronize = lambda self: None
    model = models.wrapped(strategy, orig, cpu_offload=CPUOffload(offload_params=True))
    found: list[float] = []
    for step in range(2):
        clips = clipper(model, exact[step] / 2)
        models.backward(model, step)
        found.append(clips.clip().total_norm.item())
        found.append(clips.measure().total_norm.item())
        # Set to None, FSDP1 computing on a CPU brings the old gradient back, as the host's copy of it.
        model.zero_grad(set_to_none=False)
    return found


def test_cpu_offload(ranks):
    exact = [models.dense_norm(models.dense_gradients(range(2), [step])) for step in range(2)]
    cells = [(strategy, orig, exact) for strategy in ("FULL_SHARD", "NO_SHARD") for orig in BOTH]
    for found in same_on_all(ranks(2, each, measure_offloaded, cells)):
        assert found == pytest.approx([exact[0], exact[0] / 2, exact[1], exact[1] / 2], rel=FP32)


# ---- from step to step


def accumulate(strategy: str, orig: bool) -> list[float]:
    model, found = models.wrapped(strategy, orig), []
    clips = clipper(model)
    for step in (0, 2):
        with model.no_sync():
            models.backward(model, step)
        for call in (clips.clip, lambda: distnorm.clip_grad_norm_(model, 1.0)):
            with pytest.raises(distnorm.UnsupportedGradientError, match=r"'up\.weight(\+3)?'.* no_sync\(\)"):
                call()
        models.backward(model, step + 1)
        found.append(clips.measure())
    model.zero_grad()
    models.backward(model, 4)
    return [result.total_norm.item() for result in [*found, clips.measure()]]


def test_accumulation_is_right_and_unreduced_gradients_are_refused(ranks):
    added = ([0, 1], [0, 1, 2, 3], [4])
    exact = [models.dense_norm(models.dense_gradients(range(2), steps)) for steps in added]
    for found in same_on_all(ranks(2, each, accumulate, CELLS)):
        assert found == pytest.approx(exact, rel=FP32)


def replace_gradients(orig: bool) -> list[float]:
    model = models.wrapped("FULL_SHARD", orig)
    clips = clipper(model, 1e-3)
    models.backward(model)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = 2 * parameter.grad  # FSDP1 writes it back in the next forward
    found = [clips.clip()]
    models.backward(model, 1)
    found.append(clips.measure())
    model.zero_grad()
    found.append(clips.measure())
    model.module.extra = nn.Parameter(torch.ones(4))  # another set of parameters: planned anew
    model.module.extra.grad = torch.full((4,), 3.0)
    return [result.total_norm.item() for result in [*found, clips.measure()]]


def test_gradients_that_are_replaced_removed_or_new(ranks):
    first, second = (models.dense_gradients(range(2), [step]) for step in range(2))
    exact = models.dense_norm(first)
    coef = oracle.coefficient(2 * exact, 1e-3)
    after = models.dense_norm({name: second[name] + 2 * coef * first[name] for name in first})
    for found in same_on_all(ranks(2, each, replace_gradients, EITHER)):
        assert found == pytest.approx([2 * exact, after, 0, 6], rel=FP32)


# ---- what is refused


def refuse(orig: bool) -> None:
    model = models.wrapped("SHARD_GRAD_OP", orig)
    clips = clipper(model)
    models.backward(model)
    unsupported = distnorm.UnsupportedGradientError
    for target in ([*model.parameters()], dict(model.named_parameters()), model.module):
        for call in (clipper, lambda given: distnorm.clip_grads_with_norm_(given, 1.0, torch.tensor(1.0))):
            with pytest.raises(unsupported, match="pass the FSDP model itself"):
                call(target)
    calls = (clips.measure, clips.clip, lambda: clipper(model), lambda: distnorm.clip_grad_norm_(model, 1))
    for call in calls:
        with FSDP.summon_full_params(model), pytest.raises(unsupported, match="summon_full"):
            call()
    exact = clips.measure().total_norm.item()
    with torch.no_grad():
        model(models.rows(0))
    assert clips.measure().total_norm.item() == exact
    out = models.loss(model, models.rows(0))
    with pytest.raises(unsupported, match="between forward and backward") if orig else nullcontext():
        assert clips.measure().total_norm.item() == exact
    out.backward()
    assert clips.measure().total_norm.item() != exact
    assert distnorm.clip_grad_norm_((part for part in [model]), math.inf).item() > 0


def test_what_cannot_be_measured_is_refused_by_name(ranks):
    ranks(2, each, refuse, EITHER)


# ---- without care


def fast_steps(strategy: str) -> int:
    """How many of three steps found their gradients by address."""
    model, found = models.wrapped(strategy, True), []
    clips, read = clipper(model), FastPath.read
    with mock.patch.object(FastPath, "read", lambda *a: (found.append(read(*a)), found[-1])[1]):
        for step in range(3):
            model.zero_grad()
            models.backward(model, step)
            clips.clip()
    return sum(each is not None for each in found)


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"])
def test_later_steps_are_read_without_care(ranks, strategy):
    assert ranks(2, fast_steps, strategy) == [2, 2]
