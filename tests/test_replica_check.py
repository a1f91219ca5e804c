"""Replicas are compared in every step: equal ones never raise a false alarm, and unreduced ones are found."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

import distnorm
from distnorm import kernels
from distnorm.measure.replica_check import ReplicaCheck, numbers_of_samples
from distnorm.plan.collectives import Ranks
from distnorm.plan.plan import Share
from distnorm.plan.terms import stable_hash
from distnorm.sources import shards_of
from distnorm.sources.shards import Source
from tests.refusals import TIMEOUT, Heard, clipper, distributed, heard, rank

CPU = torch.device("cpu")


def checks(replicas: int, parameters: list[nn.Parameter]) -> list[ReplicaCheck]:
    """Those of all ranks, each of which holds a replica of every parameter."""
    shards = shards_of([(str(i), p) for i, p in enumerate(parameters)], Source.GRADIENT)
    keys = [stable_hash(f"layers.{i}.weight") for i in range(len(shards))]
    found = []
    for r in range(replicas):
        shares = [Share(0, s.numel, replicas, r, k) for s, k in zip(shards, keys, strict=True)]
        found.append(ReplicaCheck.of(Ranks(alone=True), shards, shares))
    for check in found:  # alone, only the first replica's rank knows the noise, which an all-reduce adds up
        check.tolerance = found[0].tolerance
    return found


def difference(found: list[ReplicaCheck], gradients: list[list[torch.Tensor]]) -> float:
    """What the all-reduce makes of the ranks' summands."""
    return sum(float(c.of_tensors(g, CPU)) for c, g in zip(found, gradients, strict=True))


def parameters(count: int, numel: int, dtype: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(numel, dtype=dtype)) for _ in range(count)]


@pytest.mark.parametrize("replicas", [2, 3, 4, 7, 16])
def test_weights_add_up_to_zero_and_no_replica_weighs_nothing(replicas):
    found = checks(replicas, parameters(50, 3, torch.float32))
    weights = np.stack([check.weights for check in found])
    assert np.abs(weights.sum(axis=0)).max() < 1e-15 * replicas
    assert np.abs(weights).min() > 0.5 / replicas - 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_2000_random_steps_of_equal_replicas_raise_no_alarm(dtype):
    """Magnitudes from 1e-20 to 1e15, with zeros, up to 16 replicas and 100 shards."""
    generator = torch.Generator().manual_seed(0)
    worst, steps = 0.0, 0
    for replicas, count in [(2, 1), (2, 100), (3, 10), (8, 10), (16, 3), (16, 40)]:
        found = checks(replicas, parameters(count, 7, dtype))
        for _ in range(334):
            scales = 10.0 ** torch.randint(-20, 15, (count, 1), generator=generator)
            rows = torch.randn(count, 7, generator=generator) * scales
            own = list(rows.where(torch.rand(count, 7, generator=generator) > 0.2, 0.0).to(dtype).unbind())
            numbers = numbers_of_samples(kernels.samples_of(own).numpy())
            value = sum(float(check.weights @ numbers) for check in found)  # as `of_addresses` does
            assert not found[0].is_suspect(value), (replicas, count, value)
            worst, steps = max(worst, abs(value)), steps + 1
    assert steps >= 2000
    assert worst < 1e-12  # so is rounding far below what is suspected first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("replicas", [2, 16])
def test_another_gradient_on_one_replica_is_suspect(dtype, replicas):
    generator = torch.Generator().manual_seed(1)
    found = checks(replicas, parameters(20, 100, dtype))
    for odd in range(replicas):
        own = [torch.randn(100, generator=generator).to(dtype) for _ in range(20)]
        one_other = [*own[:7], torch.randn(100, generator=generator).to(dtype), *own[8:]]
        # bf16's last bits hide another direction in one of 20 gradients, but no summand that is missing.
        others = one_other if dtype is torch.float32 else [2 * gradient for gradient in own]
        value = difference(found, [others if r == odd else own for r in range(replicas)])
        assert found[0].is_suspect(value) and found[0].is_suspect(torch.tensor(value, dtype=torch.float64))


def test_a_nan_is_suspect():
    (check, _) = checks(2, parameters(1, 3, torch.float32))
    assert check.is_suspect(math.nan) and check.is_suspect(torch.tensor(math.nan, dtype=torch.float64))


def test_what_was_compared_once_is_not_suspect_again():
    (check, _) = checks(2, parameters(1, 3, torch.float32))
    value = check.tolerance * 3
    assert check.is_suspect(value)
    check.learn(-value)
    assert not check.is_suspect(value) and not check.is_suspect(-2 * value)
    assert check.is_suspect(10 * value)


def test_addresses_and_tensors_give_the_same_number():
    generator = torch.Generator().manual_seed(2)
    own = [torch.randn(5 + 300 * i, generator=generator) for i in range(6)]
    for check in checks(3, [nn.Parameter(torch.zeros_like(g)) for g in own]):
        table = kernels.AddressTable.of([own[i] for i in (0, 1, 3, 4, 5)])
        there = check.difference(check.numbers_at(table, np.array([0, 1, -1, 2, 3, 4])))
        # The sums are of the same five products, in another order: a rounding of fp64 for each.
        numbers = numbers_of_samples(kernels.samples_of(own).numpy())
        rounding = len(own) * 2**-53 * float(np.abs(check.weights) @ np.abs(numbers))
        assert abs(there - float(check.of_tensors([*own[:2], None, *own[3:]], CPU))) <= rounding


# ---- ranks


