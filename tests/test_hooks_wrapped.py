"""`attach` to optimizers in wrappers and containers; and what a refused `attach` leaves: nothing."""

from __future__ import annotations

import copy
import logging
import math
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.optim import SGD, AdamW, Optimizer

import distnorm
from distnorm.hooks.second_clipper import _clipped

MAX_NORM = 0.01
CLIP = {"clip": {"max_norm": MAX_NORM}}


class Accelerated(Optimizer):
    """As accelerate's: an Optimizer whose __init__ never ran, and so without hooks."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)


class LikeLightning:
    """As Lightning's: no Optimizer at all."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    @property
    def optimizer(self) -> Optimizer:
        return self._optimizer

    def step(self, closure: Any = None, **kwargs: Any) -> None:
        self._optimizer.step(closure, **kwargs)


class HookedLookahead(Optimizer):
    """An Optimizer with hooks of its own around another one."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)


class HookedContainer(Optimizer):
    """As torchtitan's: an Optimizer, and iterable, with one optimizer for each parameter."""

    def __init__(self, optimizer: Optimizer) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self.optimizers = [SGD([p], lr=1.0) for p in params]
        super().__init__(params, {})

    def __iter__(self) -> Iterator[Optimizer]:
        return iter(self.optimizers)

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


class PlainContainer:
    """A container of optimizers that is none itself."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizers = {
            str(i): SGD([p], lr=1.0)
            for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])
        }

    @property
    def param_groups(self) -> Any:
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.step()


class Derived(SGD):
    """Its step calls the hooks twice: in `super().step()` once more."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Averager:
    step = 0

    def average_parameters(self, params: Any) -> None:
        self.step += 1


WRAPPERS: dict[str, Callable[[Optimizer], Any]] = {
    "accelerate": Accelerated,
    "lightning": LikeLightning,
    "two deep": lambda optimizer: LikeLightning(Accelerated(optimizer)),
    "post-local SGD": lambda optimizer: PostLocalSGDOptimizer(optimizer, Averager()),
    "lookahead with hooks": HookedLookahead,
    "container with hooks": HookedContainer,
    "container without": PlainContainer,
    "several": lambda optimizer: [optimizer],
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))


def backward(net: nn.Module, factor: float = 100.0) -> float:
    """The true norm of a new gradient."""
    net.zero_grad()
    rows = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    (net(rows).square().mean() * factor).backward()
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in net.parameters()))


def values(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def distance(net: nn.Module, before: list[Tensor]) -> float:
    pairs = zip(net.parameters(), before, strict=True)
    return math.sqrt(sum(float((p.detach() - old).double().square().sum()) for p, old in pairs))


@pytest.fixture(autouse=True)
def _removed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    handles: list[distnorm.Handle] = []
    attach = distnorm.attach

    def attach_for_a_while(*args: Any, **kwargs: Any) -> distnorm.Handle:
        handles.append(attach(*args, **kwargs))
        return handles[-1]

    monkeypatch.setattr(distnorm, "attach", attach_for_a_while)
    yield
    for handle in handles:
        handle.remove()


def stepper(wrapper: Any) -> Any:
    return wrapper[0] if isinstance(wrapper, list) else wrapper


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_is_followed_and_clips_once_a_step(name: str, fused: bool) -> None:
    net = model()
    wrapper = WRAPPERS[name](SGD(net.parameters(), lr=1.0, fused=fused))
    handle = distnorm.attach(net, wrapper, CLIP)
    for step in range(1, 4):
        true, before = backward(net), values(net)
        stepper(wrapper).step()
        assert handle.last is not None
        assert float(handle.last.total_norm) == pytest.approx(true, rel=1e-6)
        assert distance(net, before) == pytest.approx(MAX_NORM, rel=1e-4)
        assert handle.clipper.state_dict()["steps"] == step


@pytest.mark.parametrize("unscales", ["nobody", "the wrapper"])
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("accelerate", "the wrapper"),
        ("accelerate", "the inner one"),  # as accelerate does
        ("lookahead with hooks", "the wrapper"),
        ("lookahead with hooks", "the inner one"),
        ("container with hooks", "the wrapper"),
    ],
)
def test_a_wrapper_under_a_scaler_is_unscaled_once(name: str, steps: str, unscales: str) -> None:
    net = model()
    wrapper = WRAPPERS[name](SGD(net.parameters(), lr=1.0))
    handle = distnorm.attach(net, wrapper, CLIP)
    stepping = wrapper if steps == "the wrapper" else wrapper.optimizer
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(1, 3):
        true = backward(net, factor=float(scaler.scale(torch.ones(())))) / 8
        before = values(net)
        if unscales != "nobody":
            scaler.unscale_(wrapper)
        scaler.step(stepping)
        scaler.update()
        assert handle.last is not None
        assert float(handle.last.total_norm) == pytest.approx(true, rel=1e-6)
        assert distance(net, before) == pytest.approx(MAX_NORM, rel=1e-4)
        assert handle.clipper.state_dict()["steps"] == step


