"""Fused optimizers multiply by the coefficient, and skip, in their own step: `clip.apply`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

import distnorm
from distnorm.clipper import GradClipper
from tests.counting import collectives_and_reads

MAX_NORM = 0.1
MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda p: AdamW(p, lr=0.1, fused=True),
    "Adam": lambda p: Adam(p, lr=0.1, weight_decay=0.1, fused=True),
    "SGD": lambda p: SGD(p, lr=0.5, momentum=0.9, fused=True),
    "Adagrad": lambda p: Adagrad(p, lr=0.1, fused=True),
}
if not hasattr(MAKERS["Adagrad"]([nn.Parameter(torch.ones(1))]), "_step_supports_amp_scaling"):
    del MAKERS["Adagrad"]  # an older torch's takes no factor


def config(apply: str = "auto", nonfinite: str = "raise", max_norm: float = MAX_NORM) -> dict[str, Any]:
    return {"clip": {"max_norm": max_norm, "nonfinite": nonfinite, "apply": apply}}


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)


def backward(net: nn.Module, step: int, factor: float = 1.0) -> None:
    net.zero_grad()
    p = next(net.parameters())
    rows = torch.randn(3, 5, generator=torch.Generator().manual_seed(step)).to(p.dtype)
    (net(rows).square().mean() * factor).backward()


def values(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def length(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def train(
    make: Callable[[Any], Optimizer],
    apply: str,
    dtype: torch.dtype,
    max_norm: float = MAX_NORM,
    factor: float = 100.0,
) -> tuple[list[Tensor], list[float]]:
    net = model(dtype)
    optimizer = make(net.parameters())
    handle = distnorm.attach(net, optimizer, config(apply, max_norm=max_norm))
    norms = []
    for step in range(4):
        backward(net, step, factor)
        optimizer.step()
        norms.append(float(handle.last.clipped_norm))
    return values(net), norms


@pytest.fixture(autouse=True)
def removed() -> Iterator[None]:
    """Whatever a test attaches is removed at its end, also after its own `monkeypatch.undo()`."""
    handles: list[distnorm.Handle] = []
    attach = distnorm.attach

    def attach_for_a_while(*args: Any, **kwargs: Any) -> distnorm.Handle:
        handles.append(attach(*args, **kwargs))
        return handles[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distnorm, "attach", attach_for_a_while)
        yield
    for handle in handles:
        handle.remove()


@pytest.fixture
def no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a gradient is multiplied outside of the optimizer."""

    def refuse(self: GradClipper) -> None:
        raise AssertionError("clip() was called, which multiplies")

    monkeypatch.setattr(GradClipper, "clip", refuse)


@pytest.mark.usefixtures("no_pass")
@pytest.mark.parametrize("name", MAKERS)
def test_the_optimizer_multiplies_as_a_pass_would(name, monkeypatch):
    found, norms = train(MAKERS[name], "optimizer", torch.float32)
    assert norms == pytest.approx([MAX_NORM] * 4, rel=1e-4)
    monkeypatch.undo()
    expected, _ = train(MAKERS[name], "scale", torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("no_pass")
def test_bfloat16_is_rounded_once_less(monkeypatch):
    found, _ = train(MAKERS["AdamW"], "optimizer", torch.bfloat16)
    monkeypatch.undo()
    expected, _ = train(MAKERS["AdamW"], "scale", torch.bfloat16)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-6)


@pytest.mark.usefixtures("no_pass")
@pytest.mark.parametrize("name", MAKERS)
def test_a_coefficient_of_one_leaves_every_bit(name):
    found, _ = train(MAKERS[name], "auto", torch.float32, max_norm=1e6, factor=1.0)
    net = model()
    optimizer = MAKERS[name](net.parameters())
    for step in range(4):
        backward(net, step)
        optimizer.step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, values(net), strict=True))


@pytest.mark.usefixtures("no_pass")
@pytest.mark.parametrize("name", MAKERS)
def test_a_step_that_is_not_finite_is_skipped_without_a_host_read(name):
    net = model()
    optimizer = MAKERS[name](net.parameters())
    handle = distnorm.attach(net, optimizer, config("optimizer", "skip"))
    for step in range(2):
        backward(net, step)
        optimizer.step()
    before, state = values(net), copy.deepcopy(optimizer.state_dict())
    backward(net, 3, factor=math.nan)
    assert collectives_and_reads(optimizer.step)[1] == {}
    assert not handle.last.is_finite
    assert all(torch.equal(a, b) for a, b in zip(before, values(net), strict=True))
    after = optimizer.state_dict()
    for key, entry in state["state"].items():
        for what, value in entry.items():
            assert value is None or torch.equal(
                torch.as_tensor(value), torch.as_tensor(after["state"][key][what])
            )
    backward(net, 4)
    optimizer.step()
    assert not torch.equal(before[0], values(net)[0])


