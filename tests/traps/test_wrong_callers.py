"""What the code around a step does: callbacks, hooks, and arguments or dtypes of some ranks only."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distnorm
from distnorm.measure import diagnosis
from tests import oracle
from tests.refusals import TIMEOUT, Heard, heard, rank

SIZE = 4096

# ---- callbacks


def dropped(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def replaced(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.full((SIZE,), 7.0)


def freed(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.untyped_storage().resize_(0)


def raising(parameters: list[nn.Parameter]) -> None:
    raise RuntimeError("the callback's own")


@pytest.mark.parametrize("react", [dropped, replaced, freed, raising], ids=lambda f: f.__name__)
@pytest.mark.parametrize("overlap", [False, True])
def test_an_alert_s_callback_comes_after_the_scaling(react, overlap):
    parameters = [nn.Parameter(torch.zeros(SIZE)) for _ in range(3)]
    config = {
        "clip": {"max_norm": 1.0, "nonfinite": "propagate", "overlap": overlap},
        "monitor": {"every": 1},
    }
    clipping = distnorm.GradClipper(parameters, config)
    bystanders: list[Tensor] = []
    when: list[int] = []

    def on_alert(alert: Any) -> None:
        when.append(step)
        react(parameters)
        bystanders.extend(torch.ones(SIZE) for _ in range(6))  # whatever is allocated next

    assert clipping.monitor is not None
    clipping.monitor.on_alert(on_alert)
    for step in range(16):
        gradients = [torch.full((SIZE,), 1e6 if step == 12 else 1.0) for _ in parameters]
        expected = oracle.dense_of(gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        called = len(when)
        assert heard(clipping.clip) == ("", pytest.approx(expected, rel=1e-6))
        if len(when) == called or react is not freed:  # what was scaled is what was measured
            assert oracle.dense_of(gradients) == pytest.approx(1.0, rel=1e-5)
    clipping.flush()
    assert when
    assert all(bool((bystander == 1).all()) for bystander in bystanders)


# ---- optimizers that step inside backward


@pytest.mark.parametrize("leaves", [0, 1])
def test_hooks_that_take_gradients_away_are_refused_or_told_of(leaves, caplog, monkeypatch):
    """With no gradient left the norm would be 0, with some of them that of the rest."""
    monkeypatch.setattr(diagnosis, "_said", set())
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2, bias=False))
    parameters = list(model.parameters())

    def step_at_once(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in parameters[leaves:]:
        parameter.register_post_accumulate_grad_hook(step_at_once)
    clipping = distnorm.GradClipper(model, {"clip": {"max_norm": 1.0}})
    for call in (clipping.clip, lambda: distnorm.clip_grad_norm_(parameters, 1.0)):
        model.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        with caplog.at_level(logging.WARNING, "distnorm"):
            error, _ = heard(call)
        assert error == ("" if leaves else "UnsupportedGradientError")
    told = [record.getMessage() for record in caplog.records if "hook that runs when" in record.getMessage()]
    assert len(told) == leaves
    assert all("'0.bias'" in message for message in told)


# ---- arguments and dtypes of some ranks only


def with_another_threshold() -> list[tuple[Heard, list[float]]]:
    parameter, said = nn.Parameter(torch.zeros(4)), []
    for threshold in (1.0 + rank(), 1.0, math.inf if rank() else 1.0, math.nan if rank() else 1.0, 1.0):
        parameter.grad = torch.full((4,), 5.0)
        said.append(
            (heard(lambda t=threshold: distnorm.clip_grad_norm_([parameter], t)), parameter.grad.tolist())
        )
    return said


def test_another_threshold_on_each_rank_poisons_nothing(ranks):
    for said in ranks(2, with_another_threshold, timeout=TIMEOUT):
        assert [bool(error) for (error, _), _ in said] == [True, False, True, True, False]
        for (error, _), gradient in said:
            expected = 5.0 if error else 0.5 / (1 + 1e-7)
            assert gradient == pytest.approx([expected] * 4, rel=1e-6)


def double_on_the_last_rank(dtype: torch.dtype, scale: float) -> list[tuple[torch.dtype, float, float]]:
    named = [("everybody's", nn.Parameter(torch.zeros(3)))]
    named[0][1].grad = torch.zeros(3)
    if rank() == torch.distributed.get_world_size() - 1:
        wide = nn.Parameter(torch.zeros(2, dtype=dtype))
        wide.grad = torch.tensor([3.0, 4.0], dtype=dtype) * scale
        named.append(("wide", wide))
    gradients = [(name, parameter.grad) for name, parameter in named]
    calls: list[Callable[[], Tensor]] = [
        lambda: distnorm.get_total_norm(gradients),
        lambda: distnorm.clip_grad_norm_(named, scale),
    ]
    found = [call() for call in calls]
    after = distnorm.get_total_norm(gradients)
    distnorm.clip_grads_with_norm_(named, scale / 10, after)
    last = distnorm.get_total_norm(gradients)
    return [(norm.dtype, float(norm), float(last)) for norm in found]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("scale", [1e60, 1e-50])
def test_doubles_of_one_rank_beyond_fp32s_range(ranks, dtype, scale):
    results = ranks(3, double_on_the_last_rank, dtype, scale, timeout=TIMEOUT)
    assert all(result == results[0] for result in results)
    once = scale / (5 * scale + 1e-6) * 5 * scale
    twice = min(1.0, scale / 10 / (once + 1e-6)) * once
    for kind, norm, last in results[0]:
        assert (kind, norm) == (torch.float64, pytest.approx(5 * scale, rel=1e-15))
        assert last == pytest.approx(twice, rel=1e-14, abs=0)
