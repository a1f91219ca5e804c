"""What gives an alert, and what doesn't."""

from __future__ import annotations

import json
import logging
import math
import random
from typing import Any

import pytest

from distnorm import Alert
from distnorm.monitor.depth import trends
from distnorm.monitor.history import History
from distnorm.monitor.latch import Latch
from tests.monitor.feeding import layer_row, monitored, ordinary, step_row


def monitored_step(monitor: Any, step: int, norms: dict[str, float]) -> None:
    monitor.layers(step, [layer_row(name, norm) for name, norm in norms.items()])


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("seed", range(3))
def test_a_clean_run_of_200_steps_says_nothing(every: int, seed: int, caplog: Any) -> None:
    monitor, alerts = monitored({})
    norms_of = dict(ordinary(seed, 200, every))
    for step in range(1, 201):
        monitor.step(step_row(step, clipped=True))
        if step in norms_of:
            monitored_step(monitor, step, norms_of[step])
    assert alerts == []
    assert caplog.records == []


@pytest.mark.parametrize(
    ("times", "kind"), [(1e-12, "vanishing"), (1e-4, "vanishing"), (100.0, "exploding"), (1e3, "exploding")]
)
@pytest.mark.parametrize("seed", range(3))
def test_a_planted_layer_gives_an_alert_at_the_next_monitored_step_and_once(
    times: float, kind: str, seed: int, caplog: Any
) -> None:
    monitor, alerts = monitored({})
    planted = "blocks.3.mlp.weight"
    for step, norms in ordinary(seed, 200, 5):
        if step > 151:
            norms[planted] *= times
        monitored_step(monitor, step, norms)
    (alert,) = alerts
    assert (alert.step, alert.kind, alert.layer) == (155, kind, planted)
    assert (alert.value < alert.bound) == (kind == "vanishing")  # type: ignore[operator]
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("distnorm", logging.WARNING)
    assert f"step 155: {kind}: {planted}" in record.getMessage()


def test_history_is_the_weighted_mean_of_logarithms() -> None:
    rng = random.Random(0)
    norms = [0.3 * math.exp(rng.uniform(-0.5, 0.5)) for _ in range(40)]
    history = History()
    for norm in norms:
        history.add(norm, 10.0, 5)
    weights = [0.9 ** (len(norms) - 1 - i) for i in range(len(norms))]
    mean = sum(w * math.log(n) for w, n in zip(weights, norms, strict=True)) / sum(weights)
    assert history.average == pytest.approx(math.exp(mean), rel=1e-12)
    variance, before = math.log(2) ** 2, math.log(norms[0])
    for i, norm in enumerate(norms[1:], start=1):
        variance = 0.9 * variance + 0.1 * (math.log(norm) - before) ** 2
        seen = weights[-1 - i :]
        before = sum(w * math.log(n) for w, n in zip(seen, norms, strict=False)) / sum(seen)
    assert history.variance == pytest.approx(variance, rel=1e-12)
    # Calm layers explode at the factor; however restless, none later than at its 1.5th power.
    assert history.reach(10.0) == pytest.approx(10.0)
    history.variance = 100.0
    assert history.reach(10.0) == pytest.approx(10**1.5)


def test_history_takes_nothing_from_what_is_not_finite_or_zero() -> None:
    history, other = History(), History()
    for norm in (1.0, math.nan, 2.0, 0.0, math.inf, 3.0):
        history.add(norm, 10.0, 5)
        if norm in (1.0, 2.0, 3.0):
            other.add(norm, 10.0, 5)
    assert history.state() == other.state()


def test_an_outlier_moves_the_average_by_its_reach_only() -> None:
    history = History()
    for _ in range(30):
        history.add(1.0, 10.0, 5)
    history.add(1e-12, 10.0, 5)
    assert history.average == pytest.approx(10 ** (-0.1 / (1 - 0.9**31)), rel=1e-9)


def alerted(values: list[float], bound: float, laxer: float, cooldown: int) -> list[int]:
    """Plain hysteresis and cool-down."""
    steps, armed, last = [], True, -math.inf
    for step, value in enumerate(values):
        if value <= laxer:
            armed = True
        if value > bound and armed and step - last >= cooldown:
            steps.append(step)
            armed, last = False, step
    return steps


@pytest.mark.parametrize("cooldown", [1, 7, 40])
def test_a_latch_is_hysteresis_and_cool_down(cooldown: int) -> None:
    rng = random.Random(cooldown)
    values, latch = [rng.uniform(0, 4) for _ in range(300)], Latch(cooldown)
    fired = [
        step
        for step, value in enumerate(values)
        if latch.fires(("exploding", "a"), step, beyond=value > 3.0, back=value <= 1.0)
    ]
    assert fired == alerted(values, 3.0, 1.0, cooldown)
    assert len(fired) > 2


