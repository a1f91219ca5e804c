"""A captured `clip()` that is replayed does what an eager one does to the bit: no Python decides anything."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import distnorm
from distnorm.measure.replica_check import ReplicaCheck
from distnorm.policies.schedule import Schedule
from tests import oracle
from tests.counting import as_on_an_accelerator
from tests.recording import CaptureError, capturing, recorded
from tests.refusals import TIMEOUT

Named = list[tuple[str, nn.Parameter]]
FIELDS = ("total_norm", "clip_coef", "clipped_norm", "threshold", "is_finite", "was_clipped", "skipped")

POINTS = [{"step": 1, "factor": 1}, {"step": 4, "factor": 0.1}, {"step": 6, "factor": 2}]
CLIPS: dict[str, dict[str, Any]] = {
    "constant": {"max_norm": 1.0},
    "zclip": {"policy": {"name": "zclip", "warmup": 3}},
    "zclip bounded": {"max_norm": 2.0, "policy": {"name": "zclip", "warmup": 2, "alpha": 0.5, "z_t": 1.0}},
    "zclip of percentiles": {
        "policy": {"name": "zclip", "warmup": 2, "mode": "percentile", "z_t": 0.5, "clip_factor": 0.5}
    },
    "aggc": {"policy": {"name": "aggc", "raise_small": True, "total_steps": 6, "max_down": None}},
    "percentile": {"policy": {"name": "percentile", "window": 3, "p": 40}},
    "adagc": {"policy": {"name": "adagc", "warmup": 3, "warmup_max_norm": 0.5}},
    "skip_spikes": {"policy": {"name": "skip_spikes", "k": 0.5, "window": 3, "after": 2}, "max_norm": 1.0},
    "skip_spikes of losses": {
        "policy": {"name": "skip_spikes", "on": "loss", "window": 3, "after": 2, "k": 1}
    },
    "linear": {"max_norm": 1.0, "policy": {"name": "schedule", "curve": "linear", "points": POINTS}},
    "cosine": {
        "max_norm": 1.0,
        "policy": {"name": "schedule", "curve": "cosine", "points": POINTS, "warmup": 2},
    },
    "steps": {"max_norm": 1.0, "policy": {"name": "schedule", "curve": "steps", "points": POINTS}},
    "per_tensor": {"max_norm": 0.5, "policy": "per_tensor"},
    "agc": {"policy": {"name": "agc", "lambda": 0.01}},
    "value": {"max_norm": 0.1, "policy": "value"},
    "groups": {
        "max_norm": 1.0,
        "policy": {"name": "skip_spikes", "k": 0.5, "window": 3, "after": 2},
        "groups": [
            {"name": "z", "params": ["a"], "policy": {"name": "zclip", "warmup": 2}},
            {"name": "all", "params": ["b"], "norm": "shared", "policy": {"name": "percentile", "window": 3}},
            {"name": "ada", "params": ["c"], "policy": {"name": "adagc", "warmup": 2}},
            {"name": "units", "params": ["d"], "policy": {"name": "agc", "lambda": 0.01}},
        ],
    },
}  # fmt: skip
REQUIRED = ("zclip", "percentile", "adagc", "skip_spikes", "skip_spikes of losses", "cosine", "groups")


def model() -> Named:
    shapes = {"a": (4, 3), "b": (5,), "c": (2, 2, 2), "d": (3, 4), "e": ()}
    dtypes = {"b": torch.bfloat16, "e": torch.float64}
    return [(name, nn.Parameter(torch.ones(shape, dtype=dtypes.get(name)))) for name, shape in shapes.items()]


def fill(named: Named, seed: int, scale: float) -> Tensor:
    """Write new gradients where the old ones are, and give a loss. `scale` may be inf or NaN."""
    dice = torch.Generator().manual_seed(seed)
    for i, (_, parameter) in enumerate(named):
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter).detach()
        local: Tensor = getattr(parameter.grad, "_local_tensor", parameter.grad)
        values = torch.randn(parameter.shape, generator=dice, dtype=torch.float64)
        if math.isfinite(scale):
            values *= scale
        elif i == 0:
            values.view(-1)[-1] = scale
        local.copy_(values if local.shape == values.shape else distributed(values, parameter))
    return torch.tensor(scale + seed % 3, dtype=torch.float32)


def distributed(values: Tensor, like: Any) -> Tensor:
    found: Tensor = distribute_tensor(values, like.device_mesh, like.placements)._local_tensor
    return found


def gradients(named: Named) -> list[Tensor]:
    return [getattr(p.grad, "_local_tensor", p.grad) for _, p in named if p.grad is not None]


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether the bits are the same; NaN's are not looked at."""
    return ours.dtype is theirs.dtype and torch.equal(ours.isnan(), theirs.isnan()) and (
        torch.equal(ours.nan_to_num(7, 8, 9), theirs.nan_to_num(7, 8, 9))
    )  # fmt: skip


