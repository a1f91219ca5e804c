"""torch's three functions: its arguments with its meaning, and its results where torch's are right."""

from __future__ import annotations

import gc
import inspect
import math
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import distnorm
from distnorm.sources import recognition
from tests import oracle
from tests.counting import as_on_an_accelerator, collectives_and_reads
from tests.refusals import TIMEOUT, distributed, heard, rank, with_ones

FUNCTIONS = ("get_total_norm", "clip_grads_with_norm_", "clip_grad_norm_")


def model_with_gradients(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 3))
    model(torch.randn(4, 10)).square().sum().backward()
    return model


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_s_parameters_come_first_in_torch_s_order(name):
    theirs = inspect.signature(getattr(torch.nn.utils, name)).parameters
    ours = inspect.signature(getattr(distnorm, name)).parameters
    shared = list(ours)[: len(theirs)]
    assert shared == list(theirs)
    assert [ours[key].default for key in shared] == [theirs[key].default for key in shared]
    assert [ours[key].kind for key in shared] == [theirs[key].kind for key in shared]


@pytest.mark.parametrize("order", [0.5, 1, 2.0, 3, 20, "inf", math.inf])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_torch_s_results(order, foreach):
    ours, theirs = model_with_gradients(), model_with_gradients()
    expected = torch.nn.utils.get_total_norm(gradients(theirs), order, foreach=foreach)
    found = distnorm.get_total_norm(gradients(ours), order, foreach=foreach)
    assert (found.shape, found.dtype) == ((), torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    clipped = distnorm.clip_grad_norm_(ours.parameters(), 0.1, order, foreach=foreach)
    torch.testing.assert_close(clipped, expected, rtol=1e-5, atol=0)
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1, order, foreach=foreach)
    for one, other in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


@pytest.mark.parametrize("total", [0.5, 4.0, 0.0, math.inf, math.nan])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_clip_grads_with_norm_is_torch_s(total, max_norm):
    ours, theirs = model_with_gradients(), model_with_gradients()
    distnorm.clip_grads_with_norm_(ours.parameters(), max_norm, torch.tensor(total))
    torch.nn.utils.clip_grads_with_norm_(theirs.parameters(), max_norm, torch.tensor(total))
    for one, other in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0, equal_nan=True)


def test_the_three_functions_fit_together():
    whole, parts = model_with_gradients(), model_with_gradients()
    total = distnorm.get_total_norm(gradients(parts))
    distnorm.clip_grads_with_norm_(parts.parameters(), 0.1, total)
    assert torch.equal(total, distnorm.clip_grad_norm_(whole.parameters(), 0.1))
    for one, other in zip(gradients(whole), gradients(parts), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-7, atol=0)


def test_targets_of_every_kind():
    model = model_with_gradients()
    expected = distnorm.get_total_norm(gradients(model))
    for target in (
        model,
        [model[0], model[2]],
        model.parameters(),
        model.named_parameters(),
        dict(model.named_parameters()),
        tuple(model.parameters()),
    ):
        assert torch.equal(distnorm.clip_grad_norm_(target, math.inf), expected)
    weight = model[0].weight
    assert torch.equal(distnorm.clip_grad_norm_(weight, math.inf), distnorm.get_total_norm(weight.grad))
    assert torch.equal(distnorm.get_total_norm(model), distnorm.get_total_norm(list(model.parameters())))
    for empty in ([], iter([]), {}, torch.zeros(0), nn.Identity()):
        assert distnorm.get_total_norm(empty).item() == distnorm.clip_grad_norm_([], 1.0).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_wide_tensors_have_wide_norms_beyond_fp32_s_range(dtype, scale):
    parameter = nn.Parameter(torch.zeros(2, dtype=dtype))
    parameter.grad = torch.tensor([3.0, 4.0], dtype=dtype) * scale
    total = distnorm.get_total_norm([parameter.grad, torch.zeros(1)], 1.0)
    assert (total.dtype, total.item()) == (torch.float64, pytest.approx(7 * scale, rel=1e-14))
    clipped = distnorm.clip_grad_norm_([parameter], 7 * scale, 1.0)
    assert (clipped.dtype, clipped.item()) == (torch.float64, pytest.approx(7 * scale, rel=1e-14))
    # torch's formula adds 1e-6 to the norm, which is all of the smaller one.
    expected = scale * min(1.0, 7 * scale / (7 * scale + 1e-6))
    assert parameter.grad[0].abs().item() == pytest.approx(3 * expected, rel=1e-14, abs=0)


