"""Statistics taken during backward count only while the gradients are what they were."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distnorm
from distnorm.measure.norms import Norm
from tests import oracle

OVERLAP = {"clip": {"overlap": True, "nonfinite": "propagate"}}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.extra = nn.Linear(7, 5), nn.Linear(5, 3), nn.Linear(5, 3, bias=False)

    def forward(self, rows: Tensor, uses_extra: bool = True) -> Tensor:
        hidden = torch.tanh(self.first(rows))
        return self.second(hidden) + (self.extra(hidden) if uses_extra else 0)


def backward(net: nn.Module, step: int, **options: Any) -> None:
    generator = torch.Generator().manual_seed(step)
    net(torch.randn(4, 7, generator=generator), **options).square().mean().backward()


def whole(net: nn.Module) -> list[Tensor]:
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]


class Watched:
    """A clipper, and how many gradients' memory its last call read after backward."""

    def __init__(self, net: nn.Module, config: dict[str, Any] = OVERLAP) -> None:
        self.net, self.clipper = net, distnorm.GradClipper(net, config)
        self._reads = 0
        measure = Norm.statistic_at

        def counted(norm: Norm, table: Any, *taken: Any) -> Tensor:
            self._reads += 1
            return measure(norm, table, *taken)

        Norm.statistic_at = counted  # type: ignore[method-assign]
        self._restore = lambda: setattr(Norm, "statistic_at", measure)

    def clip(self) -> tuple[float, float, int]:
        """The norm found, the true one, and whether memory was read for it."""
        expected, self._reads = oracle.dense_of(whole(self.net)), 0
        found = float(self.clipper.clip().total_norm)
        return found, expected, self._reads

    def close(self) -> None:
        self._restore()


@pytest.fixture
def watched():
    watched = Watched(Net())
    backward(watched.net, 0)
    watched.clip()  # the first reading is always with care
    watched.net.zero_grad()
    yield watched
    watched.close()


def test_after_backward_nothing_is_read(watched):
    for step in range(3):
        watched.net.zero_grad()
        backward(watched.net, step)
        found, expected, reads = watched.clip()
        assert (found, reads) == (pytest.approx(expected, rel=1e-12), 0)


def test_gradients_that_accumulate_are_read_anew(watched):
    for step in range(3):
        backward(watched.net, step)
    found, expected, reads = watched.clip()
    assert (found, reads) == (pytest.approx(expected, rel=1e-12), 0)


def test_an_unused_parameter_needs_no_slot(watched):
    for step in range(3):
        watched.net.zero_grad()
        backward(watched.net, step, uses_extra=False)
        found, expected, reads = watched.clip()
        assert found == pytest.approx(expected, rel=1e-12)
    assert reads == 0


def changes() -> dict[str, Callable[[nn.Module], None]]:
    def in_place(net: nn.Module) -> None:
        net.first.weight.grad.mul_(3)

    def replaced(net: nn.Module) -> None:
        net.first.weight.grad = net.first.weight.grad * 3

    def by_data(net: nn.Module) -> None:
        net.first.weight.grad.data = net.first.weight.grad * 3

    def by_foreach(net: nn.Module) -> None:
        torch._foreach_mul_([p.grad for p in net.parameters()], 2.0)

    def zeroed(net: nn.Module) -> None:
        net.zero_grad(set_to_none=False)

    def one_is_gone(net: nn.Module) -> None:
        net.extra.weight.grad = None

    def filled_by_hand(net: nn.Module) -> None:
        net.zero_grad()
        for p in net.parameters():
            p.grad = torch.ones_like(p)

    return {
        f.__name__: f for f in (in_place, replaced, by_data, by_foreach, zeroed, one_is_gone, filled_by_hand)
    }


@pytest.mark.parametrize("change", changes().values(), ids=changes().keys())
def test_a_gradient_that_changes_after_backward_is_measured(watched, change):
    backward(watched.net, 1)
    change(watched.net)
    found, expected, _ = watched.clip()
    assert found == pytest.approx(expected, rel=1e-12)


def test_what_was_measured_once_is_measured_again():
    net = Net()
    watched = Watched(net, {"clip": {"overlap": True, "max_norm": 0.01}})
    for step in range(2):
        net.zero_grad()
        backward(net, step)
        watched.clip()
    found, expected, reads = watched.clip()
    watched.close()
    assert found == pytest.approx(expected, rel=1e-12) == pytest.approx(0.01, rel=1e-4)
    assert reads == 1


def test_nonfinite_during_backward_is_raised_with_its_parameter():
    net = Net()
    clipper = distnorm.GradClipper(net, {"clip": {"overlap": True}})
    backward(net, 0)
    clipper.clip()
    net.zero_grad()
    with torch.no_grad():
        net.second.bias[0] = math.nan
    backward(net, 1)
    with pytest.raises(distnorm.NonFiniteGradientError, match=r"second\.bias|first|second|extra"):
        clipper.clip()