class Pair:
    """An eager clipper, and one whose steps are recorded and replayed, on gradients of the same values.

    Args:
        config: of both.
        warmup: steps that both make eagerly at first.
    """

    def __init__(self, config: dict[str, Any], warmup: int, make: Callable[[], Named] = model) -> None:
        self.config, self._warmup = config, warmup
        self.named, self._eager_named = make(), make()
        self.clipper = distnorm.GradClipper(self.named, config)
        self.eager = distnorm.GradClipper(self._eager_named, config)
        self.loss, self.recording, self.result = torch.zeros(()), None, None

    def clip(self, clipper: distnorm.GradClipper, loss: Tensor) -> distnorm.ClipResult:
        if "loss" in str(self.config):
            clipper.note(loss=loss)
        return clipper.clip()

    def step(self, seed: int, scale: float) -> list[str]:
        """Take a step with both, and name what differs."""
        self.loss.copy_(fill(self.named, seed, scale))
        expected = self.clip(self.eager, fill(self._eager_named, seed, scale))
        if self._warmup > 0:
            self._warmup -= 1
            self.result = self.clip(self.clipper, self.loss)
        elif self.recording is None:
            with recorded() as self.recording:
                self.result = self.clip(self.clipper, self.loss)
        else:
            self.recording.replay()
        return self.differences(expected)

    def differences(self, expected: distnorm.ClipResult) -> list[str]:
        found = [name for name in FIELDS if not same(getattr(self.result, name), getattr(expected, name))]
        for name, group in expected.groups.items():
            ours = self.result.groups[name]
            found += [f"{name}.{at}" for at in FIELDS[:4] if not same(getattr(ours, at), getattr(group, at))]
        if not all(map(same, gradients(self.named), gradients(self._eager_named))):
            found.append("gradients")
        return found

    def addresses(self) -> list[int]:
        """Where the policies' state is."""
        policies = [group.policy for group in self.clipper.rules.groups]
        return [tensor.data_ptr() for policy in policies for tensor in policy._state.values()]


SCALES = st.one_of(
    st.floats(0.01, 100), st.sampled_from([0.0, 1e-12, 1e6, 1e12, math.inf, -math.inf, math.nan])
)


@pytest.mark.parametrize("name", CLIPS)
@settings(max_examples=8, deadline=None)
@given(
    scales=st.lists(SCALES, min_size=6, max_size=10),
    warmup=st.integers(1, 4),
    nonfinite=st.sampled_from(["skip", "zero", "propagate"]),
)
def test_replays_are_eager_steps_to_the_bit(name, scales, warmup, nonfinite):
    with as_on_an_accelerator():
        pair = Pair({"clip": {"nonfinite": nonfinite, **CLIPS[name]}}, warmup)
        addresses: list[int] = []
        for seed, scale in enumerate(scales):
            assert pair.step(seed, scale) == []
            addresses = addresses or pair.addresses()
            assert pair.addresses() == addresses
        assert repr(pair.clipper.state_dict()) == repr(pair.eager.state_dict())


