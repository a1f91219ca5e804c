"""What is decided for a whole step: where ranks disagree, in dry runs; and what a result says of itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import distnorm
from distnorm import kernels
from distnorm.config import ClipConfig
from distnorm.measure.norms import norm
from distnorm.payload.payload import LossPayload
from distnorm.plan.collectives import Ranks
from distnorm.plan.plan import make_plan
from distnorm.policies.deciding import Decider
from distnorm.policies.groups import PolicyGroups
from distnorm.policies.policy import StepStatistics
from distnorm.policies.results import ClipResult, GroupResult
from distnorm.sources import Source, shards_of

SPIKES = {"name": "skip_spikes", "k": 3.0, "window": 4, "after": 2}
CLIPS: dict[str, dict[str, Any]] = {
    "constant": {"max_norm": 1.0},
    "schedule": {"max_norm": 1.0, "policy": {"name": "schedule", "warmup": 9, "warmup_factor": 0.5}},
    "per_tensor": {"max_norm": 1.0, "policy": "per_tensor"},
    "agc": {"policy": {"name": "agc", "lambda": 0.1}},
    "percentile": {"policy": {"name": "percentile", "window": 4}},
    "zclip": {"policy": {"name": "zclip", "warmup": 2, "z_t": 0.5}},
    "adagc": {"policy": {"name": "adagc", "warmup": 2}},
    "skip_spikes": {"max_norm": 1.0, "policy": SPIKES},
    "groups": {
        "policy": {"name": "adagc", "warmup": 2},
        "groups": [
            {"params": ["a"], "policy": {"name": "zclip", "warmup": 2}},
            {"params": ["b"], "policy": {"name": "agc", "lambda": 0.1}},
        ],
    },
}
MODES = ["raise", "skip", "zero", "propagate"]


class HeldGradients:
    """The gradients of a step, as `Decider.apply` scales them."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.tensors = list(tensors)

    def views(self) -> list[Tensor | None]:
        return self.tensors

    def _present(self) -> list[Tensor]:
        return [tensor for tensor in self.tensors if tensor is not None]

    def scale_(self, coef: Tensor, keep: Tensor | None = None) -> None:
        kernels.scale_(self._present(), coef)
        if keep is not None:
            self.zero_unless_(keep)

    def scale_each_(self, coefs: Tensor) -> None:
        assert coefs.shape == (len(self.tensors),)
        for tensor, coef in zip(self.tensors, coefs, strict=True):
            if tensor is not None:
                kernels.scale_([tensor], coef)

    def clamp_(self, bound: float, members: Sequence[int]) -> None:
        kernels.clamp_([tensor for i in members if (tensor := self.tensors[i]) is not None], bound)

    def zero_unless_(self, keep: Tensor) -> None:
        kernels.zero_unless_(self._present(), keep)


class Model:
    """Three parameters and what decides about them, without a clipper."""

    def __init__(self, clip: Mapping[str, Any], nonfinite: str = "propagate") -> None:
        self.named = {name: nn.Parameter(torch.full((2, 3), 0.5)) for name in "abc"}
        self.shards = shards_of(list(self.named.items()), Source.GRADIENT)
        self.ranks, self.norm = Ranks(), norm(2.0)
        self.groups = PolicyGroups(
            ClipConfig.model_validate({**clip, "nonfinite": nonfinite}), self.norm, self.ranks
        )
        shares = make_plan(self.ranks, self.shards, {}, replicas_share=True).shares
        self.groups.bind(self.ranks, self.shards, shares)
        self.decider = Decider(self.groups)

    def step(self, value: float, total: float | None = None, agreed: bool | None = None) -> ClipResult:
        """Clip gradients that are made of this value, by another total norm than theirs if one is given."""
        gradients = HeldGradients([torch.full((2, 3), value * i) for i in (1, 2, 3)])
        self.before = [tensor.clone() for tensor in gradients.tensors if tensor is not None]
        payload = self.groups.payload
        reduced = None if payload is None else payload.local(gradients.tensors, torch.device("cpu"))
        found = self.norm.finalise(self.norm.statistic(self.before, torch.device("cpu")))
        found = found if total is None else torch.full_like(found, total)
        known = None if agreed is None else torch.tensor(agreed)
        outcome = self.decider.decide(found, reduced, known)
        self.decider.apply(outcome, gradients)  # type: ignore[arg-type]
        self.after = gradients.tensors
        return outcome.result

    @property
    def is_untouched(self) -> bool:
        return all(map(torch.equal, self.before, self.after))


