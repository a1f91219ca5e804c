"""Every policy against its formula in plain Python, over a recorded series."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

import numpy
import pytest
import torch

from distnorm.policies import (
    AdaGc,
    Agc,
    Constant,
    Decision,
    Percentile,
    PerTensor,
    Policy,
    Schedule,
    SkipSpikes,
    Value,
    ZClip,
    constant,
)
from tests.policies.recorded import INF, NAMES, NAN, NORMS, NUMELS, f32, fp64, parameter_norms, play, seen

Expected = Iterator[tuple[float, float]]  # threshold and coefficient

MODES = {"raise": 1.0, "skip": 1.0, "zero": 0.0}


def near(value: float) -> object:
    return pytest.approx(value, rel=1e-11, nan_ok=True)


def clipped_to(threshold: float, norm: float) -> float:
    return 1.0 if threshold == INF else min(1.0, threshold / (norm + 1e-6))


def compare(decisions: list[Decision], expected: Expected, nonfinite: str) -> None:
    some = 0
    for norm, decision, (threshold, coef) in zip(NORMS, decisions, expected, strict=True):
        assert decision.threshold.item() == near(threshold)
        if math.isfinite(norm):
            assert decision.coef.item() == near(coef)
            some += coef < 1
        elif nonfinite in MODES:
            assert decision.coef.item() == MODES[nonfinite]
        assert (decision.zero_unless is not None) == (nonfinite == "zero")
    assert some > 1, "the series clips"


def constant_expected(c: float) -> Expected:
    for norm in NORMS:
        yield c, clipped_to(c, norm)


def percentile_expected(p: float, window: int, bound: float) -> Expected:
    history: list[float] = []
    for norm in NORMS:
        if math.isfinite(norm):
            history = [*history, f32(norm)][-window:]
        ordered = sorted(history)
        at = p / 100 * (len(ordered) - 1)
        below = math.floor(at) if ordered else 0
        pair = ordered[below : below + 2]
        c = INF if not pair else pair[0] + (pair[-1] - pair[0]) * (at - below)
        c = min(c, bound)
        yield c, clipped_to(c, norm)


def zclip_expected(alpha: float, z_t: float, warmup: int, bound: float) -> Expected:
    collected: list[float] = []
    mean = variance = 0.0
    for norm in NORMS:
        x = f32(norm)
        if len(collected) < warmup:
            yield bound, clipped_to(bound, norm)
            if math.isfinite(x):
                collected.append(x)
                mean, variance = statistics.fmean(collected), statistics.pvariance(collected)
            continue
        sigma = math.sqrt(variance)
        z = (x - mean) / (sigma + 1e-6)
        threshold = mean + z_t * sigma * z_t / z if z > z_t else INF
        edge = mean + z_t * (sigma + 1e-6) if threshold == INF else threshold
        yield min(edge, bound), clipped_to(min(threshold, bound), norm)
        if math.isfinite(x):
            x = min(x, threshold)
            mean = alpha * mean + (1 - alpha) * x
            variance = alpha * variance + (1 - alpha) * (x - mean) ** 2


@pytest.mark.parametrize("nonfinite", [*MODES, "propagate"])
def test_constant(nonfinite: str) -> None:
    compare(play(Constant(1.5, nonfinite)), constant_expected(1.5), nonfinite)


@pytest.mark.parametrize("nonfinite", MODES)
@pytest.mark.parametrize(
    ("p", "window", "bound"), [(10.0, 1024, INF), (90.0, 16, INF), (0.0, 3, INF), (100.0, 40, 2.0)]
)
def test_percentile(p: float, window: int, bound: float, nonfinite: str) -> None:
    policy = Percentile(bound, nonfinite, p=p, window=window)
    compare(play(policy), percentile_expected(p, window, bound), nonfinite)


def test_percentile_is_numpy_s() -> None:
    norms = [f32(norm) for norm in NORMS if math.isfinite(norm)]
    for p in (0.0, 12.5, 50.0, 99.0):
        last = play(Percentile(p=p, window=64), norms)[-1]
        assert last.threshold.item() == pytest.approx(numpy.percentile(norms[-64:], p), rel=1e-15)


@pytest.mark.parametrize("nonfinite", MODES)
@pytest.mark.parametrize(
    ("alpha", "z_t", "warmup", "bound"),
    [(0.97, 2.5, 25, INF), (0.97, 2.5, 25, 2.2), (0.8, 1.5, 2, INF), (0.9, 2.5, 60, INF)],
)
def test_zclip(alpha: float, z_t: float, warmup: int, bound: float, nonfinite: str) -> None:
    policy = ZClip(bound, nonfinite, alpha=alpha, z_t=z_t, warmup=warmup)
    compare(play(policy), zclip_expected(alpha, z_t, warmup, bound), nonfinite)


def test_zclip_clips_a_planted_spike_and_nothing_in_warm_up() -> None:
    coefs = [decision.coef.item() for decision in play(ZClip(nonfinite="skip"))]
    assert coefs[9] == 1.0
    assert coefs[40] < 0.5


def skip_expected(values: list[float], k: float, window: int, after: int, above: float) -> Iterator[bool]:
    history: list[float] = []
    for norm, value in zip(NORMS, values, strict=True):
        limit = above
        if len(history) >= after:
            limit = min(above, statistics.fmean(history) + k * statistics.stdev(history))
        finite = math.isfinite(norm)
        yield finite and (value > limit or not math.isfinite(value))
        if finite and math.isfinite(value):
            history = [*history, value][-window:]


@pytest.mark.parametrize(
    ("k", "window", "after", "above"),
    [(6.0, 128, 64, None), (3.0, 16, 8, None), (6.0, 128, 64, 3.0), (2.0, 200, 199, 5.0)],
)
def test_skip_spikes(k: float, window: int, after: int, above: float | None) -> None:
    policy = SkipSpikes(1.5, "skip", k=k, window=window, after=after, above=above)
    decisions = play(policy)
    values = [f32(norm) for norm in NORMS]
    expected = list(skip_expected(values, k, window, after, INF if above is None else above))
    assert [bool(decision.skip) for decision in decisions] == expected
    assert any(expected)
    for norm, decision in zip(NORMS, decisions, strict=True):
        assert decision.coef.item() == near(clipped_to(1.5, norm) if math.isfinite(norm) else 1.0)


def test_skip_spikes_tells_the_norm_above_which_a_step_is_skipped_or_clipped() -> None:
    history = [1.0, 2.0, 3.0, 2.0]
    policies = {c: SkipSpikes(c, k=2.0, window=4, after=4) for c in (1.5, INF)}
    limit = 2.0 + 2.0 * statistics.stdev(history)
    for c, policy in policies.items():
        thresholds = [decision.threshold.item() for decision in play(policy, [*history, 9.0])]
        assert thresholds[:4] == [c] * 4
        assert thresholds[4] == near(min(c, limit))


def test_skip_spikes_on_a_loss() -> None:
    policy = SkipSpikes(1.0, "skip", on="loss", k=3.0, window=16, after=8)
    losses = [4.0 / (1 + step / 50) + 0.01 * (step % 5) for step in range(len(NORMS))]
    losses[3], losses[60], losses[61], losses[62] = NAN, 9.0, INF, -9.0
    found = [
        policy.decide(seen(step, norm, loss))
        for step, (norm, loss) in enumerate(zip(NORMS, losses, strict=True))
    ]
    expected = list(skip_expected([f32(loss) for loss in losses], 3.0, 16, 8, INF))
    assert [bool(decision.skip) for decision in found] == expected
    assert [step for step, skipped in enumerate(expected) if skipped][:3] == [3, 60, 61]
    assert {decision.threshold.item() for decision in found} == {1.0}


def adagc_expected(lam: float, beta: float, warmup: int, c: float) -> Iterator[tuple[float, list[float]]]:
    gamma: list[float | None] = [None] * len(NAMES)
    finite = 0
    for step, total in enumerate(NORMS):
        norms, is_warmup = parameter_norms(step, total), finite < warmup
        if not math.isfinite(total):
            yield c if is_warmup else INF, [1.0] * len(NAMES)
            continue
        coefs = []
        for i, norm in enumerate(norms):
            before = gamma[i]
            if is_warmup:
                h = min(1.0, c / (f32(total) + 1e-6))
                after = h * norm if before is None else min(before, h * norm)
            else:
                h = 1.0 if before is None or norm == 0 else min(1.0, lam * before / norm)
                after = h * norm if before is None else beta * before + (1 - beta) * h * norm
            coefs.append(h)
            gamma[i] = before if norm == 0 else after
        finite += 1
        yield c if is_warmup else INF, coefs


@pytest.mark.parametrize(
    ("lam", "beta", "warmup", "c"), [(1.05, 0.98, 100, 1.0), (1.2, 0.9, 10, 0.5), (1.05, 0.98, 0, 1.0)]
)
def test_adagc(lam: float, beta: float, warmup: int, c: float) -> None:
    policy = AdaGc(nonfinite="skip", lambda_=lam, beta=beta, warmup=warmup, warmup_max_norm=c)
    policy.bind(NAMES)
    some = 0
    for decision, (threshold, coefs) in zip(play(policy), adagc_expected(lam, beta, warmup, c), strict=True):
        assert decision.each is not None
        assert decision.each.tolist() == [near(coef) for coef in coefs]
        assert decision.coef.item() == near(min(coefs))
        assert decision.threshold.item() == threshold
        some += len(set(coefs)) > 1
    assert some > 3


@pytest.mark.parametrize("c", [0.4, 0.0])
@pytest.mark.parametrize("rms", [False, True])
def test_per_tensor(rms: bool, c: float) -> None:
    for step, (total, decision) in enumerate(zip(NORMS, play(PerTensor(c, "skip", rms=rms)), strict=True)):
        norms = parameter_norms(step, total)
        if rms:
            norms = [norm / math.sqrt(max(1, numel)) for norm, numel in zip(norms, NUMELS, strict=True)]
        assert decision.each is not None
        if math.isfinite(total):
            # A gradient of 0 may be multiplied by anything finite.
            expected = [c / max(norm, c) if norm > 0 else None for norm in norms]
            for found, coef in zip(decision.each.tolist(), expected, strict=True):
                assert math.isfinite(found) if coef is None else found == near(coef)
        else:
            assert decision.each.tolist() == [1.0] * 4
        assert decision.threshold.item() == c
        assert decision.coef.item() == decision.each.min().item()


@pytest.mark.parametrize(("lam", "eps"), [(0.01, 1e-3), (0.5, 0.1)])
def test_agc(lam: float, eps: float) -> None:
    for total, decision in zip(NORMS, play(Agc(nonfinite="skip", lambda_=lam, eps=eps)), strict=True):
        pairs = [(total, 5.0), (0.0, 1.0), (0.02, 0.0), (3.0, 400.0)]
        expected = [
            lam * max(weight, eps) / grad if grad > lam * max(weight, eps) else 1.0 for grad, weight in pairs
        ]
        assert decision.each is not None
        assert decision.each.tolist() == [
            near(coef) for coef in (expected if math.isfinite(total) else [1.0] * 4)
        ]
        assert decision.threshold.item() == INF


def test_a_model_without_parameters_or_units() -> None:
    empty = fp64([])
    bound = AdaGc()
    bound.bind(())
    nothing = seen(0, 0.0)
    for policy in (PerTensor(1.0), Agc(), bound):
        nothing = type(nothing)(fp64(0.0), fp64(0.0), None, empty, empty, empty, empty)
        assert policy.decide(nothing).coef.item() == 1.0


POINTS = [(10, 1.0), (20, 0.5), (60, 2.0)]


class At:
    def __init__(self, step: int, factor: float) -> None:
        self.step, self.factor = step, factor


def curve_expected(curve: str, step: int) -> float:
    if step < 10 or curve == "constant":
        return 1.0
    if step >= 60:
        return 2.0
    (s0, f0), (s1, f1) = (POINTS[0], POINTS[1]) if step < 20 else (POINTS[1], POINTS[2])
    t = (step - s0) / (s1 - s0)
    return {
        "linear": f0 * (1 - t) + f1 * t,
        "cosine": f1 + (f0 - f1) * (1 + math.cos(math.pi * t)) / 2,
        "steps": f0,
    }[curve]


@pytest.mark.parametrize("curve", ["constant", "linear", "cosine", "steps"])
def test_schedule(curve: str) -> None:
    points = [] if curve == "constant" else [At(*point) for point in POINTS]
    policy = Schedule(1.5, "skip", curve=curve, points=points, warmup=15, warmup_factor=10.0)
    thresholds = [
        1.5 * curve_expected(curve, step) * (10.0 if step < 15 else 1.0) for step in range(len(NORMS))
    ]
    expected = ((c, clipped_to(c, norm)) for c, norm in zip(thresholds, NORMS, strict=True))
    compare(play(policy), expected, "skip")


@pytest.mark.parametrize("policy", [Schedule(warmup=5, warmup_factor=0.0), Constant(), PerTensor()])
def test_no_max_norm_never_clips(policy: Policy) -> None:
    for decision in play(policy):
        assert (decision.coef.item(), decision.threshold.item(), decision.may_clip) == (1.0, INF, False)
        assert decision.each is None


def test_value_multiplies_nothing() -> None:
    for decision in play(Value(0.25, "zero")):
        assert (decision.coef.item(), decision.threshold.item(), decision.may_clip) == (1.0, INF, False)
        assert (decision.clamp, decision.zero_unless) == (0.25, None)
    assert play(Value(), [1.0])[0].clamp is None


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize(
    "policy", [Percentile(), ZClip(), ZClip(1.0), AdaGc(), Agc(), PerTensor(1.0), SkipSpikes(1.0)]
)
def test_zero_makes_zeros_of_all_and_propagate_lets_the_formula_run(policy: Policy, bad: float) -> None:
    for nonfinite, allowed in (("zero", {0.0}), ("skip", {1.0}), ("raise", {1.0})):
        again = type(policy)(policy._max_norm, nonfinite)
        again.bind(NAMES)
        decision = play(again, [1.0, bad])[1]
        assert {decision.coef.item(), *([] if decision.each is None else decision.each.tolist())} == allowed
        assert (decision.zero_unless is not None) == (nonfinite == "zero")
        assert decision.skip is None or not decision.skip
    propagating = type(policy)(policy._max_norm, "propagate")
    propagating.bind(NAMES)
    decision = play(propagating, [1.0, bad])[1]
    assert decision.zero_unless is None
    if decision.each is None and (isinstance(policy, Percentile) or policy._max_norm == 1.0):
        torch.testing.assert_close(
            decision.coef, constant(fp64(bad), 1.0).coef, equal_nan=True, rtol=0, atol=0
        )


def test_before_there_is_a_threshold_an_infinite_norm_leaves_the_gradients_alone() -> None:
    """inf / inf would make NaN of every gradient."""
    for policy in (ZClip(), Percentile()):
        assert play(policy, [INF])[0].coef.item() == 1.0