def test_the_clip_rate_is_that_of_the_window_and_an_alert_beyond_its_bound() -> None:
    rng = random.Random(5)
    clipped = [step < 3 or rng.random() < (0.5, 0.9, 0.1)[step // 40 % 3] for step in range(480)]
    bounds = {"clip_rate": 0.5, "hysteresis": 2.0, "cooldown": 20}
    monitor, alerts = monitored({"clip_rate_window": 8, "alerts": bounds})
    rates = [monitor.step(step_row(step, hit))["clip_rate"] for step, hit in enumerate(clipped, start=1)]
    expected = [sum(clipped[max(0, i - 7) : i + 1]) / min(8, i + 1) for i in range(len(clipped))]
    assert rates == expected
    full = [rate if i >= 7 else 0.0 for i, rate in enumerate(expected)]
    assert [alert.step - 1 for alert in alerts] == alerted(full, 0.5, 0.25, 20)
    assert len(alerts) > 2
    assert alerted(full, 0.5, 0.25, 20) != alerted(full, 0.5, 0.5, 20)
    assert {(alert.kind, alert.layer, alert.bound) for alert in alerts} == {("clip_rate", None, 0.5)}


def test_zero_is_vanishing_after_three_steps_and_only_where_there_was_a_gradient() -> None:
    monitor, alerts = monitored({"alerts": {"warmup": 2}})
    for step, norm in enumerate([1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0], start=1):
        monitored_step(monitor, step, {"a": norm, "unused": 0.0})
    assert [(alert.step, alert.layer) for alert in alerts] == [(8, "a")]


def test_a_slow_decline_is_vanishing_under_the_bound() -> None:
    monitor, alerts = monitored({"alerts": {"vanishing": 1e-6}})
    for step in range(1, 200):
        monitored_step(monitor, step, {"a": 10 ** (-step / 20), "always small": 1e-8})
    assert [(alert.step, alert.kind, alert.layer) for alert in alerts] == [(121, "vanishing", "a")]
    assert alerts[0].bound == 1e-6


def test_norms_that_fall_with_depth_are_vanishing_from_the_first_monitored_step() -> None:
    for names in ("blocks.{}.w", "{}.weight", "depth {}", "stage/{}/w"):
        monitor, alerts = monitored({})
        for step in (10, 20):
            monitored_step(monitor, step, {names.format(i): 10.0 ** (i - 8) for i in range(8)})
        (alert,) = alerts
        assert (alert.step, alert.kind, alert.bound) == (10, "vanishing", 1e-4)
        assert alert.layer == names.format(0).partition("0")[0] + "0"
        assert alert.value == pytest.approx(1e-7)


def test_a_trend_is_that_of_most_blocks() -> None:
    # A block's norm is over its rows; three and four of them; one that vanished is no trend.
    def rows(norms: list[float]) -> list[Any]:
        return [layer_row(f"b.{i}.{name}", norm / 5 * k) for i, norm in enumerate(norms) for name, k in PARTS]

    assert trends(rows([1.0, 10.0, 100.0])) == []
    (trend,) = trends(rows([1000.0, 100.0, 10.0, 1.0]))
    assert (trend.low, trend.high, trend.ratio) == ("b.3", "b.0", pytest.approx(1e-3))
    for where in range(4):
        norms = [1.0] * 4
        norms[where] = 1e-12
        (trend,) = trends(rows(norms))
        assert trend.ratio == pytest.approx(1.0)
    assert trends(rows([1.0, 0.0, math.nan, math.inf, 1.0, 1.0])) == []


PARTS = (("w", 3.0), ("v", 4.0))


def test_non_finite_is_one_alert_for_each_place_and_counted() -> None:
    monitor, alerts = monitored({})
    nan = math.nan
    counts = []
    for step, norm in enumerate([1.0, nan, math.inf, 1.0, nan, nan], start=1):
        where = {"parameter": "head.weight", "ranks": [2, 5]} if step == 2 else {}
        monitor.step(step_row(step, norm=norm), **where)
        counts.append(monitor.non_finite_in_a_row)
    assert counts == [0, 1, 2, 0, 1, 2]
    assert [(alert.step, alert.layer, alert.ranks) for alert in alerts] == [
        (2, "head.weight", (2, 5)),
        (3, None, None),
    ]
    assert alerts[0].message == "head.weight: the norm is nan on ranks 2, 5"
    assert alerts[1].message == "the norm is inf"


def test_non_finite_is_an_alert_again_after_a_finite_step_and_the_cool_down() -> None:
    monitor, alerts = monitored({"alerts": {"cooldown": 5}})
    for step in range(1, 30):
        monitor.step(step_row(step, norm=math.nan if step < 10 or step in (12, 13, 15, 20) else 1.0))
    assert [alert.step for alert in alerts] == [1, 12, 20]


def test_a_layer_that_grows_from_nothing_or_is_not_finite_does_not_explode() -> None:
    monitor, alerts = monitored({})
    growing = [0.0, 1e-6, 1e-3, 0.1, 0.2, 0.3, 0.4, 0.5, *[0.5] * 20]
    for step, norm in enumerate(growing, start=1):
        monitored_step(
            monitor,
            step,
            {"a": norm, "b": math.inf if step > 20 else 1.0, "c": 1.0 if step % 9 else math.nan},
        )
    assert alerts == []


def test_diverged_replicas_are_an_alert_again_after_the_cool_down() -> None:
    monitor, alerts = monitored({"alerts": {"cooldown": 20}})
    for step in range(10, 50, 10):
        monitor.diverged(step, "a.weight", [3])
    monitor.diverged(40, "b.weight", [1])
    assert [(alert.step, alert.layer, alert.ranks) for alert in alerts] == [
        (10, "a.weight", (3,)),
        (30, "a.weight", (3,)),
        (40, "b.weight", (1,)),
    ]


def test_null_switches_a_rule_off() -> None:
    off = {"vanishing": None, "drop": None, "falling": None, "exploding": None, "non_finite": False}
    monitor, alerts = monitored({"alerts": off})
    for step in range(1, 30):
        monitored_step(
            monitor, step, {f"b.{i}": 10.0 ** (-3 * i) * (1e-9 if step > 20 else 1) for i in range(5)}
        )
        monitored_step(monitor, step, {"a": 1e6 if step > 20 else 1.0})
        monitor.step(step_row(step, norm=math.nan))
    assert alerts == []


def test_a_spike_in_all_layers_is_one_log_line_and_an_alert_for_each(caplog: Any) -> None:
    monitor, alerts = monitored({})
    for step in range(1, 30):
        monitored_step(monitor, step, {f"layer.{i}x": 1e4 if step == 20 else 1.0 for i in range(300)})
    assert len(alerts) == 300
    (record,) = caplog.records
    assert record.getMessage().endswith("(and 299 more like it)")


def test_a_callback_that_raises_is_named_once_and_stops_nothing(caplog: Any) -> None:
    monitor, alerts = monitored({"alerts": {"cooldown": 1}})
    calls = []

    def broken(alert: Alert) -> None:
        calls.append(alert)
        raise RuntimeError("no such pager")

    monitor.on_alert(broken)
    for step in range(1, 5):
        monitor.diverged(step, "a", [1])
    assert calls == alerts and len(alerts) == 4
    assert sum("no such pager" in record.getMessage() for record in caplog.records) == 1


def test_resumed_in_mid_run_the_alerts_are_the_same() -> None:
    bounds = {"clip_rate_window": 20, "alerts": {"clip_rate": 0.3, "cooldown": 10}}
    rng = random.Random(7)
    clipped = [rng.random() < 0.4 for _ in range(200)]

    def run(monitor: Any, first: int, last: int) -> list[dict[str, Any]]:
        rows = []
        for step, norms in ordinary(3, 200, 1):
            if first <= step <= last:
                norms["blocks.1.attn.weight"] *= 1e3 if 90 <= step < 100 else 1e-6 if step > 170 else 1
                rows.append(
                    monitor.step(step_row(step, clipped[step - 1], math.nan if 98 < step < 103 else 1))
                )
                monitored_step(monitor, step, norms)
                del rows[-1]["time"]  # when it was written
                rows[-1]["in a row"] = monitor.non_finite_in_a_row
        return rows

    straight, expected = monitored(bounds)
    rows = run(straight, 1, 200)
    for at in (50, 95, 100, 172):
        before, alerts = monitored(bounds)
        half = run(before, 1, at)
        after, others = monitored(bounds)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        resumed = [*half, *run(after, at + 1, 200)]
        assert repr(resumed) == repr(rows)
        assert repr(alerts + others) == repr(expected)  # NaN, which equals nothing, included
        assert after.state_dict() == straight.state_dict()
    assert {alert.kind for alert in expected} == {"clip_rate", "exploding", "vanishing", "non_finite"}


def test_an_error_of_a_step_that_has_a_row_is_counted_once() -> None:
    monitor, _ = monitored({})
    monitor.step(step_row(1, norm=math.nan))
    monitor.not_finite(1, math.nan, parameter="a", ranks=[0])  # on an accelerator raised one step later
    assert monitor.non_finite_in_a_row == 1
    monitor.not_finite(2, math.nan)  # on the CPU raised at once, without a row
    assert monitor.non_finite_in_a_row == 2
