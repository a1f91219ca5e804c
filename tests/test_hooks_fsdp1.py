"""`attach` to the optimizer of a model under FSDP1: norm and update are those of one process in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecision
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import distnorm
from tests import fsdp1_models as models

LR, MAX_NORM, SCALE = 0.5, 0.125, 1024.0
CELLS = [(s, orig) for s in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD") for orig in (False, True)]
FP32 = 1e-6


def attached(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> distnorm.Handle:
    return distnorm.attach(model, optimizer, {"clip": {"max_norm": MAX_NORM, "nonfinite": "skip"}})


def step(strategy: str, orig: bool, scaled: bool) -> tuple[float, float, float]:
    """The norm, how far the farthest parameter is from the oracle's, and the scale at the end."""
    exact = models.dense_gradients(range(dist.get_world_size()))
    coef = min(1.0, MAX_NORM / (models.dense_norm(exact) + 1e-6))
    model = models.wrapped(strategy, orig)
    before = models.whole(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    handle = attached(model, optimizer)
    scaler = ShardedGradScaler(device="cpu", init_scale=SCALE, enabled=scaled)
    scaler.scale(models.loss(model, models.rows(dist.get_rank()))).backward()
    scaler.step(optimizer)
    scaler.update()
    after = models.whole(model)
    handle.remove()
    off = max(float((after[n] - before[n] + LR * coef * exact[n]).abs().max()) for n in before)
    assert handle.last is not None
    return handle.last.total_norm.item(), off, scaler.get_scale()


@pytest.mark.parametrize("scaled", [False, True])
def test_norm_and_update_are_the_oracles(ranks, scaled):
    exact = models.dense_norm(models.dense_gradients(range(2)))
    largest = max(float(p.detach().abs().max()) for p in models.make().parameters())
    assert exact > 2 * MAX_NORM
    for cells in ranks(2, models.each, step, [(*cell, scaled) for cell in CELLS]):
        for cell, (norm, off, scale) in zip(CELLS, cells, strict=True):
            assert norm == pytest.approx(exact, rel=FP32), cell
            assert off < FP32 * largest, cell
            assert scale == (SCALE if scaled else 1.0)


def step_that_overflows(strategy: str, orig: bool) -> tuple[bool, float]:
    """Rank 0's loss alone is infinite. Whether the parameters stayed, and the scale at the end."""
    model = models.wrapped(strategy, orig)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    handle = attached(model, optimizer)
    scaler = ShardedGradScaler(device="cpu", init_scale=SCALE)
    before = models.whole(model)
    factor = math.inf if dist.get_rank() == 0 else 1.0
    scaler.scale(models.loss(model, models.rows(dist.get_rank())) * factor).backward()
    scaler.step(optimizer)
    scaler.update()
    handle.remove()
    after = models.whole(model)
    return all(torch.equal(after[name], value) for name, value in before.items()), scaler.get_scale()


def test_all_ranks_skip_an_overflow_and_halve_the_scale(ranks):
    for cells in ranks(2, models.each, step_that_overflows, CELLS):
        assert cells == [(True, SCALE / 2)] * len(CELLS)


def skipped_in_low_precision(strategy: str, orig: bool) -> list[tuple[torch.dtype, bool]]:
    """The gradients' dtypes after a skipped step, and whether they are those from before it."""
    precision = MixedPrecision(param_dtype=torch.bfloat16, keep_low_precision_grads=True)
    model = models.wrapped(strategy, orig, mixed_precision=precision)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    handle = attached(model, optimizer)
    (models.loss(model, models.rows(dist.get_rank())) * math.nan).backward()
    held = [parameter for parameter in model.parameters() if parameter.grad is not None]
    pointers = [parameter.grad.data_ptr() for parameter in held]
    optimizer.step()
    handle.remove()
    assert handle.last is not None and not handle.last.is_finite
    return [(p.grad.dtype, p.grad.data_ptr() == pointer) for p, pointer in zip(held, pointers, strict=True)]


def test_low_precision_gradients_are_given_back_after_a_skipped_step(ranks):
    for cells in ranks(2, models.each, skipped_in_low_precision, CELLS):
        for cell, gradients in zip(CELLS, cells, strict=True):
            assert gradients and set(gradients) == {(torch.bfloat16, True)}, cell