@pytest.mark.usefixtures("no_pass")
def test_two_optimizers_take_one_coefficient():
    net = model()
    first, second = SGD(net[0].parameters(), lr=1.0, fused=True), SGD(net[2].parameters(), lr=1.0, fused=True)
    distnorm.attach(net, [first, second], config())
    backward(net, 0)
    before = values(net)
    first.step()
    second.step()
    moved = [a - b for a, b in zip(before, values(net), strict=True)]
    assert math.sqrt(sum(float(m.double().square().sum()) for m in moved)) == pytest.approx(
        MAX_NORM, rel=1e-5
    )


@pytest.mark.usefixtures("no_pass")
def test_a_closure_is_measured_and_its_gradient_divided():
    net = model()
    optimizer = SGD(net.parameters(), lr=1.0, fused=True)
    distnorm.attach(net, optimizer, config())
    before = values(net)

    def closure() -> Tensor:
        backward(net, 0)
        return torch.zeros(())

    optimizer.step(closure)
    moved = [a - b for a, b in zip(before, values(net), strict=True)]
    assert math.sqrt(sum(float(m.double().square().sum()) for m in moved)) == pytest.approx(
        MAX_NORM, rel=1e-5
    )


def test_nothing_is_left_on_the_optimizer_even_if_its_step_raises():
    net = model()
    optimizer = AdamW(net.parameters(), fused=True)
    handle = distnorm.attach(net, optimizer, config())
    backward(net, 0)
    optimizer.step()
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))
    optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    handle.remove()
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))


def test_a_scaler_keeps_its_own_way():
    net, plain = model(), model()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for found, apply in ((net, "auto"), (plain, "scale")):
        optimizer = SGD(found.parameters(), lr=1.0, fused=True)
        handle = distnorm.attach(found, optimizer, config(apply))
        backward(found, 0, factor=float(scaler.scale(torch.ones(()))))
        scaler.step(optimizer)
        assert float(handle.last.clipped_norm) == pytest.approx(MAX_NORM, rel=1e-4)
        handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(values(net), values(plain), strict=True))


def obstacles() -> dict[str, tuple[Callable[[nn.Module], Optimizer], torch.dtype, str]]:
    float32 = torch.float32
    return {
        "not fused": (lambda net: AdamW(net.parameters()), float32, "AdamW, which is not fused"),
        "float64": (lambda net: AdamW(net.parameters(), fused=True), torch.float64, "float64 parameters"),
        "foreign": (
            lambda net: AdamW([*net.parameters(), nn.Parameter(torch.zeros(2))], fused=True),
            float32,
            "parameters that are not clipped",
        ),
        "part": (
            lambda net: AdamW(net[0].parameters(), fused=True),
            float32,
            "clipped parameters that another optimizer may step",
        ),
    }


@pytest.mark.parametrize(("make", "dtype", "fact"), obstacles().values(), ids=obstacles().keys())
def test_what_can_not_be_handed_over_is_scaled_or_refused_by_name(make, dtype, fact):
    net = model(dtype)
    with pytest.raises(distnorm.ConfigError, match=f"clip.apply: expected .*{fact}"):
        distnorm.attach(net, make(net), config("optimizer"))
    optimizer = make(net)
    handle = distnorm.attach(net, optimizer, config("auto"))
    backward(net, 0)
    seen: list[float] = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(
            math.sqrt(sum(float(p.grad.double().square().sum()) for p in net.parameters()))
        )
    )
    optimizer.step()
    assert seen == [pytest.approx(MAX_NORM, rel=1e-5)]
    handle.remove()


def test_zeroing_is_no_division():
    with pytest.raises(distnorm.ConfigError, match=r"clip\.apply: .* nonfinite: zero"):
        net = model()
        distnorm.attach(net, AdamW(net.parameters(), fused=True), config("optimizer", "zero"))


def fsdp2_update(apply: str) -> tuple[float, float]:
    """The largest error of an update, and the norm's relative error."""
    net = model()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = AdamW(net.parameters(), lr=0.1, eps=1.0, betas=(0.0, 0.0), weight_decay=0.0, fused=True)
    handle = distnorm.attach(net, optimizer, config(apply))
    backward(net, 0)
    whole = [p.grad.full_tensor() for p in net.parameters()]
    before = [p.full_tensor().detach().clone() for p in net.parameters()]
    optimizer.step()
    total = length(whole)
    coef = min(1.0, MAX_NORM / (total + 1e-6))
    worst = 0.0
    for p, old, g in zip(net.parameters(), before, whole, strict=True):
        clipped = coef * g.double()
        expected = old.double() - 0.1 * clipped / (clipped.abs() + 1.0)  # AdamW without memory
        worst = max(worst, float((p.full_tensor().double() - expected).abs().max()))
    return worst, abs(float(handle.last.total_norm) - total) / total


def test_dtensors_are_divided_too(ranks):
    for worst, error in ranks(2, fsdp2_update, "optimizer"):
        assert worst < 1e-6
        assert error < 1e-6
