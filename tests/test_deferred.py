"""`nonfinite: raise` where no step may wait for its norm: without effect at first, raised one step later."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import distnorm
from distnorm.measure.meter import Meter
from tests.counting import as_on_an_accelerator, collectives_and_reads
from tests.refusals import TIMEOUT, Heard, heard

RAISE = {"clip": {"max_norm": 1.0, "nonfinite": "raise"}}


def local(gradient: Any) -> Tensor:
    tensor: Tensor = getattr(gradient, "_local_tensor", gradient)
    return tensor


def model() -> list[tuple[str, nn.Parameter]]:
    """A sharded and a copied parameter, on as many ranks as there are."""
    copied = nn.Parameter(torch.ones(4))
    if not dist.is_initialized():
        return [("sharded", nn.Parameter(torch.ones(8, 3))), ("copied", copied)]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = nn.Parameter(distribute_tensor(torch.ones(8, 3), mesh, [Shard(0)]))
    copied = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
    return [("sharded", sharded), ("copied", copied)]


def backward(named: list[tuple[str, nn.Parameter]], bad: float | None = None) -> None:
    """Gradients of ones; of the sharded one an element of the last rank is `bad`, if that is given."""
    for name, parameter in named:
        gradient = torch.ones_like(parameter).detach()
        is_last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
        if bad is not None and name == "sharded" and is_last:
            local(gradient)[-1, -1] = bad
        parameter.grad = gradient


NORM = math.sqrt(28)


def steps_around_a_bad_one(bad: float) -> list[Any]:
    named = model()
    clipper, found = distnorm.GradClipper(named, RAISE), []
    with as_on_an_accelerator():
        for step in range(1, 4):
            backward(named, bad if step == 2 else None)
            found.append(heard(clipper.clip))
            found.append(max(float(local(p.grad).abs().max()) for _, p in named))
        found.append(heard(clipper.clip))  # the gradients of step 3 once more, which the error had left alone
        backward(named)
        found.append(heard(clipper.clip))
    return found


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_step_has_no_effect_and_is_raised_by_name_as_the_next_begins(ranks, bad):
    for found in ranks(2, steps_around_a_bad_one, bad, timeout=TIMEOUT):
        first, coef, second, zeroed, third, untouched, again, last = found
        assert first == ("", pytest.approx(NORM)) and coef == pytest.approx(1 / NORM, rel=1e-6)
        assert second[0] == "" and not math.isfinite(second[1]) and zeroed == 0
        assert third[0] == "NonFiniteGradientError" and untouched == 1
        assert third[1].startswith("step 2: ") and "'sharded' on rank 1" in third[1]
        assert "'copied'" not in third[1]
        assert again == last == ("", pytest.approx(NORM))


def test_no_good_step_reads_a_value(ranks):
    for costs in ranks(2, costs_of_steps):
        assert costs == [({"c10d::allreduce_": 1}, {})] * 4


def costs_of_steps() -> list[Any]:
    named = model()
    clipper, found = distnorm.GradClipper(named, RAISE), []
    with as_on_an_accelerator():
        for _ in range(5):
            backward(named)
            found.append(collectives_and_reads(clipper.clip))
    return found[1:]  # the first also agrees on partial gradients


CALLS = {
    "flush": lambda clipper: clipper.flush(),
    "close": lambda clipper: clipper.close(),
    "state_dict": lambda clipper: clipper.state_dict(),
}


def raised_by(call: str) -> list[Heard]:
    named = model()
    clipper = distnorm.GradClipper(named, RAISE)
    with as_on_an_accelerator():
        backward(named)
        clipper.clip()
        backward(named, math.nan)
        clipper.clip()
        found = [heard(lambda: CALLS[call](clipper))]
        backward(named)
        found.append(heard(clipper.clip))
        found.append(heard(clipper.clip))
    return found


@pytest.mark.parametrize("call", CALLS)
def test_calls_of_one_rank_raise_it_too_and_leave_nobody_waiting(ranks, call):
    for rank, (alone, together, good) in enumerate(ranks(2, raised_by, call, timeout=TIMEOUT)):
        assert alone[0] == together[0] == "NonFiniteGradientError"
        assert ("'sharded' on rank 1" in alone[1]) == (rank == 1)
        assert "'sharded' on rank 1" in together[1]
        assert good == ("", pytest.approx(NORM))


def test_raise_now_waits_and_raises_in_the_step_itself():
    named = model()
    clipper = distnorm.GradClipper(named, {"clip": {"max_norm": 1.0, "nonfinite": "raise_now"}})
    with as_on_an_accelerator():
        backward(named, math.nan)
        said = heard(clipper.clip)
    assert said[0] == "NonFiniteGradientError" and "'sharded' on rank 0" in said[1]
    assert float(named[1][1].grad[0]) == 1


def test_on_the_cpu_raise_raises_at_once():
    named = model()
    backward(named, math.nan)
    assert heard(distnorm.GradClipper(named, RAISE).clip)[0] == "NonFiniteGradientError"
    assert float(named[1][1].grad[0]) == 1


def disagreeing() -> list[Heard]:
    named = model()
    clipper = distnorm.GradClipper(named, RAISE)
    found = []
    with as_on_an_accelerator():
        backward(named)
        clipper.clip()
        backward(named)
        if dist.get_rank() == 0:
            named[0][1].grad = None
            named[1][1].grad = None
        found.append(heard(clipper.clip))
        found.append(float(local(named[1][1].grad).abs().max()) if dist.get_rank() else 0.0)
        backward(named)
        found.append(heard(clipper.clip))
        found.append(heard(clipper.clip))
    return found


def test_ranks_that_measured_different_gradients_learn_of_it_by_the_next_call(ranks):
    for made, copied, refused, good in ranks(2, disagreeing, timeout=TIMEOUT):
        assert made[0] == "" and math.isnan(made[1]) and copied == 0
        assert refused[0] == "DisagreementError" and "step 2" in refused[1] and "raise_now" in refused[1]
        assert good == ("", pytest.approx(NORM))


# ---- attached


@pytest.mark.parametrize("fused", [False, True])
def test_a_bad_step_of_an_optimizer_trains_nothing(fused):
    named = model()
    optimizer = torch.optim.SGD([p for _, p in named], lr=0.5, fused=fused)
    handle = distnorm.attach(named, optimizer, RAISE)
    before = [p.detach().clone() for _, p in named]
    with as_on_an_accelerator():
        backward(named, math.nan)
        optimizer.step()
        assert all(torch.equal(p, old) for (_, p), old in zip(named, before, strict=True))
        assert bool(handle.last.skipped) and not bool(handle.last.is_finite)
        backward(named)
        with pytest.raises(distnorm.NonFiniteGradientError, match=r"step 1: .*'sharded' on rank 0"):
            optimizer.step()
        assert all(torch.equal(p, old) for (_, p), old in zip(named, before, strict=True))
        optimizer.step()
        assert not any(torch.equal(p, old) for (_, p), old in zip(named, before, strict=True))
    handle.remove()


def test_mixed_dtypes_and_strides_are_named_each():
    dtypes = {"half": torch.float16, "bf16": torch.bfloat16, "double": torch.float64}
    dtypes["complex"] = torch.complex64
    named = [(name, nn.Parameter(torch.ones(6, 2, dtype=dtype))) for name, dtype in dtypes.items()]
    named.append(("empty", nn.Parameter(torch.ones(0, 2))))
    for bad in (*dtypes, "none"):
        clipper = distnorm.GradClipper(named, RAISE)
        with as_on_an_accelerator():
            for name, parameter in named:
                parameter.grad = torch.ones_like(parameter).detach().t().contiguous().t()
                if name == bad:
                    parameter.grad[3, 1] = math.inf
            clipper.clip()
            said = heard(clipper.clip)
        assert said[0] == ("" if bad == "none" else "NonFiniteGradientError")
        assert bad == "none" or f": '{bad}' on rank 0" in said[1]


FUSED_WAYS: dict[str, dict[str, Any]] = {
    "handed over": {},
    "scaled here": {"apply": "scale"},
    "groups": {"groups": [{"name": "g", "params": ["copied"], "max_norm": 0.5}]},
    "per tensor": {"policy": "per_tensor"},
}


@pytest.mark.parametrize("way", FUSED_WAYS)
def test_fused_optimizers_leave_a_bad_step_out_with_all_their_state(way):
    named = model()
    optimizer = torch.optim.AdamW([p for _, p in named], lr=0.1, fused=True)
    handle = distnorm.attach(named, optimizer, {"clip": {"max_norm": 1.0, **FUSED_WAYS[way]}})
    with as_on_an_accelerator():
        for step in range(3):
            backward(named, math.nan if step == 2 else None)
            before = [p.detach().clone() for _, p in named]
            state = {k: v.clone() for s in optimizer.state.values() for k, v in s.items()}
            optimizer.step()
    assert all(torch.equal(p, old) for (_, p), old in zip(named, before, strict=True))
    after = {k: v for s in optimizer.state.values() for k, v in s.items()}
    assert state and all(torch.equal(after[k], state[k]) for k in state)
    assert getattr(optimizer, "found_inf", None) is None
    handle.remove()


def two_optimizers(on_accelerator: bool) -> list[Any]:
    named, found = model(), []
    optimizers = [torch.optim.SGD([p], lr=0.0625) for _, p in named]
    handle = distnorm.attach(named, optimizers, RAISE)
    with as_on_an_accelerator() if on_accelerator else nullcontext():
        for step in range(5):
            backward(named, math.nan if step == 1 else None)
            said = [heard(optimizer.step)[0] for optimizer in optimizers]
            found.append((said, [round(float(p.grad.abs().max()), 4) for _, p in named]))
    handle.remove()
    return found


def test_several_optimizers_go_on_clipping_after_the_first_has_raised():
    good, coef = ["", ""], round(1 / NORM, 4)
    found = two_optimizers(on_accelerator=True)
    # The gradients of the step that begins with the error are good, so the other optimizer steps by them.
    assert [said for said, _ in found] == [good, good, ["NonFiniteGradientError", ""], good, good]
    assert [largest for _, largest in found] == [[coef] * 2, [0.0] * 2, [coef] * 2, [coef] * 2, [coef] * 2]
    both = ["NonFiniteGradientError"] * 2
    assert [said for said, _ in two_optimizers(on_accelerator=False)] == [good, both, good, good, good]


# ---- ranks keep step, whatever one of them met


def refused_on_one() -> list[Heard]:
    named, found = model(), []
    clipper = distnorm.GradClipper(named[:1], {"clip": {"max_norm": 1e9, "nonfinite": "raise"}})
    with as_on_an_accelerator():
        for step in range(6):
            backward(named)
            local(named[0][1].grad).mul_(10.0**step)
            if step == 1 and dist.get_rank() == 0:
                named[0][1].grad._local_tensor = torch.ones(2, 3)
            found.append(heard(clipper.clip))
    return found


def test_a_gradient_refused_on_one_rank_does_not_shift_the_ranks(ranks):
    first, second = ranks(2, refused_on_one, timeout=TIMEOUT)
    assert [kind for kind, _ in first] == [
        "",
        "UnsupportedGradientError",
        "UnsupportedGradientError",
        "",
        "",
        "",
    ]
    assert [kind for kind, _ in second] == ["", "", "DisagreementError", "", "", ""]
    for step in (0, 3, 4, 5):
        assert first[step][1] == second[step][1] == pytest.approx(math.sqrt(24) * 10**step)


def planned_anew_after_a_bad_step() -> list[Heard]:
    module = nn.Linear(3, 2)
    clipper, found = distnorm.GradClipper(module, RAISE), []
    with as_on_an_accelerator():
        for step in range(4):
            if step == 2:
                module.extra = nn.Parameter(torch.ones(2))
            for p in module.parameters():
                p.grad = torch.ones_like(p)
            if step == 1:
                module.bias.grad[0] = math.nan
            found.append(heard(clipper.clip))
    return found


def test_a_bad_step_is_raised_before_anybody_plans(ranks):
    for found in ranks(2, planned_anew_after_a_bad_step, timeout=TIMEOUT):
        assert [kind for kind, _ in found] == ["", "", "NonFiniteGradientError", ""]
        assert found[3][1] == pytest.approx(math.sqrt(10))


def joined_with_a_bad_last_step() -> list[str]:
    net = nn.parallel.DistributedDataParallel(nn.Linear(3, 1))
    clipper, found = distnorm.GradClipper(net, RAISE), []
    with as_on_an_accelerator(), Join([net, clipper]):
        for step in range(3 if dist.get_rank() else 1):
            net.zero_grad()
            net(torch.full((2, 3), math.nan if step == 2 else 1.0)).sum().backward()
            found.append(heard(clipper.clip)[0])
    net.zero_grad()
    net(torch.ones(2, 3)).sum().backward()
    with as_on_an_accelerator():
        found.append(heard(clipper.clip)[0])
    return found


def test_under_join_a_rank_waits_and_raises_at_once(ranks):
    alone, both = ranks(2, joined_with_a_bad_last_step, timeout=TIMEOUT)
    assert alone == ["", ""] and both == ["", "", "NonFiniteGradientError", ""]


# ---- what is said, and for how long


def test_value_with_a_monitored_step_zeroes_what_is_not_finite(tmp_path):
    named = model()
    config = {"clip": {"max_norm": 0.5, "policy": "value"}, "monitor": {"dir": tmp_path, "every": 1}}
    clipper = distnorm.GradClipper(named, config)
    with as_on_an_accelerator():
        backward(named, math.nan)
        clipper.clip()
        assert all(not p.grad.count_nonzero() for _, p in named)
        backward(named)
        assert heard(clipper.clip)[0] == "NonFiniteGradientError"


def test_the_fast_path_and_overlap_name_gradients_too(monkeypatch):
    for overlap in (False, True):
        named = model()
        with monkeypatch.context() as patch:
            patch.setattr(Meter, "listens", property(lambda meter: meter.waits))
            config = {"clip": {"max_norm": 1.0, "overlap": overlap}}
            clipper = distnorm.GradClipper(named, config)
            for step in range(4):
                for _, p in named:
                    p.grad = None
                    (p.sum() * (math.nan if step == 3 and p is named[0][1] else 1.0)).backward()
                clipper.clip()
            said = heard(clipper.clip)
        assert said[0] == "NonFiniteGradientError" and "'sharded' on rank 0" in said[1]


def test_a_gradient_of_two_parameters_is_named_by_both():
    named = [(name, nn.Parameter(torch.ones(3))) for name in "ab"]
    clipper = distnorm.GradClipper(named, RAISE)
    with as_on_an_accelerator():
        named[0][1].grad = named[1][1].grad = torch.tensor([1.0, math.nan, 1.0])
        clipper.clip()
        said = heard(clipper.clip)
    assert "'a' on rank 0, 'b' on rank 0" in said[1]


def test_a_call_of_one_rank_raises_once_and_a_loaded_state_forgets():
    named = model()
    clipper = distnorm.GradClipper(named, RAISE)
    state = clipper.state_dict()
    with as_on_an_accelerator():
        backward(named, math.nan)
        clipper.clip()
        assert [heard(clipper.flush)[0], heard(clipper.state_dict)[0]] == ["NonFiniteGradientError", ""]
        clipper.load_state_dict(state)
        backward(named)
        assert heard(clipper.clip) == ("", pytest.approx(NORM))


def test_a_bad_step_before_a_dry_run_is_raised_there():
    named = model()
    clipper = distnorm.GradClipper(named, RAISE)
    with as_on_an_accelerator():
        backward(named, math.nan)
        clipper.clip()
        with FakeTensorMode():
            assert heard(clipper.clip)[0] == "NonFiniteGradientError"
        backward(named)
        assert heard(clipper.clip) == ("", pytest.approx(NORM))


def unequal_and_infinite_replicas() -> list[Heard]:
    with as_on_an_accelerator():
        named = model()
        clipper, found = distnorm.GradClipper(named, RAISE), []
        for step in range(6):
            backward(named)
            if step == 1:
                named[1][1].grad._local_tensor.fill_(math.inf)  # on all ranks alike
            if step == 3 and dist.get_rank():
                named[1][1].grad._local_tensor.mul_(3)
            found.append(heard(clipper.clip))
    return found


def test_replicas_that_are_infinite_are_no_disagreement(ranks):
    for found in ranks(2, unequal_and_infinite_replicas, timeout=TIMEOUT):
        kinds = [kind for kind, _ in found]
        assert kinds == ["", "", "NonFiniteGradientError", "", "DisagreementError", ""]
        assert "'copied' on rank" in found[2][1]


def disagreements_of_one_rank() -> list[str]:
    named, found = model(), []
    clipper = distnorm.GradClipper(named, RAISE)
    with as_on_an_accelerator():
        backward(named)
        clipper.clip()
        backward(named)
        for _, p in named if dist.get_rank() == 0 else ():
            p.grad = None
        clipper.clip()
        found += [heard(call)[0] for call in (clipper.flush, clipper.flush, clipper.state_dict)]
        backward(named)
        found += [heard(clipper.clip)[0] for _ in range(2)]
    return found


def test_a_disagreement_is_raised_once_by_calls_of_one_rank(ranks):
    expected = ["DisagreementError", "", "", "DisagreementError", ""]
    assert ranks(2, disagreements_of_one_rank, timeout=TIMEOUT) == [expected] * 2


def test_a_gradient_refused_by_all_is_refused_once():
    named = model()
    clipper, found = distnorm.GradClipper(named, RAISE), []
    with as_on_an_accelerator():
        for step in range(4):
            backward(named)
            if step == 2:
                named[1][1].grad = torch.ones(4).to_sparse()
            found.append(heard(clipper.clip)[0])
    assert found == ["", "", "UnsupportedGradientError", ""]


def test_several_optimizers_under_a_scaler_go_on_clipping_too():
    named = [(name, nn.Parameter(torch.zeros(4))) for name in "ab"]
    optimizers = [torch.optim.SGD([p], lr=0.5) for _, p in named]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    handle = distnorm.attach(named, optimizers, RAISE)
    moved = []
    with as_on_an_accelerator():
        for step in range(6):
            for _, p in named:
                p.grad = torch.ones(4) * scaler.scale(torch.ones(()))
            if step == 1:
                named[0][1].grad[0] = math.nan
            before = [p.detach().clone() for _, p in named]
            for optimizer in optimizers:
                heard(lambda optimizer=optimizer: scaler.step(optimizer))
            scaler.update()
            change = [(p.detach() - old).abs().max() for (_, p), old in zip(named, before, strict=True)]
            moved.append(float(max(change)))
    handle.remove()
    clipped = pytest.approx(0.5 / math.sqrt(8), rel=1e-5)
    assert moved == [clipped, 0.0, clipped, clipped, clipped, clipped]
