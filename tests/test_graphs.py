"""Within `torch.compile`: no graph break, one operator, and the bits of the eager call."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.fx.experimental.proxy_tensor import make_fx

import distnorm
from tests import oracle
from tests.old_torch import VERSION
from tests.refusals import TIMEOUT, heard

BACKENDS = ("eager", "aot_eager")
Made = Callable[[list[nn.Parameter]], Callable[[], Any]]


def parameters(dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 3) -> list[nn.Parameter]:
    return [nn.Parameter(torch.full((4, 3), float(i + 1), dtype=dtype)) for i, dtype in enumerate(dtypes)]


def fill(found: list[nn.Parameter], seed: int, without: int | None = None) -> None:
    dice = torch.Generator().manual_seed(seed)
    for i, p in enumerate(found):
        p.grad = None if i == without else torch.randn(4, 3, generator=dice, dtype=torch.float64).to(p.dtype)


def gradients(found: list[nn.Parameter]) -> list[Tensor]:
    return [getattr(p.grad, "_local_tensor", p.grad).clone() for p in found if p.grad is not None]


CALLS: dict[str, Made] = {
    "get_total_norm": lambda found: lambda: distnorm.get_total_norm([p.grad for p in found]),
    "another order": lambda found: lambda: distnorm.get_total_norm([p.grad for p in found], 3.0),
    "clip_grad_norm_": lambda found: lambda: distnorm.clip_grad_norm_(found, 0.5),
    "of a generator": lambda found: lambda: distnorm.clip_grad_norm_((p for p in found), 0.5, 1.0),
}  # fmt: skip


def clipping(found: list[nn.Parameter], **clip: Any) -> Callable[[], distnorm.ClipResult]:
    return distnorm.GradClipper(found, {"clip": {"max_norm": 0.5, **clip}}).clip


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_the_functions_have_no_graph_break_and_the_same_bits(name, backend):
    eager, found = parameters(), parameters()
    compiled = torch.compile(CALLS[name](found), fullgraph=True, backend=backend)
    for seed in range(3):
        fill(eager, seed)
        fill(found, seed)
        expected, norm = CALLS[name](eager)(), compiled()
        assert torch.equal(norm, expected) and norm.dtype is torch.float32 and not norm.requires_grad
        assert all(map(torch.equal, gradients(found), gradients(eager)))
    assert torch._dynamo.explain(CALLS[name](found))().graph_break_count == 0


POLICIES: dict[str, dict[str, Any]] = {
    "constant": {},
    "zclip": {"policy": {"name": "zclip", "warmup": 2}},
    "percentile": {"policy": {"name": "percentile", "window": 3, "p": 50}, "max_norm": None},
    "adagc": {"policy": {"name": "adagc", "warmup": 2, "warmup_max_norm": 0.5}, "max_norm": None},
    "agc": {"policy": {"name": "agc", "lambda": 0.01}, "max_norm": None},
    "skip_spikes": {"policy": {"name": "skip_spikes", "k": 0.1, "window": 3, "after": 2}},
    "value": {"policy": "value", "max_norm": 0.1},
    "per_tensor": {"policy": "per_tensor"},
    "schedule": {"policy": {"name": "schedule", "curve": "linear",
                            "points": [{"step": 0, "factor": 1}, {"step": 4, "factor": 0.1}]}},
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", POLICIES)
def test_a_clipper_has_no_graph_break_and_the_same_bits(name, backend):
    eager, found = parameters(), parameters()
    plain, inside = clipping(eager, **POLICIES[name]), clipping(found, **POLICIES[name])
    compiled = torch.compile(inside, fullgraph=True, backend=backend)
    for seed in range(6):
        fill(eager, seed)
        fill(found, seed)
        expected, result = plain(), compiled()
        for field in ("total_norm", "clip_coef", "clipped_norm", "threshold"):
            ours, theirs = getattr(result, field), getattr(expected, field)
            assert ours.dtype is torch.float64 and torch.equal(ours.nan_to_num(-1), theirs.nan_to_num(-1))
        for field in ("is_finite", "was_clipped", "skipped"):
            assert torch.equal(getattr(result, field), getattr(expected, field))
        assert all(map(torch.equal, gradients(found), gradients(eager)))
    clipper = inside.__self__
    assert clipper.state_dict() == plain.__self__.state_dict()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_come_and_go(backend):
    found = parameters((torch.float32, torch.bfloat16, torch.float64))
    compiled = torch.compile(clipping(found), fullgraph=True, backend=backend)
    for seed, without in enumerate((None, 1, None, 0)):
        fill(found, seed, without)
        true = oracle.dense_of([p.grad for p in found if p.grad is not None])
        assert float(compiled().total_norm) == pytest.approx(true, rel=1e-12)
        after = oracle.dense_of([p.grad for p in found if p.grad is not None])
        assert after == pytest.approx(0.5, rel=1e-2)


@pytest.mark.skipif(VERSION < (2, 13), reason="an older torch's compiled SGD has other bits")
def test_a_whole_training_step_compiles():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    other = copy.deepcopy(model)
    losses = []
    for net, compiles in ((model, True), (other, False)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        named = list(net.parameters())

        def after_backward(named: Any = named, optimizer: Any = optimizer) -> Tensor:
            norm = distnorm.clip_grad_norm_(named, 0.1)
            optimizer.step()
            return norm

        step = torch.compile(after_backward, backend="eager") if compiles else after_backward
        for i in range(3):
            optimizer.zero_grad()
            net(torch.ones(4, 6) * (i + 1)).square().sum().backward()
            losses.append(float(step()))
    assert losses[:3] == losses[3:]
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_errors_come_out_of_a_graph():
    found = parameters()
    compiled = torch.compile(clipping(found), fullgraph=True, backend="aot_eager")
    fill(found, 0)
    compiled()
    fill(found, 1)
    found[1].grad[0, 0] = math.nan
    before = gradients(found)
    with pytest.raises(distnorm.NonFiniteGradientError, match="'1' on rank 0"):
        compiled()
    for now, then in zip(gradients(found), before, strict=True):
        assert torch.equal(now.nan_to_num(7), then.nan_to_num(7))
    fill(found, 2)
    assert float(compiled().total_norm) > 0


# ---- ranks


def sharded(backend: str) -> list[Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    dense = copy.deepcopy(net)
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    clip = distnorm.GradClipper(net, {"clip": {"max_norm": 0.5}}).clip
    compiled, found = torch.compile(clip, fullgraph=True, backend=backend), []
    for step in range(3):
        inputs = torch.ones(4, 6) * (step + 1)
        for each in (net, dense):
            each.zero_grad()
            each(inputs).square().sum().backward()
        true = oracle.dense_of([p.grad for p in dense.parameters()])
        norm = float(compiled().total_norm)
        after = oracle.dense_of([p.grad.full_tensor() for p in net.parameters()])
        found.append((norm, true, after))
    torch._dynamo.reset()
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_fsdp2_is_clipped_in_a_graph(ranks, backend):
    for found in ranks(2, sharded, backend, timeout=4 * TIMEOUT):
        for norm, true, after in found:
            assert norm == pytest.approx(true, rel=1e-5) and after == pytest.approx(0.5, rel=1e-5)


def on_plain_ranks() -> list[Any]:
    """Each rank has a parameter of its own, and a replica of one, unreduced in the last step."""
    torch._dynamo.reset()
    own = nn.Parameter(torch.ones(3))
    both = nn.Parameter(torch.ones(4))
    named = [(f"own{dist.get_rank()}", own), ("both", both)]
    clip = distnorm.GradClipper(named, {"clip": {"max_norm": 1.0}}).clip
    compiled, found = torch.compile(clip, fullgraph=True, backend="aot_eager"), []
    for step in range(3):
        own.grad, both.grad = torch.ones(3), torch.ones(4)
        if step == 2:
            both.grad *= 1 + dist.get_rank()
        found.append(heard(compiled))
    torch._dynamo.reset()
    return found


def test_ranks_reduce_and_compare_in_a_graph(ranks):
    for first, second, third in ranks(2, on_plain_ranks, timeout=4 * TIMEOUT):
        assert first == second == ("", pytest.approx(math.sqrt(10)))
        assert third[0] == "ReplicaError" and "'both'" in third[1]


def left_outside() -> list[float]:
    """What a graph can't hold is done outside of it, and rightly."""
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Shard(0)]))
    partial = nn.Parameter(DTensor.from_local(torch.ones(2), mesh, [Replicate()]))
    clip = distnorm.GradClipper([weight, partial], {"clip": {"max_norm": 1.0}}).clip
    found = []
    for call in (clip, lambda: distnorm.clip_grad_norm_([weight, partial], 1.0)):
        compiled = torch.compile(call, backend="eager")
        weight.grad = DTensor.from_local(torch.ones(2, 2), mesh, [Shard(0)])
        partial.grad = DTensor.from_local(torch.ones(2), mesh, [Partial()])
        norm = compiled()
        found.append(float(norm.total_norm if isinstance(norm, distnorm.ClipResult) else norm))
    torch._dynamo.reset()
    return found