def test_a_generator_is_read_once_and_clips():
    model = model_with_gradients()
    total = distnorm.clip_grad_norm_((p for p in model.parameters()), 0.1)
    assert total > 0.1
    assert distnorm.get_total_norm(g for g in gradients(model)).item() == pytest.approx(0.1, rel=1e-5)


def test_integers_and_updates_and_parameters_are_measured_themselves():
    model = model_with_gradients()
    values = [p.detach() for p in model.parameters()]
    assert distnorm.get_total_norm(values).item() == pytest.approx(oracle.dense_of(values), rel=1e-7)
    assert distnorm.get_total_norm(model).item() == pytest.approx(oracle.dense_of(values), rel=1e-7)
    with pytest.raises(distnorm.UnsupportedGradientError, match=r"'0'.*int64"):
        distnorm.get_total_norm([torch.ones(3, dtype=torch.int64)])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_error_if_nonfinite(bad):
    model = model_with_gradients()
    model[0].bias.grad[3] = bad
    before = [oracle.bits(g) for g in gradients(model)]
    for call in (
        lambda: distnorm.clip_grad_norm_(model, 1.0, error_if_nonfinite=True),
        lambda: distnorm.get_total_norm(gradients(model), error_if_nonfinite=True),
    ):
        with pytest.raises(distnorm.NonFiniteGradientError) as caught:
            call()
        assert isinstance(caught.value, RuntimeError)
    assert [oracle.bits(g) for g in gradients(model)] == before
    assert distnorm.get_total_norm(gradients(model)).item() == pytest.approx(bad, nan_ok=True)
    with pytest.raises(RuntimeError, match=r"'0\.bias' on rank 0"):
        distnorm.clip_grad_norm_(model, 1.0, 2.0, True)


@pytest.mark.parametrize("order", [0, -1, math.nan, "two", None, True])
def test_orders_that_are_none_are_refused(order):
    with pytest.raises(distnorm.ConfigError, match="norm_type: expected"):
        distnorm.get_total_norm([torch.ones(1)], order)


@pytest.mark.parametrize("max_norm", [-1.0, math.nan, "one", True])
def test_thresholds_that_are_none_are_refused(max_norm):
    model = model_with_gradients()
    before = [oracle.bits(g) for g in gradients(model)]
    for call in (
        distnorm.clip_grad_norm_,
        lambda p, m: distnorm.clip_grads_with_norm_(p, m, torch.tensor(1.0)),
    ):
        with pytest.raises(distnorm.ConfigError, match="max_norm: expected"):
            call(model.parameters(), max_norm)
    assert [oracle.bits(g) for g in gradients(model)] == before


def test_gradients_in_the_place_of_parameters_are_refused():
    grads = gradients(model_with_gradients())
    before = [oracle.bits(g) for g in grads]
    torch.nn.utils.clip_grad_norm_(grads, 1e-3)  # torch: nothing happens, in silence
    assert [oracle.bits(g) for g in grads] == before
    for call in (
        distnorm.clip_grad_norm_,
        lambda p, m: distnorm.clip_grads_with_norm_(p, m, torch.tensor(1.0)),
    ):
        with pytest.raises(distnorm.DistnormError, match="gradients passed where parameters"):
            call(grads, 1e-3)


def test_the_cache_is_not_fooled_by_a_new_tensor_at_an_old_address():
    for i in range(50):
        model = nn.Linear(1 + i % 3, 2)
        with_ones(model.weight), with_ones(model.bias)
        assert distnorm.clip_grad_norm_(model.parameters(), math.inf).item() == pytest.approx(
            (4 + 2 * (i % 3)) ** 0.5
        )
        del model
        if i % 10 == 0:
            gc.collect()


def test_a_parameter_that_changes_its_shape_is_not_measured_by_the_old_plan():
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.ones(4)
    assert distnorm.clip_grad_norm_([parameter], math.inf).item() == 2.0
    parameter.grad = None
    parameter.data = torch.zeros(9)
    parameter.grad = torch.ones(9)
    assert distnorm.clip_grad_norm_([parameter], math.inf).item() == 3.0


# ---- ranks


