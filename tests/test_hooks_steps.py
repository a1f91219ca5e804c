"""Which steps count under `attach`: none that trains nothing, none that is paused, none inside backward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, AdamW, Optimizer

import distnorm
from distnorm.hooks import amp
from tests.counting import collectives_and_reads

MAX_NORM = 0.01
HISTORY = {"clip": {"max_norm": MAX_NORM, "policy": {"name": "percentile", "p": 10}}}
SCALERS_STEP = GradScaler.step


@pytest.fixture(autouse=True)
def _removed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    handles: list[distnorm.Handle] = []
    attach = distnorm.attach

    def attach_for_a_while(*args: Any, **kwargs: Any) -> distnorm.Handle:
        handles.append(attach(*args, **kwargs))
        return handles[-1]

    monkeypatch.setattr(distnorm, "attach", attach_for_a_while)
    # What a test before has attached lives as long as the exception that ended it.
    monkeypatch.setattr(amp, "_participants", [])
    monkeypatch.setattr(GradScaler, "step", SCALERS_STEP)
    yield
    for handle in handles:
        handle.remove()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))


def loss_of(net: nn.Module, factor: float = 100.0) -> Tensor:
    rows = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(next(net.parameters()).dtype)
    return net(rows).square().mean() * factor


def backward(net: nn.Module, factor: float = 100.0) -> float:
    net.zero_grad()
    loss_of(net, factor).backward()
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in net.parameters()))


def values(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def distance(net: nn.Module, before: list[Tensor]) -> float:
    pairs = zip(net.parameters(), before, strict=True)
    return math.sqrt(sum(float((p.detach() - old).double().square().sum()) for p, old in pairs))


def initialise(optimizer: Optimizer, rate: Any) -> None:
    """As torchtitan's `init_optim_state`."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    kept = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    for group, lr in zip(optimizer.param_groups, kept, strict=True):
        group["lr"] = lr
    optimizer.zero_grad()


# ---- steps that train nothing


@pytest.mark.parametrize("fused", [False, True])
def test_torchs_checkpoint_helper_makes_no_step(fused: bool) -> None:
    net = model()
    optimizer = AdamW(net.parameters(), lr=torch.tensor(0.1) if fused else 0.1, fused=fused)
    handle = distnorm.attach(net, optimizer, HISTORY)
    before = handle.clipper.state_dict()
    counted, _ = collectives_and_reads(lambda: get_optimizer_state_dict(net, optimizer))
    assert optimizer.state, "the helper stepped"
    assert not counted and handle.last is None and handle.clipper.state_dict() == before
    true = backward(net)
    optimizer.step()
    assert handle.last is not None and float(handle.last.total_norm) == pytest.approx(true, rel=1e-6)
    assert handle.clipper.state_dict()["steps"] == 1


def helper_on_one_rank() -> tuple[int, float, float]:
    net = nn.parallel.DistributedDataParallel(model())
    optimizer = AdamW(net.parameters())
    handle = distnorm.attach(net, optimizer, HISTORY)
    if dist.get_rank() == 1:
        get_optimizer_state_dict(net.module, optimizer)
    true = backward(net)
    optimizer.step()
    assert handle.last is not None
    return handle.clipper.state_dict()["steps"], true, float(handle.last.total_norm)


def test_the_checkpoint_helper_on_one_rank_alone_meets_nobody(ranks: Any) -> None:
    for steps, true, found in ranks(2, helper_on_one_rank):
        assert steps == 1 and found == pytest.approx(true, rel=1e-6)


@pytest.mark.parametrize("rate", [0.0, 0, torch.tensor(0.0)], ids=["float", "int", "tensor"])
def test_zero_rates_and_gradients_make_no_step(rate: Any) -> None:
    net = model()
    optimizer = AdamW(net.parameters(), lr=0.1)
    handle = distnorm.attach(net, optimizer, HISTORY)
    before = handle.clipper.state_dict()
    initialise(optimizer, rate)
    assert optimizer.state and handle.last is None and handle.clipper.state_dict() == before
    backward(net)
    optimizer.step()
    last = handle.last
    initialise(optimizer, rate)
    assert handle.last is last and handle.clipper.state_dict()["steps"] == 1