@pytest.mark.slow
def test_partial_gradients_are_reduced_outside_of_the_graph(ranks):
    for found in ranks(2, left_outside, timeout=4 * TIMEOUT):
        assert found == pytest.approx([4.0, 4.0])  # 8 ones, and twos that two summands of one make


@pytest.mark.slow
def test_groups_and_modules_leave_the_graph_and_are_right():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    config = {
        "clip": {"max_norm": 1.0, "groups": [{"name": "head", "params": ["1.weight"], "max_norm": 0.5}]}
    }
    clip = distnorm.GradClipper(net, config).clip
    for call in (lambda: clip().total_norm, lambda: distnorm.clip_grad_norm_(net, 1.0)):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        assert float(torch.compile(call, backend="eager")()) == pytest.approx(math.sqrt(11), rel=1e-6)


def test_make_fx_records_one_operator():
    traced = make_fx(lambda a, b: distnorm.get_total_norm([a, b]))(torch.ones(3), torch.ones(4))
    called = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    ours = [name for name in called if "detach" not in name and "alias" not in name]  # which torch adds
    assert ours == ["distnorm.total_norm.default"]
    assert float(traced(torch.ones(3), 2 * torch.ones(4))) == pytest.approx(math.sqrt(19), rel=1e-7)


# ---- what a graph must not leave out, keep or confuse