@pytest.mark.parametrize("name", ["constant", *REQUIRED])
def test_a_spike_is_clipped_or_skipped_within_a_replay_as_on_the_cpu(name):
    """What replays find is right, and not only what the same operators find eagerly."""
    plain_named = model()
    config = {"clip": {"nonfinite": "skip", **CLIPS[name]}}
    plain = distnorm.GradClipper(plain_named, config)
    pair, acted = Pair(config, 1), 0
    for seed, scale in enumerate([1.0, 1.1, 0.9, 1.0, 1.2, math.nan, 50.0, 1.0, 1.0, 80.0]):
        with as_on_an_accelerator():
            assert pair.step(seed, scale) == []
        loss = fill(plain_named, seed, scale)
        true = oracle.dense_of([p.grad for _, p in plain_named])
        expected = pair.clip(plain, loss)
        found = pair.result
        assert float(found.total_norm) == pytest.approx(true, rel=1e-9, nan_ok=True)
        for field in FIELDS:
            ours, theirs = float(getattr(found, field)), float(getattr(expected, field))
            assert ours == pytest.approx(theirs, rel=1e-6, nan_ok=True), field
        for ours, theirs in zip(gradients(pair.named), gradients(plain_named), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=0, equal_nan=True)
        acted += seed in (6, 9) and bool(found.was_clipped | found.skipped)
    assert acted == 2


@pytest.mark.parametrize("name", REQUIRED)
def test_a_loaded_state_is_what_the_graph_goes_on_from(name):
    with as_on_an_accelerator():
        pair = Pair({"clip": {"nonfinite": "skip", **CLIPS[name]}}, 2)
        for seed in range(5):
            assert pair.step(seed, 1.0 + seed) == []
        state, addresses = pair.eager.state_dict(), pair.addresses()
        for seed in range(5, 8):
            assert pair.step(seed, 30.0) == []
        assert repr(pair.clipper.state_dict()) != repr(state)
        for clipper in (pair.clipper, pair.eager):
            clipper.load_state_dict(state)
        assert pair.addresses() == addresses
        assert repr(pair.clipper.state_dict()) == repr(state)
        for seed in range(8, 12):
            assert pair.step(seed, 3.0) == []
        assert pair.clipper.state_dict()["steps"] == pair.eager.state_dict()["steps"] == 9
        assert repr(pair.clipper.state_dict()) == repr(pair.eager.state_dict())


def test_a_step_between_replays_uses_the_same_state():
    with as_on_an_accelerator():
        pair = Pair({"clip": {"nonfinite": "skip", **CLIPS["zclip"]}}, 1)
        for seed in range(8):
            if seed in (3, 5):
                fill(pair.named, seed, 2.0)
                fill(pair._eager_named, seed, 2.0)
                ours, theirs = pair.clipper.clip(), pair.eager.clip()
                assert same(ours.threshold, theirs.threshold) and same(ours.clip_coef, theirs.clip_coef)
            else:
                assert pair.step(seed, 1.0) == []


def partly_trained() -> Named:
    named = model()
    named[1][1].requires_grad_(False)
    return named


@pytest.mark.parametrize("name", ["constant", "adagc", "per_tensor", "groups"])
def test_gradients_may_be_missing(name):
    with as_on_an_accelerator():
        pair = Pair({"clip": {"nonfinite": "zero", **CLIPS[name]}}, 1, partly_trained)
        for seed, scale in enumerate((1.0, 2.0, math.nan, 1e9, 0.0, 3.0)):
            assert pair.step(seed, scale) == []


@pytest.mark.parametrize("order", [1.0, 3.0, 10.0, math.inf])
@pytest.mark.parametrize("name", ["constant", "skip_spikes of losses"])
def test_other_orders_are_replayed(order, name):
    with as_on_an_accelerator():
        pair = Pair({"norm": {"type": order}, "clip": {"nonfinite": "zero", **CLIPS[name]}}, 1)
        for seed, scale in enumerate((1.0, 2.0, math.nan, 1e9, 0.0, 3.0)):
            assert pair.step(seed, scale) == []


# ---- nonfinite: raise