def test_a_wrapper_that_attach_never_saw_is_known_to_the_scaler() -> None:
    net = model()
    optimizer = SGD(net.parameters(), lr=1.0)
    handle = distnorm.attach(net, optimizer, CLIP)
    wrapper, scaler = Accelerated(optimizer), torch.amp.GradScaler("cpu", init_scale=8.0)
    true = backward(net, factor=float(scaler.scale(torch.ones(())))) / 8
    scaler.step(wrapper)
    assert handle.last is not None and float(handle.last.total_norm) == pytest.approx(true, rel=1e-6)


def test_a_step_that_calls_super_is_one_step() -> None:
    net = model()
    SGD(net.parameters(), lr=1.0)  # from now on SGD.step calls hooks, and Derived.step too
    optimizer = Derived(net.parameters(), lr=1.0)
    handle = distnorm.attach(net, optimizer, CLIP)
    for step in range(1, 3):
        true = backward(net)
        optimizer.step()
        assert handle.last is not None and float(handle.last.total_norm) == pytest.approx(true, rel=1e-6)
        assert handle.clipper.state_dict()["steps"] == step


def test_the_inner_optimizer_alone_is_clipped_too() -> None:
    """As SAM does, whose second step calls its base optimizer and never its own `step`."""
    net = model()
    inner = SGD(net.parameters(), lr=1.0)
    handle = distnorm.attach(net, HookedLookahead(inner), CLIP)
    for step in range(1, 3):
        true, before = backward(net), values(net)
        inner.step()
        assert handle.last is not None and float(handle.last.total_norm) == pytest.approx(true, rel=1e-6)
        assert distance(net, before) == pytest.approx(MAX_NORM, rel=1e-4)
        assert handle.clipper.state_dict()["steps"] == step


def test_after_a_step_that_raised_the_next_is_clipped() -> None:
    net = model()
    first, second = SGD(net[0].parameters(), lr=1.0), SGD(net[2].parameters(), lr=1.0)
    handle = distnorm.attach(net, [first, second], {"clip": {"max_norm": MAX_NORM, "nonfinite": "raise"}})
    backward(net)
    first.step()
    backward(net, factor=math.nan)
    with pytest.raises(distnorm.NonFiniteGradientError):
        first.step()
    backward(net)
    before = values(net)
    second.step()  # the first that steps with these gradients
    assert handle.last is not None and bool(handle.last.was_clipped)
    assert distance(net, before) <= MAX_NORM * 1.0001
    hook = first.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        first.step()
    hook.remove()
    steps = handle.clipper.state_dict()["steps"]
    backward(net)
    first.step()
    assert handle.clipper.state_dict()["steps"] == steps + 1


class Endless:
    """Answers to every attribute with another one of its kind, as mocks do."""

    def __getattr__(self, name: str) -> Any:
        return Endless()

    def __call__(self) -> None:
        raise AssertionError


class NeverMade(SGD):
    def __init__(self) -> None:
        pass


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (3, "found int"),
        (nn.Linear(2, 2), "found Linear"),
        ([nn.Linear(2, 2)], "found Linear"),
        (Endless(), "found Endless"),
        (NeverMade(), "found NeverMade, whose step calls no hooks because its __init__ never ran"),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_what_wraps_no_optimizer_is_refused_by_its_type(given: Any, found: str) -> None:
    with pytest.raises(distnorm.DistnormError, match=rf"expected a torch optimizer, .*\.optimizer.*{found}"):
        distnorm.attach(model(), given, CLIP)


def test_an_optimizer_that_is_attached_in_a_wrapper_is_attached() -> None:
    net = model()
    inner = SGD(net.parameters(), lr=1.0)
    distnorm.attach(net, LikeLightning(inner), CLIP)
    with pytest.raises(distnorm.DistnormError, match="found SGD, which clips already"):
        distnorm.attach(net, Accelerated(inner), CLIP)


# ---- the parameters of an optimizer, and of the target


def test_another_models_optimizer_is_refused_with_counts() -> None:
    stranger = AdamW(nn.Linear(3, 3, bias=False).parameters())
    fact = r"expected AdamW .* none of its 1 among the target's 4 \(0 frozen\)"
    with pytest.raises(distnorm.DistnormError, match=fact):
        distnorm.attach(model(), stranger, CLIP)
    net = model()
    with pytest.raises(distnorm.DistnormError, match=fact):
        distnorm.attach(net, [SGD(net.parameters(), lr=1.0), stranger], CLIP)


def test_parameters_that_are_stepped_and_not_clipped_are_told_of_once(caplog: Any) -> None:
    net, more = model(), nn.Linear(2, 2)
    optimizer = SGD([*net.parameters(), *more.parameters()], lr=1.0)
    with caplog.at_level(logging.WARNING, "distnorm"):
        distnorm.attach(net, optimizer, CLIP)
        for _ in range(2):
            backward(net)
            optimizer.step()
    told = [r.getMessage() for r in caplog.records if r.name == "distnorm" and "trainable" in r.getMessage()]
    assert told == ["SGD steps 2 trainable parameters that are not in the target, and not clipped"]