@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_whose_results_are_not_used_are_made(backend):
    found = parameters()
    clipper = distnorm.GradClipper(found, {"clip": {"max_norm": 0.5}})

    def step(x: Tensor) -> Tensor:
        clipper.clip()
        distnorm.get_total_norm([x], error_if_nonfinite=True)
        return x + 1

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for without_gradients in (True, False):
        fill(found, 0)
        for p in found if without_gradients else ():
            p.grad = None
        compiled(torch.ones(2))
    assert clipper.state_dict()["steps"] == 2
    with pytest.raises(distnorm.NonFiniteGradientError):
        compiled(torch.full((2,), math.nan))


def a_rank_without_gradients(backend: str) -> list[Any]:
    torch._dynamo.reset()
    own = nn.Parameter(torch.ones(3))
    clipper = distnorm.GradClipper([(f"own{dist.get_rank()}", own)], {"clip": {"max_norm": 1e9}})

    def step(x: Tensor) -> Tensor:
        norm = clipper.clip().total_norm
        return norm if dist.get_rank() == 0 else x + 1

    compiled, found = torch.compile(step, backend=backend), []
    for without in (None, 1, None):
        own.grad = None if dist.get_rank() == without else torch.ones(3)
        found.append(float(compiled(torch.zeros(()))))
    torch._dynamo.reset()
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_without_gradients_that_uses_no_result_takes_part(ranks, backend):
    first, _ = ranks(2, a_rank_without_gradients, backend, timeout=4 * TIMEOUT)
    assert first == pytest.approx([math.sqrt(6), math.sqrt(3), math.sqrt(6)])