@pytest.mark.parametrize("nonfinite", MODES)
@pytest.mark.parametrize("name", CLIPS)
def test_where_ranks_disagree_gradients_and_histories_stay_as_they_were(name: str, nonfinite: str) -> None:
    model = Model(CLIPS[name], nonfinite)
    for value in (1.0, 1.1, 0.9):
        model.step(value, agreed=True)
        assert not model.is_untouched or not CLIPS[name].get("max_norm") or name == "zclip"
    before = model.groups.state_dict()
    # What a payload is reduced to says nothing then.
    result = model.step(7.0, total=math.nan, agreed=False)
    assert model.is_untouched
    assert (float(result.clip_coef), bool(result.was_clipped), bool(result.is_finite)) == (1.0, False, False)
    assert math.isnan(result.total_norm) and math.isnan(result.clipped_norm)
    assert bool(result.skipped) == (nonfinite == "skip")
    assert all(math.isnan(group.total_norm) and group.clip_coef == 1 for group in result.groups.values())
    if name != "schedule":  # which goes with the run
        assert model.groups.state_dict() == before
    model.step(50.0, agreed=True)
    if name not in ("percentile", "zclip", "skip_spikes"):
        assert not model.is_untouched


@pytest.mark.parametrize("name", CLIPS)
def test_ranks_that_agree_decide_as_if_nobody_had_asked(name: str) -> None:
    asked, unasked = Model(CLIPS[name]), Model(CLIPS[name])
    for value in (1.0, 1.2, 0.9, 30.0):
        first, second = asked.step(value, agreed=True), unasked.step(value)
        assert first.to_dict() == second.to_dict()
        assert all(map(torch.equal, asked.after, unasked.after))


@pytest.mark.parametrize("name", CLIPS)
def test_raise_now_decides_as_raise_does(name: str) -> None:
    now, later = Model(CLIPS[name], "raise"), Model(CLIPS[name], "raise")
    for group in now.groups.groups:
        group.policy._nonfinite = "raise_now"
    now.decider._nonfinite = "raise_now"
    for value in (1.0, math.inf, math.nan, 2.0):
        first, second = now.step(value).to_dict(), later.step(value).to_dict()
        assert repr(first) == repr(second)
        assert all(
            torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(now.after, later.after, strict=True)
        )


def test_zero_makes_zeros_of_nothing_that_ranks_did_not_measure_alike() -> None:
    model = Model(CLIPS["constant"], "zero")
    result = model.step(math.nan)
    assert float(result.clip_coef) == float(result.clipped_norm) == 0.0
    assert [tensor.abs().max().item() for tensor in model.after if tensor is not None] == [0.0] * 3


# ---- memory that a CUDA graph may hold


def addresses(model: Model) -> list[tuple[str, int]]:
    return [
        (name, tensor.data_ptr())
        for group in model.groups.groups
        for name, tensor in group.policy._state.items()
    ]


@pytest.mark.parametrize("name", [name for name in CLIPS if name not in ("constant", "per_tensor", "agc")])
def test_states_stay_where_a_captured_graph_writes_them(name: str) -> None:
    model, other = Model(CLIPS[name]), Model(CLIPS[name])
    there = addresses(model)
    assert there
    for value in (1.0, 1.2, 0.9, 30.0):
        model.step(value)
    assert addresses(model) == there
    state = model.groups.state_dict()
    model.groups.load_state_dict(None)
    assert (addresses(model), model.groups.state_dict()) == (there, other.groups.state_dict())
    model.groups.load_state_dict(state)
    assert (addresses(model), model.groups.state_dict()) == (there, state)


# ---- dry runs


@pytest.mark.parametrize("name", CLIPS)
def test_a_dry_run_leaves_the_state_of_real_steps_alone(name: str) -> None:
    model = Model(CLIPS[name])
    for value in (1.0, 1.2):
        model.step(value)
    before, there = model.groups.state_dict(), addresses(model)
    policy = model.groups.default
    with FakeTensorMode():
        one = torch.ones((), dtype=torch.float64)
        each = torch.ones(3 if name != "groups" else 1, dtype=torch.float64)
        norms = {"parameter_norms": each, "numels": each, "unit_norms": each, "unit_weight_norms": each}
        decision = policy.decide(StepStatistics.of(one, **norms))
        assert isinstance(decision.coef, FakeTensor) and decision.coef.shape == ()
    assert (model.groups.state_dict(), addresses(model)) == (before, there)
    model.step(0.9)


