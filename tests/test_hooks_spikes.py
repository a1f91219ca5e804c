"""`attach` under policies: spikes are skipped, and many coefficients never handed over to the optimizer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import distnorm
from distnorm.clipper import GradClipper
from tests.counting import collectives_and_reads

SPIKES = {"name": "skip_spikes", "above": 10.0}
KINDS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "single-tensor": {"foreach": False}}
HANDLES: list[distnorm.Handle] = []


@pytest.fixture(autouse=True)
def _handles_removed() -> Iterator[None]:
    yield
    while HANDLES:
        HANDLES.pop().remove()


def attached(net: nn.Module, optimizer: Optimizer, **clip: Any) -> distnorm.Handle:
    HANDLES.append(distnorm.attach(net, optimizer, {"clip": clip}))
    return HANDLES[-1]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))


def backward(net: nn.Module, factor: float) -> None:
    net.zero_grad()
    rows = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    (net(rows).square().mean() * factor).backward()


def values(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def same(net: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


def same_state(one: Any, other: Any) -> bool:
    return all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(other["state"][key][what]))
        for key, entry in one["state"].items()
        for what, value in entry.items()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_spike_is_skipped_and_nothing_moves(kind: str) -> None:
    net = model()
    optimizer = AdamW(net.parameters(), lr=0.1, **KINDS[kind])
    handle = attached(net, optimizer, max_norm=1.0, nonfinite="propagate", policy=SPIKES)
    backward(net, 1.0)
    optimizer.step()
    before, state = values(net), copy.deepcopy(optimizer.state_dict())
    assert handle.last is not None and not handle.last.skipped
    backward(net, 1e4)
    reads = collectives_and_reads(optimizer.step)[1]
    assert reads == {} or kind != "fused", "only a fused optimizer can skip on the device"
    assert handle.last.skipped and handle.last.is_finite
    assert same(net, before) and same_state(state, optimizer.state_dict())
    assert all(p.grad is not None for p in net.parameters()), "gradients are given back"
    backward(net, 1.0)
    optimizer.step()
    assert not handle.last.skipped and not same(net, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_spike_under_a_scaler_leaves_the_scale(kind: str) -> None:
    net = model()
    optimizer = SGD(net.parameters(), lr=0.1, **KINDS[kind])
    handle = attached(net, optimizer, policy=SPIKES)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    before = values(net)
    backward(net, 4e4)
    scaler.step(optimizer)
    scaler.update()
    assert handle.last is not None and handle.last.skipped and same(net, before)
    assert scaler.get_scale() == 4.0, "a spike is no overflow"
    backward(net, 4.0)
    scaler.step(optimizer)
    assert not handle.last.skipped and not same(net, before)


def test_a_loss_that_is_noted_skips() -> None:
    net = model()
    optimizer = SGD(net.parameters(), lr=0.1, fused=True)
    handle = attached(net, optimizer, policy={**SPIKES, "on": "loss"})
    before = values(net)
    for loss, skips in ((torch.tensor(50.0), True), (float("nan"), True), (2.0, False)):
        backward(net, 1.0)
        handle.note(loss=loss)
        optimizer.step()
        assert handle.last is not None and bool(handle.last.skipped) == skips
        assert same(net, before) == skips
    with pytest.raises(distnorm.DistnormError, match="expected a loss with every step"):
        optimizer.step()
    with pytest.raises(distnorm.DistnormError, match="loss: expected a 0-d tensor"):
        handle.note(loss="small")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("clip", "fact"),
    [
        (
            {"max_norm": 0.1, "policy": "per_tensor"},
            "policy per_tensor, which has a coefficient for each param",
        ),
        ({"policy": "agc"}, "policy agc, which has a coefficient for each output unit"),
        ({"max_norm": 0.1, "policy": "value"}, "policy value, which multiplies nothing"),
        ({"max_norm": 0.1, "groups": [{"params": ["*.bias"]}]}, "clip.groups, which have"),
    ],
)
def test_many_coefficients_are_never_handed_over(clip: dict[str, Any], fact: str) -> None:
    net, plain = model(), model()
    with pytest.raises(distnorm.ConfigError, match=f"clip.apply: expected fused .* found {fact}"):
        distnorm.attach(
            net, SGD(net.parameters(), lr=1.0, fused=True), {"clip": {**clip, "apply": "optimizer"}}
        )
    optimizer, by_hand = (
        SGD(net.parameters(), lr=1.0, fused=True),
        SGD(plain.parameters(), lr=1.0, fused=True),
    )
    attached(net, optimizer, **clip)
    for each in (net, plain):
        backward(each, 3.0)
    before = values(net)
    optimizer.step()
    GradClipper(plain, {"clip": clip}).clip()
    by_hand.step()
    assert same(net, values(plain)) and not same(net, before)


@pytest.mark.parametrize("policy", ["percentile", "zclip"])
def test_one_coefficient_of_a_policy_is_handed_over(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: GradClipper) -> None:
        raise AssertionError("clip() was called, which multiplies")

    net = model()
    optimizer = SGD(net.parameters(), lr=1.0, fused=True)
    handle = attached(net, optimizer, max_norm=0.01, policy=policy, apply="optimizer")
    monkeypatch.setattr(GradClipper, "clip", refuse)
    before = values(net)
    backward(net, 1.0)
    optimizer.step()
    moved = torch.cat([(p.detach() - old).flatten() for p, old in zip(net.parameters(), before, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-4)
    assert handle.last is not None and handle.last.was_clipped