def test_a_sparse_gradient_is_refused_when_it_is_measured_not_in_backward():
    net = nn.Embedding(5, 2, sparse=True)
    clipper = distnorm.GradClipper(net, OVERLAP)
    net(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(distnorm.UnsupportedGradientError, match="expected a dense gradient"):
        clipper.clip()


def test_hooks_go_with_the_clipper():
    net = Net()
    clipper = distnorm.GradClipper(net, OVERLAP)
    backward(net, 0)
    assert net.first.weight._post_accumulate_grad_hooks
    del clipper
    gc.collect()
    assert not net.first.weight._post_accumulate_grad_hooks
    backward(net, 1)


# ---- ranks

Steps = list[tuple[float, float, int]]


def fsdp2_steps() -> Steps:
    net = Net()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(net.first, mesh=mesh)
    fully_shard(net, mesh=mesh)
    watched, steps = Watched(net), []
    for step in range(6):
        net.zero_grad()
        if step == 3:  # accumulated without a reduction, and then reduced
            net.set_requires_gradient_sync(False)
            backward(net, 10)
            net.set_requires_gradient_sync(True)
        backward(net, step)
        if step == 4:
            backward(net, 11)
        if step == 5:
            net.first.weight.grad.mul_(2)
        steps.append(watched.clip())
    return steps


def test_fsdp2(ranks):
    for steps in ranks(2, fsdp2_steps):
        assert all(found == pytest.approx(expected, rel=1e-6) for found, expected, _ in steps)
        # FSDP2 adds up in one buffer, whose pieces share a version: what was taken looks changed.
        assert [reads for _, _, reads in steps[1:]] == [0, 0, 0, 1, 1]


def doubling(factor: float, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
    """A user's own: what it gives is other than the sum."""
    return allreduce_hook(torch.distributed.group.WORLD, bucket).then(lambda f: f.value() * factor)


doubling.__annotations__["bucket"] = torch.distributed.GradBucket  # DDP compares the type itself
doubling.__annotations__["return"] = torch.futures.Future[Tensor]


def ddp_steps(as_view: bool, user_hook: bool) -> Steps:
    torch.manual_seed(0)
    net = DistributedDataParallel(Net(), gradient_as_bucket_view=as_view, find_unused_parameters=True)
    watched, steps = Watched(net), []
    if user_hook:
        net.register_comm_hook(2.0, doubling)
    for step in range(7):
        net.zero_grad()
        if step == 3:
            with net.no_sync():
                backward(net, 10)
        backward(net, step)
        if step == 4:
            backward(net, 11)
        if step == 5:
            net.module.first.weight.grad.mul_(2)
        if step == 6:
            net.zero_grad()
            backward(net, step, uses_extra=False)
        steps.append(watched.clip())
    return steps


@pytest.mark.parametrize("as_view", [False, True])
@pytest.mark.parametrize("user_hook", [False, True])
def test_ddp(ranks, as_view, user_hook):
    for steps in ranks(2, ddp_steps, as_view, user_hook):
        assert all(found == pytest.approx(expected, rel=1e-6) for found, expected, _ in steps)
        assert [reads for _, _, reads in steps[1:6]] == [0, 0, 0, 0, 1]


def steps_without_a_parameter(as_view: bool) -> Steps:
    net = DistributedDataParallel(Net(), gradient_as_bucket_view=as_view, find_unused_parameters=True)
    watched, steps = Watched(net), []
    net.register_comm_hook(2.0, doubling)
    for step in range(3):
        net.zero_grad()
        backward(net, step)
        backward(net, 10 + step, uses_extra=False)
        steps.append(watched.clip())
    return steps


@pytest.mark.parametrize("as_view", [False, True])
def test_ddp_keeps_the_old_gradient_of_what_no_rank_used(ranks, as_view):
    """So what its hook made of that is not the gradient."""
    for steps in ranks(2, steps_without_a_parameter, as_view):
        assert all(found == pytest.approx(expected, rel=1e-6) for found, expected, _ in steps)


def gradients_of_ddp(overlap: bool) -> list[Tensor]:
    net = DistributedDataParallel(Net())
    clipper = distnorm.GradClipper(net, {"clip": {"overlap": overlap}})
    backward(net, torch.distributed.get_rank())
    clipper.measure()
    return [p.grad for p in net.parameters()]


def test_ddp_reduces_as_before(ranks):
    for ours, theirs in zip(ranks(2, gradients_of_ddp, True), ranks(2, gradients_of_ddp, False), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def hook_that_is_there() -> None:
    net = DistributedDataParallel(Net())
    net.register_comm_hook(2.0, doubling)
    distnorm.GradClipper(net, OVERLAP)


def test_a_communication_hook_that_is_there_already_is_refused(ranks):
    for failure in ranks(2, hook_that_is_there, expect_errors=True):
        assert "ConfigError" in str(failure)
        assert "clip.overlap: expected a DDP module without a communication hook" in str(failure)