def test_a_frozen_target_is_told_of(caplog: Any) -> None:
    net = model().requires_grad_(False)
    with caplog.at_level(logging.WARNING, "distnorm"):
        distnorm.attach(net, SGD(net.parameters(), lr=1.0), CLIP)
    assert "all 4 parameters of the target are frozen" in caplog.text
    with pytest.raises(distnorm.DistnormError, match=r"among the target's 4 \(4 frozen\)"):
        distnorm.attach(net, SGD(nn.Linear(2, 2).parameters(), lr=1.0), CLIP)


# ---- what a refused attach leaves


def traces(optimizers: list[Optimizer]) -> tuple[object, ...]:
    hooks = [len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in optimizers]
    return (torch.amp.GradScaler.step, len(_clipped), *hooks)


def refused_on_the_last_rank(case: str) -> tuple[bool, str, float]:
    """Whether nothing was left behind; the error; how far a step then goes, over its gradient's norm."""
    net, is_last = model(), dist.get_rank() == dist.get_world_size() - 1
    config: dict[str, Any] = {"clip": {"max_norm": MAX_NORM}}
    optimizer: Any = SGD(net.parameters(), lr=1.0, fused=not (case == "apply" and is_last))
    given: Any = optimizer
    if case == "apply":
        config["clip"]["apply"] = "optimizer"
    elif case == "stranger" and is_last:
        given = SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    elif case == "type" and is_last:
        given = net
    elif case == "plan" and is_last:
        with torch.no_grad():
            net[0].weight.add_(1.0)  # replicas that aren't
    elif case == "clips" and is_last:
        optimizer.param_groups[0]["max_grad_norm"] = 1.0
    before = traces([optimizer])
    with pytest.raises(distnorm.DistnormError) as caught:
        distnorm.attach(net, given, config)
    same = traces([optimizer]) == before
    true, old = backward(net), values(net)
    optimizer.step()
    return same, str(caught.value), distance(net, old) / true


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("apply", "on rank 1: clip.apply: expected fused optimizers .* found SGD, which is not fused"),
        ("stranger", "on rank 1: expected SGD to step parameters of the target"),
        ("type", "on rank 1: .*found Sequential"),
        ("plan", r"0\.weight"),
        ("clips", "on rank 1: max_grad_norm"),
    ],
)
def test_a_refused_attach_leaves_nothing_on_any_rank(ranks: Any, case: str, message: str) -> None:
    for same, text, moved in ranks(2, refused_on_the_last_rank, case):
        assert same
        assert pytest.approx(1.0, rel=1e-5) == moved
        assert re.search(message, text), text


# ---- copies


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copied_optimizer_is_not_attached_and_steps(how: str) -> None:
    net = model()
    optimizer = AdamW(net.parameters(), lr=0.1)
    handle = distnorm.attach(net, optimizer, CLIP)
    backward(net)
    optimizer.step()
    twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    steps = handle.clipper.state_dict()["steps"]
    copied = twin.param_groups[0]["params"][0]
    before = copied.detach().clone()
    copied.grad = torch.ones_like(copied)
    twin.step()
    assert not torch.equal(copied, before) and bool((copied.grad == 1).all())
    assert handle.clipper.state_dict()["steps"] == steps
    true = backward(net)
    optimizer.step()
    assert handle.last is not None and float(handle.last.total_norm) == pytest.approx(true, rel=1e-6)
    with pytest.raises(distnorm.DistnormError, match=r"handle\.clipper\.state_dict\(\)"):
        copy.deepcopy(handle)


def test_a_handle_is_shown_in_one_helpful_line() -> None:
    net = model()
    optimizer = SGD(net.parameters(), lr=1.0)
    handle = distnorm.attach(net, optimizer, CLIP)
    assert repr(handle).startswith("Handle(SGD; GradClipper(4 tensors, 1 rank, norm 2, max_norm 0.01, ")
    assert repr(handle).endswith(", 0 steps))")
    true = backward(net)
    optimizer.step()
    assert repr(handle).endswith(f", 1 step, last norm {true:.6g}))")
    handle.remove()
    assert repr(handle).startswith("Handle(removed; GradClipper(")


def zero_redundancy() -> tuple[float, float, float]:
    net = nn.parallel.DistributedDataParallel(model())
    optimizer = ZeroRedundancyOptimizer(net.parameters(), SGD, lr=1.0)
    handle = distnorm.attach(net, optimizer, CLIP)
    true, before = backward(net), values(net)
    optimizer.step()
    assert handle.last is not None
    return true, float(handle.last.total_norm), distance(net, before)


def test_zero_redundancy_steps_its_own_part_of_one_clipped_gradient(ranks: Any) -> None:
    for true, found, moved in ranks(2, zero_redundancy):
        assert found == pytest.approx(true, rel=1e-6)
        assert moved == pytest.approx(MAX_NORM, rel=1e-4)