def test_a_warm_up_that_begins_at_zero_is_training() -> None:
    net = model()
    optimizer = SGD(net.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step))
    handle = distnorm.attach(net, optimizer, HISTORY)
    for step in range(2):
        true = backward(net)
        optimizer.step()
        schedule.step()
        assert handle.last is not None and float(handle.last.total_norm) == pytest.approx(true, rel=1e-6)
        assert handle.clipper.state_dict()["steps"] == step + 1


def test_a_group_that_has_a_rate_makes_it_training() -> None:
    net = model()
    groups = [{"params": net[0].parameters(), "lr": 0.0}, {"params": net[2].parameters(), "lr": 0.1}]
    optimizer = SGD(groups)
    handle = distnorm.attach(net, optimizer, HISTORY)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert handle.last is not None and handle.clipper.state_dict()["steps"] == 1


def test_nothing_is_skipped_over_where_the_norm_is_not_finite() -> None:
    net = model()
    optimizer = SGD(net.parameters(), lr=0.0)
    handle = distnorm.attach(net, optimizer, {"clip": {"max_norm": 1.0, "nonfinite": "raise"}})
    backward(net, math.nan)
    with pytest.raises(distnorm.NonFiniteGradientError):
        optimizer.step()
    assert handle.last is None


# ---- paused


def test_paused_steps_pass_by() -> None:
    net = model().double()
    optimizer = SGD(net.parameters(), lr=1.0)
    handle = distnorm.attach(net, optimizer, {"clip": {"max_norm": MAX_NORM}})
    before, true = values(net), backward(net)
    scaler = GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    with handle.paused():
        with handle.paused():
            optimizer.step()
        assert distance(net, before) == pytest.approx(true, rel=1e-5), "not clipped"
        scaler.step(optimizer)
        optimizer.step(lambda: torch.zeros(()))
    assert handle.last is None and handle.clipper.state_dict()["steps"] == 0
    before, true = values(net), backward(net)
    optimizer.step()
    assert handle.last is not None and float(handle.last.total_norm) == pytest.approx(true, rel=1e-6)
    assert distance(net, before) == pytest.approx(MAX_NORM, rel=1e-4)
    with pytest.raises(ZeroDivisionError), handle.paused():
        raise ZeroDivisionError
    backward(net)
    optimizer.step()
    assert handle.clipper.state_dict()["steps"] == 2, "an error ends the pause too"
    handle.remove()
    with handle.paused():
        optimizer.step()


# ---- inside backward


def steps_in_backward() -> tuple[str, float, float]:
    net = model()
    optimizers = {p: SGD([p], lr=1.0) for p in net.parameters()}
    handle = distnorm.attach(net, list(optimizers.values()), {"clip": {"max_norm": MAX_NORM}})
    hooks = [p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step()) for p in optimizers]
    with pytest.raises(distnorm.UnsupportedGradientError) as caught:
        loss_of(net).backward()
    for hook in hooks:
        hook.remove()
    true = backward(net)
    for optimizer in optimizers.values():
        optimizer.step()
    assert handle.last is not None
    return str(caught.value), true, float(handle.last.total_norm)


def test_an_optimizer_that_steps_in_backward_is_refused_and_the_next_step_is_right(ranks: Any) -> None:
    for message, true, found in ranks(2, steps_in_backward):
        assert "expected optimizer steps after the backward pass, found one inside of it" in message
        assert found == pytest.approx(true, rel=1e-6)


# ---- GradScaler.step, and others who wrap it


def scaled_step(net: nn.Module, optimizer: Optimizer, step: Any = None) -> None:
    scaler = GradScaler("cpu", init_scale=2.0)
    net.zero_grad()
    scaler.scale(loss_of(net)).backward()
    (scaler.step if step is None else step.__get__(scaler))(optimizer)
    scaler.update()


