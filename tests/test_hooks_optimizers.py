"""`attach` to torch optimizers: what moves, what doesn't, and what all ranks find together."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distnorm

LR, MAX_NORM = 0.5, 0.25
KINDS = {"foreach": {"foreach": True}, "single-tensor": {"foreach": False}, "fused": {"fused": True}}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def loss_of(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return module(rows).square().sum()


def rows(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def dense_step(module: nn.Module, data: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """The norm, and the parameters after one clipped step of SGD, by the definition."""
    twin = copy.deepcopy(module)
    loss_of(twin, data).backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in twin.parameters()))
    coef = min(1.0, MAX_NORM / (norm + 1e-6))
    return norm, {name: (p - LR * coef * p.grad).detach() for name, p in twin.named_parameters()}


def same(module: nn.Module, expected: dict[str, torch.Tensor], rtol: float = 1e-12) -> bool:
    return all(torch.allclose(p, expected[name], rtol, 1e-15) for name, p in module.named_parameters())


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


HANDLES: list[distnorm.Handle] = []


@pytest.fixture(autouse=True)
def _handles_removed() -> Iterator[None]:
    yield
    while HANDLES:
        HANDLES.pop().remove()


def attached(module: nn.Module, optimizer: Any, nonfinite: str = "skip") -> distnorm.Handle:
    handle = distnorm.attach(module, optimizer, {"clip": {"max_norm": MAX_NORM, "nonfinite": nonfinite}})
    HANDLES.append(handle)
    return handle


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_closure", [False, True])
def test_a_step_is_the_clipped_step(kind: str, by_closure: bool) -> None:
    module = model()
    norm, expected = dense_step(module, rows())
    optimizer = torch.optim.SGD(module.parameters(), lr=LR, **KINDS[kind])
    handle = attached(module, optimizer)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(module, rows())
        loss.backward()
        return loss

    if by_closure:
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()
    assert handle.last is not None
    assert handle.last.total_norm.item() == pytest.approx(norm, rel=1e-14)
    assert same(module, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("user_unscales", [False, True])
def test_the_norm_is_of_unscaled_gradients(kind: str, user_unscales: bool) -> None:
    module = model()
    norm, expected = dense_step(module, rows())
    optimizer = torch.optim.SGD(module.parameters(), lr=LR, **KINDS[kind])
    handle = attached(module, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(module, rows())).backward()
    if user_unscales:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert handle.last is not None
    assert handle.last.total_norm.item() == pytest.approx(norm, rel=1e-6)  # the scale's reciprocal is fp32
    assert same(module, expected, rtol=1e-6)
    assert scaler.get_scale() == 1024.0


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step_moves_no_bit(kind: str, scaled: bool) -> None:
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, **KINDS[kind])
    handle = attached(module, optimizer)
    loss_of(module, rows()).backward()
    optimizer.step()
    before, moments = state(module), copy.deepcopy(optimizer.state_dict()["state"])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
    optimizer.zero_grad()
    scaler.scale(loss_of(module, rows() * math.inf)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert handle.last is not None and not handle.last.is_finite.item()
    assert all(torch.equal(value, before[name]) for name, value in state(module).items())
    for key, held in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[key][name]) for name, value in held.items())
    assert all(p.grad is not None for p in module.parameters()), "gradients are given back"
    assert not scaled or scaler.get_scale() == 4.0


def test_raise_leaves_the_parameters() -> None:
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    attached(module, optimizer, "raise")
    before = state(module)
    loss_of(module, rows() * math.nan).backward()
    with pytest.raises(distnorm.NonFiniteGradientError):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in state(module).items())


def test_several_optimizers_share_one_norm() -> None:
    module = model()
    norm, expected = dense_step(module, rows())
    optimizers = [torch.optim.SGD(part.parameters(), lr=LR) for part in (module[0], module[2])]
    handle = attached(module, optimizers)
    found = []
    for _ in range(2):
        loss_of(module, rows()).backward()
        for optimizer in optimizers:
            optimizer.step()
            assert handle.last is not None
            found.append(handle.last.total_norm.item())
            optimizer.zero_grad()
        if len(found) == 2:
            assert same(module, expected)
    assert found[0] == found[1] == pytest.approx(norm, rel=1e-14)
    assert found[2] == found[3] != found[0]


def test_accumulated_gradients_are_measured_as_they_are() -> None:
    module, data = model(), rows(6)
    norm, expected = dense_step(module, data)
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    handle = attached(module, optimizer)
    for part in data.split(2):
        loss_of(module, part).backward()
    optimizer.step()
    assert handle.last is not None
    assert handle.last.total_norm.item() == pytest.approx(norm, rel=1e-13)
    assert same(module, expected)


def test_remove_puts_everything_back() -> None:
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    step = torch.amp.GradScaler.step
    handle = attached(module, optimizer)
    assert all(hooks) and torch.amp.GradScaler.step is not step
    handle.remove()
    handle.remove()
    assert not any(hooks) and torch.amp.GradScaler.step is step
    loss_of(module, rows()).backward()
    optimizer.step()
    assert handle.last is None


@pytest.mark.parametrize("given", [None, "adamw", []])
def test_no_optimizer_is_refused(given: Any) -> None:
    with pytest.raises(distnorm.DistnormError, match="expected a torch optimizer"):
        distnorm.attach(model(), given)


class Clipping(torch.optim.SGD):
    """An optimizer that keeps a setting as apex, bitsandbytes and others do."""

    def __init__(self, module: nn.Module, where: str, key: str, value: object) -> None:
        super().__init__(module.parameters(), lr=LR)
        if where == "args":
            self.args = SimpleNamespace(**{key: value})
        elif where == "group":
            self.param_groups[-1][key] = value
        else:
            setattr(self, key, value)


OFF = [("max_grad_norm", 0), ("max_grad_norm", None), ("grad_clip", False), ("percentile_clipping", 100)]
ON = [("max_grad_norm", 1.0), ("grad_clip", True), ("clip_grad_norm", 0.5), ("percentile_clipping", 5)]


@pytest.mark.parametrize("where", ["group", "args", "optimizer"])
def test_an_optimizer_that_clips_by_itself_is_refused_by_its_key(where: str) -> None:
    for key, value in ON:
        module = model()
        with pytest.raises(distnorm.ConfigError, match=f"{key}: expected .*, found {value}: Clipping would"):
            distnorm.attach(module, Clipping(module, where, key, value))
    for key, value in [*OFF, ("max_grad_norm", math.inf), ("momentum", 0.9)]:
        module = model()
        attached(module, Clipping(module, where, key, value))


def test_an_optimizer_is_attached_to_once() -> None:
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    handle = attached(module, optimizer)
    with pytest.raises(distnorm.DistnormError, match=r"found SGD, which clips already; call remove\(\)"):
        distnorm.attach(module, optimizer)
    handle.remove()
    norm, expected = dense_step(module, rows())
    again = attached(module, optimizer)
    loss_of(module, rows()).backward()
    optimizer.step()
    assert again.last is not None and handle.last is None
    assert again.last.total_norm.item() == pytest.approx(norm, rel=1e-14)
    assert same(module, expected)


# ---- over ranks


def refused_on_one_rank() -> str:
    module = model()
    value = 1.0 if dist.get_rank() == 1 else 0.0
    with pytest.raises(distnorm.ConfigError) as caught:
        distnorm.attach(module, Clipping(module, "group", "max_grad_norm", value))
    return str(caught.value)


def test_what_one_rank_refuses_all_refuse(ranks: Any) -> None:
    for message in ranks(2, refused_on_one_rank):
        assert "max_grad_norm: expected 0, found 1.0" in message and "rank 1" in message


def sharded(kind: str) -> list[tuple[float, bool, float, bool]]:
    module = model()
    norm, expected = dense_step(module, rows())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if kind == "ddp":
        module = nn.parallel.DistributedDataParallel(module)
    else:
        for part in (*module, module):
            if list(part.parameters()):
                fully_shard(part, mesh=mesh)
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    handle = attached(module, optimizer)
    loss_of(module, rows()).backward()  # the same rows on every rank: their mean is that of one process
    optimizer.step()
    assert handle.last is not None
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in module.parameters()]
    right = all(torch.allclose(a, b, 1e-12, 1e-15) for a, b in zip(whole, expected.values(), strict=True))
    # One rank alone overflows; a scaler that each rank asks for itself would part them.
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer.zero_grad()
    scaler.scale(loss_of(module, rows())).backward()
    if dist.get_rank() == 0:
        first = next(module.parameters()).grad
        getattr(first, "to_local", lambda: first)().view(-1)[0] = math.inf
    before = [p.detach().clone() for p in module.parameters()]
    scaler.step(optimizer)
    scaler.update()
    kept = all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))
    return [
        (handle.last.total_norm.item() if handle.last.is_finite else norm, right, scaler.get_scale(), kept)
    ]


@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
def test_all_ranks_step_or_none(ranks: Any, kind: str) -> None:
    norm, _ = dense_step(model(), rows())
    for ((found, right, scale, kept),) in ranks(2, sharded, kind):
        assert found == pytest.approx(norm, rel=1e-13)
        assert right and kept and scale == 4.0
