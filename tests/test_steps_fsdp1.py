"""Whole steps of a model under FSDP1: what is not finite, the monitor's rows, its stop, and a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import distnorm
from tests import fsdp1_models as models

FP32 = 1e-5  # forward and backward of the net in fp32, against fp64
MAX_NORM = 0.125
CELLS = [(s, orig) for s in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD") for orig in (False, True)]


def spoilt(model: torch.nn.Module, *, step: int = 0) -> None:
    """A backward in which rank 1's loss alone is NaN."""
    factor = math.nan if dist.get_rank() == 1 else 1.0
    (models.loss(model, models.rows(dist.get_rank(), step)) * factor).backward()


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    """All that is there, with a number for each NaN, so that equal ones are equal."""
    return [p.grad.nan_to_num(5.0) for p in model.parameters() if p.grad is not None]


def after_a_nan(strategy: str, orig: bool) -> dict[str, str]:
    found = {}
    for mode in ("raise", "raise_now", "skip", "zero", "propagate"):
        model = models.wrapped(strategy, orig)
        clipper = distnorm.GradClipper(model, {"clip": {"max_norm": MAX_NORM, "nonfinite": mode}})
        models.backward(model)
        next(p.grad for p in model.parameters() if p.grad is not None and p.grad.numel()).view(-1)[0] = (
            math.nan
        )
        before = gradients(model)
        try:
            result = clipper.clip()
        except distnorm.NonFiniteGradientError as error:
            found[mode] = f"raised {'on rank' in str(error)}, counted {clipper.state_dict()['steps']}"
        else:
            found[mode] = f"skipped {bool(result.skipped)}, finite {bool(result.is_finite)}"
        after = gradients(model)
        same = all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        zero = not any(bool(gradient.count_nonzero()) for gradient in after)
        found[mode] += ", zero" if zero else ", unchanged" if same else ", changed"
        model.zero_grad()
        models.backward(model)
        found[mode] += f", then {bool(clipper.clip().is_finite)}"
    return found


@pytest.mark.slow
def test_every_mode_of_a_step_that_is_not_finite(ranks):
    expected = {
        "raise": "raised True, counted 0, unchanged, then True",
        "raise_now": "raised True, counted 0, unchanged, then True",
        "skip": "skipped True, finite False, unchanged, then True",
        "zero": "skipped False, finite False, zero, then True",
        "propagate": "skipped False, finite False, changed, then True",
    }
    for cells in ranks(2, models.each, after_a_nan, CELLS):
        for cell, found in zip(CELLS, cells, strict=True):
            assert found == expected, cell


def rows(folder: Path, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


def watched(strategy: str, folder: Path) -> list[str]:
    """Five steps, of which the third and fourth are not finite; the steps that raise."""
    model = models.wrapped(strategy, True)
    monitor = {"every": 1, "replicas": True, "stop_after": 2, "dir": str(folder / strategy)}
    clipper = distnorm.GradClipper(
        model, {"clip": {"max_norm": MAX_NORM, "nonfinite": "skip"}, "monitor": monitor}
    )
    raised = []
    for step in range(5):
        model.zero_grad()
        if step in (2, 3):
            spoilt(model, step=step)
        else:
            models.backward(model, step)
        try:
            clipper.clip()
        except distnorm.NonFiniteGradientError as error:
            raised.append(str(error))
    clipper.close()
    return raised


@pytest.mark.parametrize(("world", "strategy"), [(2, "FULL_SHARD"), (2, "NO_SHARD"), (4, "HYBRID_SHARD")])
def test_rows_are_the_dense_ones_and_stop_after_stops_after_its_row(ranks, tmp_path, world, strategy):
    for raised in ranks(world, watched, strategy, tmp_path):
        assert [message[:18] for message in raised] == ["monitor.stop_after"]
        assert raised[0].endswith("found 2, the last of them step 4")
    steps = rows(tmp_path / strategy, "metrics.jsonl")
    assert [(row["step"], row["finite"]) for row in steps] == [(i, i not in (3, 4)) for i in range(1, 6)]
    layers = rows(tmp_path / strategy, "layers.jsonl")
    for step in (0, 1, 4):
        exact = models.dense_gradients(range(world), (step,))
        assert steps[step]["grad_norm"] == pytest.approx(models.dense_norm(exact), rel=FP32)
        found = {row["layer"]: row for row in layers if row["step"] == step + 1}
        assert found.keys() == exact.keys()
        for name, gradient in exact.items():
            assert found[name]["norm"] == pytest.approx(float(gradient.norm()), rel=FP32), name
            assert found[name]["max"] == pytest.approx(float(gradient.abs().max()), rel=FP32), name
    alerts = rows(tmp_path / strategy, "alerts.jsonl")
    assert [alert["step"] for alert in alerts if alert["kind"] == "non_finite"] == [3]
    assert not [alert for alert in alerts if alert["kind"] == "divergence"]


POLICY = {"clip": {"policy": {"name": "zclip", "warmup": 2, "z_t": 0.5}, "nonfinite": "skip"}}


def clipped_on(strategy: str, orig: bool, steps: Sequence[int], state: Any) -> tuple[list[Any], Any]:
    """Thresholds and norms of steps at the same weights, from a clipper's state on."""
    model = models.wrapped(strategy, orig)
    clipper = distnorm.GradClipper(model, POLICY)
    if state is not None:
        clipper.load_state_dict(json.loads(state))
    found = []
    for step in steps:
        model.zero_grad()
        models.backward(model, step)
        result = clipper.clip()
        found.append((float(result.total_norm), float(result.threshold)))
    return found, json.dumps(clipper.state_dict())


def test_a_run_goes_on_under_another_strategy(ranks):
    through, _ = models.same_on_all(ranks(2, clipped_on, "FULL_SHARD", True, range(6), None))
    first, state = models.same_on_all(ranks(2, clipped_on, "FULL_SHARD", False, range(4), None))
    rest, state = models.same_on_all(ranks(2, clipped_on, "NO_SHARD", True, range(4, 6), state))
    assert json.loads(state)["steps"] == 6
    assert [value for pair in first + rest for value in pair] == pytest.approx(
        [value for pair in through for value in pair], rel=FP32
    )
    assert math.isfinite(through[-1][1])