def traced(calls: list[int]) -> Any:
    beneath = GradScaler.step

    def tracing_step(self: GradScaler, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return beneath(self, *args, **kwargs)

    return tracing_step


def attached() -> tuple[nn.Module, Optimizer, distnorm.Handle]:
    net = model()
    optimizer = SGD(net.parameters(), lr=1.0)
    return net, optimizer, distnorm.attach(net, optimizer, {"clip": {"max_norm": MAX_NORM}})


def test_a_wrap_of_the_scaler_from_before_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    tracer = traced(calls)
    monkeypatch.setattr(GradScaler, "step", tracer)
    net, optimizer, handle = attached()
    scaled_step(net, optimizer)
    assert len(calls) == 1 and handle.last is not None
    handle.remove()
    assert GradScaler.step is tracer
    scaled_step(net, optimizer)
    assert len(calls) == 2 and handle.clipper.state_dict()["steps"] == 1


def test_a_wrap_of_the_scaler_from_after_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    original = GradScaler.step
    monkeypatch.setattr(GradScaler, "step", original)  # whatever happens here, it is put back
    net, optimizer, handle = attached()
    calls: list[int] = []
    GradScaler.step = tracer = traced(calls)  # type: ignore[method-assign]
    scaled_step(net, optimizer)
    handle.remove()
    assert GradScaler.step is tracer, "it is not ours to take away"
    scaled_step(net, optimizer)
    assert len(calls) == 2 and handle.clipper.state_dict()["steps"] == 1
    net, optimizer, handle = attached()  # above the tracer, with what is left of the first beneath it
    scaled_step(net, optimizer)
    assert len(calls) == 3 and handle.clipper.state_dict()["steps"] == 1
    handle.remove()
    assert GradScaler.step is tracer


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_step_from_before_attach_is_refused(fused: bool) -> None:
    net = model()
    optimizer = SGD(net.parameters(), lr=1.0, fused=fused)
    bound_before = GradScaler.step
    handle = distnorm.attach(net, optimizer, {"clip": {"max_norm": MAX_NORM}})
    before = values(net)
    with pytest.raises(
        distnorm.UnsupportedGradientError, match=r"look up scaler\.step after distnorm\.attach"
    ):
        scaled_step(net, optimizer, bound_before)
    assert distance(net, before) == 0
    for name in ("grad_scale", "found_inf"):  # which torch leaves where a step raises
        vars(optimizer).pop(name, None)
    scaled_step(net, optimizer)
    assert distance(net, before) == pytest.approx(MAX_NORM, rel=1e-4)
    assert handle.clipper.state_dict()["steps"] == 1


def test_a_disabled_scaler_is_no_scaler() -> None:
    net, optimizer, handle = attached()
    true = backward(net)
    GradScaler("cpu", enabled=False).step(optimizer)
    assert handle.last is not None and float(handle.last.total_norm) == pytest.approx(true, rel=1e-6)


def test_a_second_step_before_update_is_torchs_to_refuse() -> None:
    net, optimizer, handle = attached()
    scaler = GradScaler("cpu", init_scale=2.0)
    scaler.scale(loss_of(net)).backward()
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
        scaler.step(optimizer)
    assert handle.clipper.state_dict()["steps"] == 1


def test_after_an_overflow_a_step_without_the_scaler_is_clipped() -> None:
    net, optimizer, handle = attached()
    handle.remove()
    handle = distnorm.attach(net, optimizer, {"clip": {"max_norm": MAX_NORM, "nonfinite": "skip"}})
    scaler = GradScaler("cpu", init_scale=2.0)
    scaler.scale(loss_of(net, math.inf)).backward()
    scaler.step(optimizer)  # calls no step
    before, true = values(net), backward(net)
    optimizer.step()
    assert handle.last is not None and float(handle.last.total_norm) == pytest.approx(true, rel=1e-6)
    assert distance(net, before) == pytest.approx(MAX_NORM, rel=1e-4)


def one_of_two_optimizers() -> float:
    """The next scale, where one of two optimizers steps and the other's gradients overflow on rank 0."""
    net = fully_shard(model())
    first, second = SGD(net[0].parameters(), lr=1.0), SGD(net[2].parameters(), lr=1.0)
    distnorm.attach(net, [first, second], {"clip": {"max_norm": MAX_NORM, "nonfinite": "skip"}})
    scaler = GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(net)).backward()
    if dist.get_rank() == 0:
        net[2].weight.grad.to_local().fill_(math.inf)
    scaler.step(first)
    scaler.update()
    return scaler.get_scale()


def test_ranks_keep_one_scale_where_one_of_two_optimizers_steps(ranks: Any) -> None:
    assert ranks(2, one_of_two_optimizers) == [4.0, 4.0]
