"""`nonfinite: raise` where no step may wait for its norm: without effect at first, raised one step later."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import distnorm
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
        assert bool(handle.last.skipped) == fused and not bool(handle.last.is_finite)
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