def test_bad_replays_are_harmless_and_raised_by_calls_that_may_wait():
    named = model()
    clipper = distnorm.GradClipper(named, {"clip": {"max_norm": 1.0, "nonfinite": "raise"}})
    with as_on_an_accelerator():
        fill(named, 0, 1.0)
        clipper.clip()
        fill(named, 1, 1.0)
        with recorded() as recording:
            result = clipper.clip()
        for scale in (1.0, math.nan, math.inf, 1.0):
            fill(named, 2, scale)
            recording.replay()
            assert bool(result.skipped) == (not math.isfinite(scale))
            largest = max(float(g.abs().max()) for g in gradients(named))
            assert (largest == 0) == (not math.isfinite(scale))
        with pytest.raises(distnorm.NonFiniteGradientError, match="in 5 steps, found 2 in which"):
            clipper.flush()
        clipper.flush()
        assert clipper.state_dict()["steps"] == 6
        fill(named, 3, math.nan)
        recording.replay()
        with pytest.raises(distnorm.NonFiniteGradientError, match="found 1 in which"):
            clipper.state_dict()
        clipper.load_state_dict({**clipper.state_dict(), "steps": 2})
        fill(named, 4, math.nan)
        recording.replay()
        clipper.load_state_dict({**_heard_state(clipper), "steps": 2})
        assert clipper.state_dict()["steps"] == 2


def _heard_state(clipper: distnorm.GradClipper) -> dict[str, Any]:
    with pytest.raises(distnorm.NonFiniteGradientError):
        clipper.state_dict()
    return clipper.state_dict()


def test_a_bad_step_before_the_capture_is_still_raised_after_it():
    named = model()
    clipper = distnorm.GradClipper(named, {"clip": {"max_norm": 1.0}})
    with as_on_an_accelerator():
        fill(named, 0, 1.0)
        clipper.clip()
        fill(named, 1, math.nan)
        clipper.clip()
        fill(named, 2, 1.0)
        with recorded() as recording:
            clipper.clip()
        recording.replay()
        with pytest.raises(distnorm.NonFiniteGradientError, match=r"step 2: .*'a' on rank 0"):
            clipper.clip()


# ---- ranks


def sharded_and_copied() -> Named:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = {"a": (4, 3), "b": (6,), "c": (2, 2, 2), "d": (3, 4)}
    placed = {"a": Shard(0), "b": Shard(0), "c": Replicate(), "d": Replicate()}
    return [
        (name, nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [placed[name]])))
        for name, shape in whole.items()
    ]


def replayed_on_ranks(name: str) -> list[Any]:
    config = {"clip": {"nonfinite": "skip", **CLIPS[name]}}
    with as_on_an_accelerator():
        pair, found = Pair(config, 2, sharded_and_copied), []
        for seed, scale in enumerate([1.0, 1.1, 0.9, 2.0, 50.0, math.nan, 1.0, 40.0]):
            differing = pair.step(seed, scale)
            true = oracle.dense_of([p.grad.full_tensor() for _, p in pair.named])
            found.append((differing, float(pair.result.total_norm), float(pair.result.clipped_norm), true))
        names = pair.recording.names
        alike = repr(pair.clipper.state_dict()) == repr(pair.eager.state_dict())
    return [found, names.count("c10d::allreduce_"), alike]


@pytest.mark.parametrize("name", ["constant", *REQUIRED])
def test_ranks_replay_their_all_reduce(ranks, name):
    first, second = ranks(2, replayed_on_ranks, name, timeout=TIMEOUT)
    assert repr(first) == repr(second)
    steps, collectives, alike = first
    assert collectives == 1 and alike
    for differing, _, clipped, true in steps:
        assert differing == [] and (clipped == pytest.approx(true, rel=1e-4) or not math.isfinite(clipped))