def test_parameters_that_changed_are_refused_until_an_eager_step():
    net = nn.Linear(4, 4, bias=False)
    clipper = distnorm.GradClipper(net, {"clip": {"max_norm": 1e9}})
    compiled = torch.compile(lambda: clipper.clip().total_norm, fullgraph=True, backend="aot_eager")
    net.weight.grad = torch.ones(4, 4)
    assert float(compiled()) == 4
    net.weight = nn.Parameter(torch.ones(4, 4))
    net.weight.grad = torch.ones(4, 4)
    with pytest.raises(distnorm.DistnormError, match="outside of the compiled function"):
        compiled()
    assert float(clipper.clip().total_norm) == float(compiled()) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_newest_result_is_the_clippers_last_one(backend):
    found = parameters()
    clipper = distnorm.GradClipper(found, {"clip": {"max_norm": 1e9}})

    def step() -> Tensor:
        clipper.clip()
        return clipper.last.total_norm

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for seed in range(3):
        fill(found, seed)
        true = oracle.dense_of([p.grad for p in found])
        assert float(compiled()) == float(clipper.last.total_norm) == pytest.approx(true, rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_that_is_given_twice_counts_once(backend):
    weight = nn.Parameter(torch.ones(4))
    compiled = torch.compile(lambda: distnorm.clip_grad_norm_([weight, weight], 1.0), backend=backend)
    weight.grad = torch.ones(4)
    assert float(compiled()) == 2 and torch.allclose(weight.grad, torch.full((4,), 0.5))


def test_a_noted_loss_is_there_when_the_step_is_taken():
    found = parameters()
    config = {"clip": {"max_norm": 1.0, "policy": {"name": "skip_spikes", "on": "loss"}}}
    clipper = distnorm.GradClipper(found, config)

    def step(loss: Tensor) -> Tensor:
        clipper.note(loss=loss)
        return clipper.clip().total_norm

    compiled = torch.compile(step, backend="aot_eager")
    for seed in range(3):
        fill(found, seed)
        assert float(compiled(torch.tensor(1.0 + seed))) > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_can_be_measured_and_no_graph_leads_through_the_norm(backend):
    found = parameters()
    norm = torch.compile(lambda: distnorm.get_total_norm(list(found)), backend=backend)()
    assert not norm.requires_grad and float(norm) == pytest.approx(math.sqrt(12 * (1 + 4 + 9)), rel=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow
def test_expanded_gradients_and_odd_arguments_leave_the_graph(backend):
    weight = nn.Parameter(torch.ones(3, 3))
    clipper = distnorm.GradClipper([weight], {"clip": {"max_norm": 1.0}})
    for call in (
        lambda: clipper.clip().total_norm,
        lambda: distnorm.clip_grad_norm_([weight], torch.tensor(1.0)),
        lambda: distnorm.clip_grad_norm_([weight], 1.0),
    ):
        weight.grad = torch.ones(3, 1).expand(3, 3)
        assert float(torch.compile(call, backend=backend)()) == 3
        assert torch.allclose(weight.grad, torch.full((3, 3), 1 / 3))
    with pytest.raises(distnorm.ConfigError):
        torch.compile(lambda: distnorm.clip_grad_norm_([weight], True), backend=backend)()


def test_a_graph_that_outlives_its_clipper_says_so():
    found = parameters()
    fill(found, 0)
    clipper = distnorm.GradClipper(found, {"clip": {"max_norm": 1.0}})
    traced = make_fx(lambda: clipper.clip().total_norm)()
    assert float(traced()) > 0
    clipper = None
    gc.collect()
    with pytest.raises(distnorm.DistnormError, match="it is gone"):
        traced()
