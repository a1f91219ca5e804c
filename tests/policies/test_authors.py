"""Policies beside what their authors' code computes, number by number.

The formulas are those of the code, written anew from reading it: ZClip (bluorion-com/ZClip), AutoClip
(pseeth/autoclip), AdaGC (`ClipGradByAdaptiveNorm` of PaddlePaddle's trainers) and AGGC (ZhiyuanLi218/AGGC).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy
import pytest

from distnorm.policies import AdaGc, Aggc, Percentile, Policy, ZClip
from tests.policies.recorded import INF, NAMES, NORMS, f32, parameter_norms, play

FINITE = [f32(norm) for norm in NORMS if math.isfinite(norm)]
NEAR = {"rel": 1e-6}  # a clip coefficient's own 1e-6 stands in one place or another


def after(policy: Policy, norms: list[float]) -> list[float]:
    """The norm after clipping, of each step."""
    return [norm * decision.coef.item() for norm, decision in zip(norms, play(policy, norms), strict=True)]


# ---- ZClip


def zclip_code(
    mode: str, option: str, factor: float, skips: bool, alpha: float = 0.97, z: float = 2.5, warmup: int = 25
) -> Iterator[float]:
    first = FINITE[:warmup]
    yield from first
    mean = sum(first) / warmup
    variance = sum((x - mean) ** 2 for x in first) / warmup
    for norm in FINITE[warmup:]:
        deviation, value = variance**0.5, None
        score = (norm - mean) / (deviation + 1e-6)
        if mode == "percentile":
            value = mean + z * deviation if norm > mean + z * deviation else None
        elif score > z:
            scaled = (mean + z * deviation / (score / z)) * factor
            value = scaled if option == "adaptive_scaling" else mean
        taken = norm if value is None else value
        yield min(norm, taken)
        if value is None or not skips:
            mean = alpha * mean + (1 - alpha) * taken
            variance = alpha * variance + (1 - alpha) * (taken - mean) ** 2


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize(
    ("mode", "option", "factor"),
    [
        ("zscore", "adaptive_scaling", 1.0),
        ("zscore", "adaptive_scaling", 0.6),
        ("zscore", "mean", 1.0),
        ("percentile", "adaptive_scaling", 1.0),
    ],
)
def test_zclip(mode: str, option: str, factor: float, skips: bool) -> None:
    policy = ZClip(mode=mode, clip_option=option, clip_factor=factor, skip_update_on_spike=skips)
    expected = list(zclip_code(mode, option, factor, skips))
    assert after(policy, FINITE) == pytest.approx(expected, **NEAR)
    assert sum(x < norm for x, norm in zip(expected, FINITE, strict=True)) > 3


# ---- AutoClip


def test_autoclip_with_all_of_its_history() -> None:
    norms = FINITE * 8  # more than the first 1024
    expected = [min(x, numpy.percentile(norms[: i + 1], 10.0)) for i, x in enumerate(norms)]
    assert after(Percentile(window=None), norms) == pytest.approx(expected, **NEAR)


def test_a_history_of_all_norms_goes_on_from_a_state_of_any_length() -> None:
    norms = FINITE * 8
    straight, first, second = (Percentile(window=None) for _ in range(3))
    expected = after(straight, norms)
    after(first, norms[:1100])
    second.load_state_dict(first.state_dict())
    fresh = Percentile(window=None)
    fresh.take_over(second)
    assert after(fresh, norms[1100:]) == expected[1100:]
    assert fresh.state_dict() == straight.state_dict()


# ---- AdaGC


def adagc_code(ratio: float, beta: float, eps: float, start: int) -> Iterator[list[float]]:
    """The norms of parameters after clipping; a gradient of 0 is taken for none."""
    known: dict[int, float] = {}
    steps = 0
    for step, total in enumerate(NORMS):
        if not math.isfinite(total):
            continue
        clipped = []
        for i, norm in enumerate(parameter_norms(step, total)):
            average = known.setdefault(i, norm) if norm else known.get(i, INF)
            if not norm:
                clipped.append(0.0)
                continue
            if steps <= start:
                clipped.append(norm * min(1.0, 1.0 / (f32(total) + eps)))
                known[i] = min(average, norm)
                continue
            kept = norm
            clipped.append(norm)
            if norm > ratio * average:
                clipped[-1] = norm * ratio * average / (norm + eps)
                kept = ratio * average
            known[i] = beta * average + (1 - beta) * kept
        steps += 1
        yield clipped


@pytest.mark.parametrize(("ratio", "beta", "start"), [(1.04, 0.99, 100), (1.03, 0.98, 9)])
def test_adagc_as_its_code_has_it(ratio: float, beta: float, start: int) -> None:
    policy = AdaGc(
        nonfinite="skip", lambda_=ratio, beta=beta, warmup=start + 1, eps=1e-8, warmup_gamma="unclipped"
    )
    policy.bind(NAMES)
    expected, clips = adagc_code(ratio, beta, 1e-8, start), 0
    for step, decision in enumerate(play(policy)):
        if math.isfinite(NORMS[step]):
            norms, exact = parameter_norms(step, NORMS[step]), next(expected)
            assert decision.each is not None
            found = [norm * h for norm, h in zip(norms, decision.each.tolist(), strict=True)]
            assert found == pytest.approx(exact, rel=1e-12), step
            clips += step > start and min(decision.each.tolist()) < 1
    assert clips > 3


# ---- AGGC

SETTINGS: list[dict[str, Any]] = [
    {},
    {"high": 1.2, "low": 0.9, "raise_small": True, "max_down": None, "max_up": None, "min_norm": 1.05},
    {"high": 1.3, "raise_small": True, "total_steps": 150, "high_late": 1.05, "beta": 0.8},
    {"high": 0.7, "high_late": None, "low_late": None, "total_steps": 100, "raise_small": True},
]


def aggc_code(
    beta: float = 0.95,
    low: float = 0.95,
    high: float = 0.6,
    min_norm: float = 0.0,
    raise_small: bool = False,
    max_down: float | None = 0.9,
    max_up: float | None = 1.1,
    low_late: float | None = 0.98,
    high_late: float | None = 0.7,
    total_steps: int | None = None,
    switch: float = 0.4,
    transition: float = 0.3,
) -> Iterator[float]:
    mean = 0.0
    for step, norm in enumerate(FINITE):
        share = 0.0 if total_steps is None else min(1.0, step / total_steps)
        part = min(1.0, max(0.0, (share - switch) / transition))
        now_low = low * (1 - part) + (low_late or low) * part
        now_high = high * (1 - part) + (high_late or high) * part
        scale = 1.0
        if mean * now_high > 0 and norm > mean * now_high + 1e-12:
            scale = max(mean * now_high / (norm + 1e-12), max_down or 0.0)
        elif raise_small and norm < max(min_norm, mean * now_low) - 1e-12:
            scale = min(max(min_norm, mean * now_low) / (norm + 1e-12), max_up or INF)
        yield norm * scale
        mean = beta * mean + (1 - beta) * norm * scale


@pytest.mark.parametrize("settings", SETTINGS)
def test_aggc(settings: dict[str, Any]) -> None:
    expected = list(aggc_code(**settings))
    assert after(Aggc(**settings), FINITE) == pytest.approx(expected, rel=1e-12)
    changes = [x / norm for x, norm in zip(expected, FINITE, strict=True)]
    assert min(changes) < 1 and (max(changes) > 1 or not settings.get("raise_small"))