def plain(dtype: torch.dtype) -> tuple[Any, Any]:
    tensor = nn.Parameter(torch.zeros(50, dtype=dtype))

    def step(unreduced: bool, number: int) -> None:
        scale = 1 + rank() * unreduced
        local = torch.randn(50, generator=torch.Generator().manual_seed(number + 100 * scale))
        tensor.grad = (scale * local).to(dtype)

    return [("w", tensor)], step


def hsdp(dtype: torch.dtype) -> tuple[Any, Any]:
    """Ranks 0 and 2 hold one half, 1 and 3 the other."""
    mesh = init_device_mesh("cpu", (2, 2))
    placements = [Replicate(), Shard(0)]
    tensor = nn.Parameter(distributed((2, 2), placements, 40).detach().to(dtype))

    def step(unreduced: bool, number: int) -> None:
        scale = 1 + rank() // 2 * unreduced
        local = torch.randn(20, generator=torch.Generator().manual_seed(number + 100 * (rank() % 2)))
        tensor.grad = DTensor.from_local((scale * local).to(dtype), mesh, placements, run_check=False)

    return [("w", tensor)], step


def ddp(dtype: torch.dtype) -> tuple[Any, Any]:
    """Each rank has rows of its own, which DDP averages, but for `no_sync`."""
    torch.manual_seed(0)
    net = DistributedDataParallel(nn.Linear(9, 4).to(dtype))

    def step(unreduced: bool, number: int) -> None:
        net.zero_grad()
        rows = torch.randn(3, 9, generator=torch.Generator().manual_seed(number + 100 * rank()))
        rows = ((1 + rank()) * rows).to(dtype)
        if unreduced:
            with net.no_sync():
                net(rows).square().sum().backward()
        else:
            net(rows).square().sum().backward()

    return net, step


KINDS = {f.__name__: f for f in (plain, hsdp, ddp)}


def unreduced_in(kind: str, dtype: torch.dtype, which: int, nonfinite: str) -> list[Heard]:
    target, step = KINDS[kind](dtype)
    clipping, said = clipper(target, nonfinite), []
    for number in range(1, which + 1):
        step(number == which, number)
        said.append(heard(clipping.clip))
    step(False, which + 1)
    return [*said, heard(clipping.clip)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("which", "nonfinite"), [(1, "raise"), (2, "skip"), (7, "raise")])
def test_unreduced_replicas_are_refused_in_whichever_step(ranks, kind, dtype, which, nonfinite):
    for said in ranks(
        4 if kind == "hsdp" else 2, unreduced_in, kind, dtype, which, nonfinite, timeout=TIMEOUT
    ):
        assert [name for name, _ in said[: which - 1]] == [""] * (which - 1), said
        assert said[which - 1][0] == "ReplicaError" and "expected the same gradient" in said[which - 1][1]
        assert said[which][0] == ""  # and the next good step is measured


def one_element_differs_at_first() -> list[Heard]:
    """The sample of a step has 64 of these 20,000 elements, but the first step compares all of them."""
    said = []
    for place in (1, 777, 4_321, 9_999, 19_998):
        tensor = nn.Parameter(torch.zeros(20_000))
        tensor.grad = torch.ones(20_000)
        tensor.grad[place] += 1000 * rank()
        said.append(heard(clipper([tensor]).clip))
    return said


def test_the_first_step_compares_every_element_of_replicas(ranks):
    for said in ranks(2, one_element_differs_at_first, timeout=TIMEOUT):
        assert [name for name, _ in said] == ["ReplicaError"] * 5


def unreduced_after_the_full_form() -> list[Heard]:
    """A call for which the group's header is not packed any more, with and without replicas of its own."""
    target, step = plain(torch.float32)
    clipping, said = clipper(target), []
    step(False, 1)
    said.append(heard(clipping.clip))
    of_one_rank = [torch.ones(3)] if rank() == 0 else []
    said.append(heard(lambda: distnorm.get_total_norm(of_one_rank)))
    for number, unreduced in ((2, True), (3, False)):
        step(unreduced, number)
        said.append(heard(clipping.clip))
    return said


def test_unreduced_replicas_are_refused_once_the_header_is_not_packed(ranks):
    for said in ranks(2, unreduced_after_the_full_form, timeout=TIMEOUT):
        assert [name for name, _ in said] == ["", "", "ReplicaError", ""]


def last_bits_differ() -> tuple[list[Heard], int]:
    """As of replicas that each computed the gradient for itself, in another order."""
    from distnorm.measure import result_checks

    compared = []
    compare = result_checks.compare_replicas
    tensors = [nn.Parameter(torch.zeros(1000)) for _ in range(10)]
    clipping, said = clipper(tensors, max_norm=None), []
    for number in range(6):
        for i, tensor in enumerate(tensors):
            seed = torch.Generator().manual_seed(100 * number + i)
            noise = 1 + 2**-22 * torch.randint(
                -1, 2, (1000,), generator=torch.Generator().manual_seed(rank())
            )
            tensor.grad = torch.randn(1000, generator=seed) * noise
        said.append(heard(clipping.clip))
        result_checks.compare_replicas = lambda *a, **more: (compared.append(None), compare(*a, **more))[1]
    return said, len(compared)


def test_differences_in_last_bits_are_no_fault_and_soon_cost_nothing(ranks):
    for said, compared in ranks(2, last_bits_differ, timeout=TIMEOUT):
        assert [name for name, _ in said] == [""] * 6
        assert 1 <= compared <= 2, "once for each kind of difference, and then no more"
