"""States: resumed in mid-series, refused where they don't fit; and nothing is read on the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from distnorm.config import ClipConfig
from distnorm.errors import DistnormError
from distnorm.policies import AdaGc, Percentile, Policy, SkipSpikes, StepStatistics, ZClip, policy_of
from tests.policies.recorded import INF, NAMES, NAN, NORMS, fp64, plain, play, seen, through_json

POLICIES: dict[str, Any] = {
    "constant": "constant",
    "schedule": {
        "name": "schedule",
        "curve": "cosine",
        "points": [{"step": 5, "factor": 1.0}, {"step": 150, "factor": 0.1}],
        "warmup": 60,
        "warmup_factor": 3.0,
    },
    "value": "value",
    "per_tensor": "per_tensor",
    "agc": "agc",
    "percentile": {"name": "percentile", "window": 50},
    "zclip": "zclip",
    "zclip of percentiles": {"name": "zclip", "mode": "percentile", "skip_update_on_spike": True},
    "adagc": "adagc",
    "aggc": {"name": "aggc", "raise_small": True},
    "percentile of all": {"name": "percentile", "window": None},
    "skip_spikes": {"name": "skip_spikes", "k": 3.0},
}


def made(name: str, names: tuple[str, ...] = NAMES) -> Policy:
    max_norm = None if name in ("agc", "adagc", "aggc") else 2.0
    policy = policy_of(ClipConfig(max_norm=max_norm, nonfinite="skip", policy=POLICIES[name]))
    policy.bind(names)
    return policy


@pytest.mark.parametrize("cut", [0, 1, 20, 31, 79, 140])
@pytest.mark.parametrize("name", POLICIES)
def test_resumed_in_mid_series_equals_uninterrupted_bit_for_bit(name: str, cut: int) -> None:
    straight = [plain(decision) for decision in play(made(name))]
    first = made(name)
    before = play(first, NORMS[:cut])
    second = made(name)
    second.load_state_dict(through_json(first))
    assert through_json(second) == through_json(first)
    after = play(second, NORMS[cut:], first=cut)
    assert [plain(decision) for decision in before + after] == straight


@pytest.mark.parametrize("bound_first", [False, True])
def test_another_topology_s_order_of_parameters(bound_first: bool) -> None:
    order = (2, 0, 3, 1)
    straight = [decision.each.tolist() for decision in play(made("adagc")) if decision.each is not None]
    first = made("adagc")
    play(first, NORMS[:120])
    names = tuple(NAMES[i] for i in order)
    second = AdaGc(nonfinite="skip")
    if bound_first:
        second.bind(names)
        second.load_state_dict(through_json(first))
    else:
        second.load_state_dict(through_json(first))
        assert through_json(second) == through_json(first)
        second.bind(names)
    for decision, each in zip(play(second, NORMS[120:], 120, order=order), straight[120:], strict=True):
        assert decision.each is not None
        assert decision.each.tolist() == [each[i] for i in order]


def test_a_parameter_that_comes_later_begins_without_a_history_and_the_others_keep_theirs() -> None:
    policy = made("adagc")
    play(policy, NORMS[:120])
    before = policy.state_dict()["gamma"]
    policy.bind(("new", *reversed(NAMES)))
    assert policy.state_dict()["gamma"] == {"new": None, **before}


@pytest.mark.parametrize("name", POLICIES)
def test_a_step_that_is_not_finite_never_was(name: str) -> None:
    """For the thresholds and coefficients of all others; a schedule goes on with the run."""
    if name == "schedule":
        return
    finite = [(step, norm) for step, norm in enumerate(NORMS) if math.isfinite(norm)]
    without = made(name)
    expected = [plain(without.decide(seen(step, norm))) for step, norm in finite]
    found = [
        plain(decision) for decision, norm in zip(play(made(name)), NORMS, strict=True) if math.isfinite(norm)
    ]
    assert found == expected


def test_the_threshold_comes_from_the_rounded_norm_and_the_state_alone() -> None:
    """Total norms that differ in the last bits, as between topologies."""
    for name in ("percentile", "zclip", "skip_spikes", "adagc"):
        one, other = made(name), made(name)
        for step, norm in enumerate(NORMS):
            first, second = seen(step, norm), seen(step, norm)
            moved = StepStatistics(
                first.total_norm * (1 + 1e-13), *(getattr(second, f) for f in StepStatistics.__slots__[1:])
            )
            a, b = plain(one.decide(first)), plain(other.decide(moved))
            assert (a["threshold"], a["skip"]) == (b["threshold"], b["skip"])
        assert one.state_dict() == other.state_dict()


BAD_STATES: list[tuple[Callable[[], Policy], dict[str, Any], str]] = [
    (ZClip, {}, "state of policy zclip, found {}"),
    (ZClip, {"policy": "percentile", "history": []}, "state of policy zclip, found .*percentile"),
    (ZClip, {"policy": "zclip", "steps": -1, "mean": 0.0, "variance": 0.0}, "found"),
    (ZClip, {"policy": "zclip", "steps": 1, "mean": "0", "variance": 0.0}, "found"),
    (ZClip, {"policy": "zclip", "steps": 1, "mean": 0.0, "variance": -1.0}, "found"),
    (ZClip, {"policy": "zclip", "steps": 1, "mean": NAN, "variance": 1.0}, "found"),
    (Percentile, {"policy": "percentile", "history": [INF]}, "found"),
    (Percentile, {"policy": "percentile", "history": None}, "found"),
    (SkipSpikes, {"policy": "skip_spikes", "on": "loss", "history": []}, "found .*loss"),
    (AdaGc, {"policy": "adagc", "steps": 1, "gamma": [1.0]}, "found"),
    (AdaGc, {"policy": "adagc", "steps": 1, "gamma": {"a": 0.0}}, "found"),
    (lambda: made("adagc"), {"policy": "adagc", "steps": 1, "gamma": {"wte": 1.0}}, "none for 'blocks.0.w'"),
    (
        lambda: made("adagc"),
        {"policy": "adagc", "steps": 1, "gamma": dict.fromkeys([*NAMES, "x"], 1.0)},
        "one for 'x', which this model lacks",
    ),
    (lambda: made("schedule"), {"policy": "schedule", "step": 1.5}, "found"),
]


@pytest.mark.parametrize(("make", "state", "message"), BAD_STATES)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(
    make: Callable[[], Policy], state: dict[str, Any], message: str
) -> None:
    policy = make()
    play(policy, [] if isinstance(policy, AdaGc) else NORMS[:5])
    before = through_json(policy)
    with pytest.raises(DistnormError, match=message):
        policy.load_state_dict(state)
    assert through_json(policy) == before


def test_a_state_of_other_parameters_is_refused_when_they_become_known() -> None:
    policy = AdaGc()
    policy.load_state_dict({"policy": "adagc", "steps": 1, "gamma": {"a": 1.0}})
    with pytest.raises(DistnormError, match="none for 'b' and one for 'a', which this model lacks"):
        policy.bind(["b"])


def test_a_shorter_window_keeps_the_newest() -> None:
    long, short = Percentile(window=50), Percentile(window=4)
    play(long, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    short.load_state_dict(through_json(long))
    assert short.state_dict()["history"] == [3.0, 4.0, 5.0, 6.0]


def test_skip_spikes_on_a_loss_needs_one() -> None:
    with pytest.raises(DistnormError, match="expected a loss with every step"):
        SkipSpikes(on="loss").decide(StepStatistics.of(fp64(1.0)))


class NoHostReads(TorchDispatchMode):
    """Refuses what waits for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero")
        assert func._schema.name not in ("aten::nonzero", "aten::masked_select")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", POLICIES)