def test_a_loss_is_averaged_in_a_dry_run_too() -> None:
    with FakeTensorMode():
        loss = LossPayload(Ranks(), "sum")
        loss.note(torch.ones(()))
        assert loss.mean(loss.local([], torch.device("cpu"))).shape == ()


# ---- a default device


@contextmanager
def default_device(device: str) -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(before)


@pytest.mark.parametrize("name", CLIPS)
def test_another_default_device_changes_nothing(name: str) -> None:
    expected = Model(CLIPS[name])
    found = [expected.step(value).to_dict() for value in (1.0, 1.2, 30.0)]
    model = Model(CLIPS[name])
    with default_device("meta"):
        groups = PolicyGroups(model.groups.clip, model.norm, model.ranks)
        with torch.device("cpu"):  # the planner's part isn't tried here
            shares = make_plan(model.ranks, model.shards, {}, replicas_share=True).shares
        groups.bind(model.ranks, model.shards, shares)
        decider = Decider(groups)
        for value, result in zip((1.0, 1.2, 30.0), found, strict=True):
            tensors = [torch.full((2, 3), value * i, device="cpu") for i in (1, 2, 3)]
            with torch.device("cpu"):  # nor are the kernels
                payload = groups.payload and groups.payload.local(tensors, torch.device("cpu"))
                total = model.norm.finalise(model.norm.statistic(tensors, torch.device("cpu")))
            outcome = decider.decide(total, payload)
            assert outcome.result.to_dict() == result
            decider.apply(outcome, HeldGradients(tensors))  # type: ignore[arg-type]
        state = groups.state_dict()
        groups.load_state_dict(state)
        assert groups.state_dict() == state
    assert state == expected.groups.state_dict()


# ---- a loss that is noted


@pytest.mark.parametrize("op", ["sum", "max"])
def test_a_noted_loss_is_the_value_of_then(op: str) -> None:
    loss, running = LossPayload(Ranks(), op), torch.tensor(7.5)
    loss.note(running)
    running.zero_()  # as a loop with gradient accumulation does
    assert loss.mean(loss.local([], torch.device("cpu"))).item() == 7.5


@pytest.mark.parametrize("op", ["sum", "max"])
@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, torch.tensor(math.nan), torch.tensor([-math.inf])]
)
def test_a_loss_that_is_not_finite_has_a_mean_that_is_not(op: str, value: Any) -> None:
    loss = LossPayload(Ranks(), op)
    loss.note(value)
    assert not loss.mean(loss.local([], torch.device("cpu"))).isfinite()


# ---- what a result says of itself


def test_a_result_is_a_line_with_its_values() -> None:
    result = Model({**CLIPS["groups"]}).step(1.0)
    line = repr(result)
    assert "\n" not in line
    assert line.startswith("ClipResult(total_norm=9.16515, clip_coef=")
    assert (
        "is_finite=True, was_clipped=True, skipped=False, groups={'a': GroupResult(total_norm=2.44949, "
        in line
    )


class Elsewhere(Tensor):
    """Stands for a tensor whose values can't be read without a wait."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.__name__ not in ("item", "numpy", "tolist", "__format__", "__repr__")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_result_reads_nothing_from_a_device() -> None:
    values = [torch.ones((), device="meta") for _ in range(7)]
    assert repr(ClipResult(*values)) == "ClipResult(on meta)"
    assert repr(ClipResult(*values, {"g": GroupResult(*values[:5])})) == (
        "ClipResult(on meta, groups={'g': GroupResult(on meta)})"
    )
    away = torch.ones(()).as_subclass(Elsewhere)
    with pytest.raises(AssertionError):
        away.item()
    assert repr(ClipResult(*[away] * 7)) == "ClipResult(on cpu)"
    assert repr(distnorm.GradClipper([nn.Parameter(torch.ones(1))]).measure()).startswith(
        "ClipResult(total_norm=0, "
    )