def on_ranks() -> dict[str, Any]:
    """A DTensor, a plain replica and one of its own on each rank; some ranks have gradients missing."""
    sharded, plain = distributed((4,), [Shard(0)], 6, 2), with_ones(nn.Parameter(torch.zeros(3)))
    own = with_ones(nn.Parameter(torch.zeros(rank())))
    named = [("sharded", sharded), ("plain", plain), (f"stage{rank()}.own", own)]
    seen: dict[str, Any] = {"all": heard(lambda: distnorm.clip_grad_norm_(named, 100.0))}
    seen["tensors"] = heard(lambda: distnorm.get_total_norm([(name, p.grad) for name, p in named]))
    if rank() % 2:
        sharded.grad = None
    seen["some"] = heard(lambda: distnorm.clip_grad_norm_(named, 100.0))
    total = distnorm.get_total_norm([("plain", plain.grad)])
    new = [("plain", torch.ones(3) * 2)]
    with as_on_an_accelerator():
        seen["cost"] = collectives_and_reads(lambda: distnorm.clip_grad_norm_(named, 100.0))
        seen["cost of new tensors"] = collectives_and_reads(lambda: distnorm.get_total_norm(new))
        seen["clip costs"] = collectives_and_reads(lambda: distnorm.clip_grads_with_norm_(named, 1.0, total))
    return seen


def test_the_functions_over_ranks(ranks):
    shards = [4, 4, 4, 0]  # rows of two over four ranks: 2, 2, 2 and none
    for seen in ranks(4, on_ranks, timeout=TIMEOUT):
        assert seen["all"] == seen["tensors"] == ("", pytest.approx((12 + 3 + 6) ** 0.5))
        assert seen["some"] == ("", pytest.approx((shards[0] + shards[2] + 3 + 6) ** 0.5))
        assert seen["cost"] == seen["cost of new tensors"] == ({"c10d::allreduce_": 1}, {})
        assert seen["clip costs"] == ({}, {})


def results_of_dtensors() -> list[bool]:
    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    parameter.grad = torch.ones_like(parameter)
    plain = nn.Parameter(distribute_tensor(torch.ones(5), mesh, [Replicate()]))
    total = distnorm.clip_grad_norm_([parameter, plain], 1.0)
    of_torch = torch.nn.utils.get_total_norm([parameter.grad])  # a DTensor: accepted as it is
    distnorm.clip_grads_with_norm_([parameter], 0.5, of_torch)
    left = parameter.grad.to_local().square().sum().item() * 2
    return [type(total) is torch.Tensor, abs(total.item() - 8**0.5) < 1e-6, abs(left**0.5 - 0.5) < 1e-5]


def test_results_are_plain_tensors_and_torch_s_dtensors_are_accepted(ranks):
    assert ranks(2, results_of_dtensors, timeout=TIMEOUT) == [[True, True, True]] * 2


def test_a_list_of_modules_is_recognised_and_its_plan_used_again(monkeypatch):
    """As a pipeline's parts are given: to search the process for their managers takes longer than a step."""
    parts = [nn.Linear(3, 4), nn.Linear(4, 2)]
    named = [(f"{i}.{name}", p) for i, part in enumerate(parts) for name, p in part.named_parameters()]
    searches = []
    original = recognition.Managers
    monkeypatch.setattr(recognition, "Managers", lambda found: searches.append(found) or original(found))
    for step in range(4):
        if step == 3:  # another parameter in its place has to be found
            parts[1].bias = nn.Parameter(torch.zeros(2))
            named[3] = (named[3][0], parts[1].bias)
        for i, (_, parameter) in enumerate(named):
            parameter.grad = torch.full_like(parameter, float(i + step))
        expected = math.sqrt(sum((i + step) ** 2 * p.numel() for i, (_, p) in enumerate(named)))
        assert float(distnorm.clip_grad_norm_(parts, math.inf)) == pytest.approx(expected, rel=1e-6)
        assert len(searches) == (2 if step == 3 else 1)
    gone = weakref.ref(parts[0])
    del parts, named, parameter
    gc.collect()
    assert gone() is None


def test_every_argument_may_be_a_keyword_as_in_torch():
    for functions in (torch.nn.utils, distnorm):
        weight = nn.Parameter(torch.zeros(4))
        weight.grad = torch.full((4,), 2.0)
        total = functions.get_total_norm(tensors=[weight.grad], norm_type=2.0)
        assert float(total) == 4.0
        functions.clip_grads_with_norm_(parameters=[weight], max_norm=8.0, total_norm=total)
        assert float(functions.clip_grad_norm_(parameters=[weight], max_norm=1.0)) == 4.0
        torch.testing.assert_close(weight.grad, torch.full((4,), 0.5), rtol=1e-6, atol=0)
    assert float(distnorm.GradClipper(target=[weight], config={}).clip().total_norm) == pytest.approx(1.0)