def test_no_decision_waits_for_the_host(name: str) -> None:
    policy = made(name)
    steps = [seen(step, norm) for step, norm in enumerate(NORMS)]
    with NoHostReads():
        for step in steps:
            policy.decide(step)
        with pytest.raises(AssertionError):
            bool(steps[0].total_norm > 0)


class NothingOnTheHost(TorchDispatchMode):
    """Refuses whatever makes a tensor elsewhere, which would have to be copied over."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple) else (result,)
        assert {tensor.device.type for tensor in made} == {"meta"}, func
        return result


@pytest.mark.parametrize("name", POLICIES)
def test_the_state_is_where_the_gradients_are(name: str) -> None:
    """The meta device has no values: whatever reads one raises."""
    policy, step = made(name), seen(0, 1.0)
    there = {field: getattr(step, field) for field in StepStatistics.__slots__}
    moved = StepStatistics(
        **{field: None if value is None else value.to("meta") for field, value in there.items()}
    )
    policy.decide(moved)
    with NothingOnTheHost():
        decision = policy.decide(moved)
        with pytest.raises(AssertionError):
            torch.ones(())
    assert {t.device.type for t in (decision.coef, decision.threshold)} == {"meta"}
    assert {tensor.device.type for tensor in policy._state.values()} <= {"meta"}


@settings(deadline=None, max_examples=30)
@given(
    name=st.sampled_from(["constant", "percentile", "zclip", "skip_spikes", "schedule"]),
    series=st.lists(st.floats(0, 1e30), min_size=1, max_size=40),
)
def test_a_coefficient_never_enlarges_and_a_norm_is_never_above_the_threshold(
    name: str, series: list[float]
) -> None:
    for total, decision in zip(series, play(made(name), series), strict=True):
        coef = decision.coef.item()
        assert 0 <= coef <= 1
        if name != "skip_spikes":
            assert total * coef <= decision.threshold.item() * (1 + 1e-7)


@settings(deadline=None, max_examples=20)
@given(
    name=st.sampled_from(["per_tensor", "adagc", "agc"]),
    series=st.lists(st.floats(0, 1e30), min_size=1, max_size=20),
)
def test_no_coefficient_of_many_enlarges(name: str, series: list[float]) -> None:
    for decision in play(made(name), series):
        assert decision.each is not None
        assert 0 <= decision.each.min() <= decision.each.max() <= 1
        assert torch.equal(decision.each.min(), decision.coef)