def unreduced_replicas_in_a_replay() -> list[Any]:
    """20 replicated parameters, of which eager steps on an accelerator sample some in turn."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    named = [
        (f"p{i}", nn.Parameter(distribute_tensor(torch.ones(5 + 8 * i, 4).t(), mesh, [Replicate()])))
        for i in range(20)
    ]
    found = []

    def has_turn(check: ReplicaCheck, device: torch.device, k: int) -> bool:
        return bool(check.keys[k] % check.turns == check._step % check.turns)

    with as_on_an_accelerator(), mock.patch.object(ReplicaCheck, "_has_turn", has_turn):
        clipper = distnorm.GradClipper(named, {"clip": {"max_norm": 1.0, "nonfinite": "skip"}})
        for step in range(2):
            fill(named, step, 1.0)
            clipper.clip()
        fill(named, 2, 1.0)
        with recorded() as recording:
            result = clipper.clip()
        found.append(bool(result.is_finite))
        for i in range(20):
            fill(named, i, 1.0)
            if dist.get_rank():
                gradients(named)[i].mul_(1.5)
            recording.replay()
            found.append(bool(result.is_finite) or not bool(result.skipped))
        fill(named, 2, 1.0)
        recording.replay()
        found.append(bool(result.is_finite))
    return found


def test_every_replica_is_compared_in_every_replay(ranks):
    for found in ranks(2, unreduced_replicas_in_a_replay, timeout=TIMEOUT):
        assert found == [True, *[False] * 20, True]


# ---- what can't be captured is refused by name


def warm(config: dict[str, Any], steps: int = 1) -> tuple[Named, distnorm.GradClipper]:
    named = model()
    clipper = distnorm.GradClipper(named, config)
    for seed in range(steps):
        if "loss" in str(config):
            clipper.note(loss=torch.ones(()))
        fill(named, seed, 1.0)
        clipper.clip()
    fill(named, steps, 1.0)
    return named, clipper


def refused(call: Callable[[], object], named: Named, pattern: str) -> None:
    before = [gradient.clone() for gradient in gradients(named)]
    with capturing(), pytest.raises(distnorm.DistnormError, match=f"CUDA graph.*{pattern}"):
        call()
    assert all(map(torch.equal, gradients(named), before))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "raise_now": ({"clip": {"max_norm": 1.0, "nonfinite": "raise_now"}}, "clip.nonfinite: raise_now.*skip"),
    "monitor": ({"clip": {"max_norm": 1.0}, "monitor": {"every": 2}}, "monitor.*outside"),
    "rows": ({"clip": {"max_norm": 1.0}, "monitor": {"stop_after": 2}}, "monitor.*outside"),
    "overlap": ({"clip": {"max_norm": 1.0, "overlap": True}}, "clip.overlap: false"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_need_the_host_are_refused(name):
    config, pattern = REFUSED[name]
    with as_on_an_accelerator():
        named, clipper = warm(config)
        refused(clipper.clip, named, pattern)
        fill(named, 2, 1.0)
        assert float(clipper.clip().total_norm) > 0  # an eager step goes on


def test_a_norm_that_is_reduced_in_the_hosts_memory_is_refused():
    named, clipper = warm({"clip": {"max_norm": 1.0}})
    refused(clipper.clip, named, "process group.*nccl")
    with as_on_an_accelerator():
        call = partial(distnorm.clip_grad_norm_, named, 1.0, error_if_nonfinite=True)
        refused(call, named, "planned.*once")
        call()
        refused(call, named, "error_if_nonfinite")


def test_a_first_step_is_refused_and_so_are_other_parameters():
    with as_on_an_accelerator():
        named, clipper = warm({"clip": {"max_norm": 1.0}}, steps=0)
        refused(clipper.clip, named, "before.*call clip.. once")
        net = nn.Linear(3, 2)
        clipper = distnorm.GradClipper(net, {"clip": {"max_norm": 1.0}})
        fill(list(net.named_parameters()), 0, 1.0)
        clipper.clip()
        net.extra = nn.Parameter(torch.ones(2))
        fill(list(net.named_parameters()), 1, 1.0)
        refused(clipper.clip, list(net.named_parameters()), "planned.*once")
        clipper.clip()
        with capturing():
            clipper.clip()
        clipper.rebind()
        refused(clipper.clip, list(net.named_parameters()), "call clip.. once")


LOSS = {"clip": {"policy": {"name": "skip_spikes", "on": "loss"}, "max_norm": 1.0}}


def test_a_loss_from_outside_of_the_graph_is_refused():
    with as_on_an_accelerator():
        named, clipper = warm(LOSS)
        refused(clipper.clip, named, "note.loss=.*within the graph.*none")
        clipper.note(loss=torch.ones(()))
        refused(clipper.clip, named, "note.loss=.*within the graph, found it before")

        def noted_as_a_number() -> None:
            clipper.note(loss=1.5)
            clipper.clip()

        refused(noted_as_a_number, named, "a loss in a tensor.*1.5")


def test_attached_optimizers_that_would_read_a_flag_are_refused():
    named = model()
    optimizer = torch.optim.SGD([p for _, p in named], lr=0.1)
    handle = distnorm.attach(named, optimizer, {"clip": {"nonfinite": "skip", "max_norm": 1.0}})
    with as_on_an_accelerator():
        fill(named, 0, 1.0)
        optimizer.step()
        with capturing(), pytest.raises(distnorm.DistnormError, match=r"CUDA graph.*SGD without fused=True"):
            optimizer.step()
    handle.remove()


def test_a_fused_optimizer_is_attached_within_the_graph():
    named, eager = model()[:1], model()[:1]
    config = {"clip": {"nonfinite": "skip", **CLIPS["skip_spikes"]}}
    optimizers = [torch.optim.AdamW([p for _, p in each], lr=0.1, fused=True) for each in (named, eager)]
    handles = [
        distnorm.attach(each, opt, config) for each, opt in zip((named, eager), optimizers, strict=True)
    ]
    recording = None
    with as_on_an_accelerator():
        for seed, scale in enumerate([1.0, 1.1, 0.9, 60.0, math.nan, 1.0]):
            for each in (named, eager):
                fill(each, seed, scale)
            optimizers[1].step()
            if seed == 0:
                optimizers[0].step()
            elif recording is None:
                with recorded() as recording:
                    optimizers[0].step()
            else:
                recording.replay()
            assert same(named[0][1].detach(), eager[0][1].detach())
            assert bool(handles[0].last.skipped) == bool(handles[1].last.skipped) == (seed in (3, 4))
    for handle in handles:
        handle.remove()


# ---- the stand-in itself


def test_a_python_counter_would_be_found(monkeypatch):
    decide = Schedule.decide

    def by_a_counter(policy: Any, step: Any) -> Any:
        policy.made = getattr(policy, "made", 0) + 1
        policy._state["step"].fill_(policy.made)
        return decide(policy, step)

    monkeypatch.setattr(Schedule, "decide", by_a_counter)
    with as_on_an_accelerator():
        pair = Pair({"clip": {"nonfinite": "skip", **CLIPS["linear"]}}, 1)
        differing = [pair.step(seed, 10.0) for seed in range(5)]
    assert differing[:2] == [[], []] and all("threshold" in found for found in differing[2:])


def test_state_that_is_made_anew_would_be_found(monkeypatch):
    decide = Schedule.decide

    def elsewhere(policy: Any, step: Any) -> Any:
        policy._state["step"] = policy._state["step"].clone()
        return decide(policy, step)

    monkeypatch.setattr(Schedule, "decide", elsewhere)
    with as_on_an_accelerator():
        pair = Pair({"clip": {"nonfinite": "skip", **CLIPS["linear"]}}, 1)
        before = pair.addresses()
        assert any(pair.step(seed, 10.0) for seed in range(5)) and pair.addresses() != before


@pytest.mark.parametrize(
    "call",
    [
        lambda x: float(x.sum()),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x[[0, 1]],
        lambda x: x[x > 0],
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
        lambda x: x + torch.from_numpy(__import__("numpy").ones(3)),
    ],
)
def test_what_a_graph_cannot_hold_is_not_recorded(call):
    x = torch.ones(3)
    with pytest.raises(CaptureError), recorded():
        call(x)


def test_a_recording_is_replayed_in_place():
    x, y = torch.ones(3), torch.zeros(3)
    with recorded() as recording:
        y.add_(x * 2)
        total = y.sum()
    x.fill_(5)
    recording.replay()
    assert y.tolist() == [12.0] * 3 and float(total) == 36


def test_dtensors_are_recorded_as_their_local_tensors(ranks):
    assert ranks(2, replayed_dtensor, timeout=TIMEOUT) == [36.0, 36.0]


def replayed_dtensor() -> float:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = DTensor.from_local(torch.ones(3), mesh, [Shard(0)])
    with recorded() as recording:
        doubled = x * 2
    x._local_tensor.fill_(6)
    recording.replay()
    return float(doubled._local_tensor.sum())
