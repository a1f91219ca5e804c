"""torch's `Join`: ranks that are out of data shadow DDP's own collectives, and nobody else's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import distnorm
from tests.refusals import TIMEOUT, heard, rank

STEPS = (3, 0, 1)  # of each rank
POLICIES = {
    "constant": {"max_norm": 1.0},
    "overlap": {"max_norm": 1.0, "overlap": True},
    "zclip": {"max_norm": 1.0, "policy": {"name": "zclip"}},
}


def replicated() -> DistributedDataParallel:
    torch.manual_seed(0)
    return DistributedDataParallel(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)))


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    model(torch.full((4, 6), step + 1.0)).square().sum().backward()


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def true_norm(model: nn.Module) -> float:
    return float(torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in gradients(model)])))


FUNCTIONS = {
    "module": lambda m: distnorm.clip_grad_norm_(m, math.inf),
    "inner module": lambda m: distnorm.clip_grad_norm_(m.module, math.inf),
    "parameters": lambda m: distnorm.clip_grad_norm_(list(m.parameters()), math.inf),
    "gradients": lambda m: distnorm.get_total_norm(gradients(m)),
}


def functions_under_join(given: str) -> list[float]:
    model, errors = replicated(), []
    with Join([model]):
        for step in range(STEPS[rank()]):
            backward(model, step)
            true = true_norm(model)
            errors.append(abs(float(FUNCTIONS[given](model)) / true - 1))
    backward(model, 0)
    errors.append(abs(float(FUNCTIONS[given](model)) / true_norm(model) - 1))
    return errors


@pytest.mark.parametrize("given", FUNCTIONS)
def test_functions_measure_alone_while_others_are_joined(ranks, given):
    found = ranks(3, functions_under_join, given, timeout=TIMEOUT)
    assert [len(errors) for errors in found] == [steps + 1 for steps in STEPS]
    # The functions' results are fp32, rounded once.
    assert all(error < 1.2e-7 for errors in found for error in errors)


def clipper_under_join(clip: dict[str, Any], is_attached: bool) -> tuple[list[float], Any]:
    model = replicated()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    handle = distnorm.attach(model, optimizer, {"clip": clip}) if is_attached else None
    clipper = distnorm.GradClipper(model, {"clip": clip}) if handle is None else handle.clipper
    norms = []

    def train(step: int) -> None:
        backward(model, step)
        true = true_norm(model)
        result = None if handle is not None else clipper.clip()
        optimizer.step()
        result = clipper.last if result is None else result
        norms.append(float(result.total_norm) / true)

    with Join([model, clipper]):
        for step in range(STEPS[rank()]):
            train(step)
    state = clipper.state_dict()
    train(0)
    return norms, (state, float(clipper.last.threshold), [p.tolist() for p in model.parameters()])


@pytest.mark.parametrize("is_attached", [False, True], ids=["clip", "attach"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_clipper_among_what_join_is_given(ranks, policy, is_attached):
    found = ranks(3, clipper_under_join, POLICIES[policy], is_attached, timeout=TIMEOUT)
    assert [len(norms) for norms, _ in found] == [steps + 1 for steps in STEPS]
    assert all(ratio == pytest.approx(1, abs=1.2e-7) for norms, _ in found for ratio in norms)
    assert found[0][1] == found[1][1] == found[2][1]
    assert found[0][1][0]["steps"] == max(STEPS)


def after_join_without_the_clipper() -> tuple[Any, Any]:
    """`Join` is over, though it was not given the clipper and its modules keep what it has set."""
    model = replicated()
    clipper = distnorm.GradClipper(model)
    with Join([model]):
        for step in range(STEPS[rank()]):
            backward(model, step)
            clipper.clip()
    total = heard(lambda: distnorm.get_total_norm([torch.ones(6)]))
    backward(model, 0)
    next(iter(model.parameters())).grad += rank()
    return total, heard(clipper.clip)[0]


def test_after_a_join_without_the_clipper_ranks_meet_again(ranks):
    expected = ("", pytest.approx(6**0.5, rel=1e-6))
    assert ranks(3, after_join_without_the_clipper, timeout=TIMEOUT) == [(expected, "ReplicaError")] * 3


def unequal_after_join() -> list[str]:
    model = replicated()
    clipper = distnorm.GradClipper(model)
    said = []
    for _ in range(2):
        with Join([model, clipper]):
            for step in range(STEPS[rank()]):
                backward(model, step)
                clipper.clip()
        backward(model, 0)
        said.append(heard(clipper.clip)[0])
        backward(model, 0)
        gradients(model)[0].add_(rank())
        said.append(heard(clipper.clip)[0])
    return said


def test_after_join_ranks_measure_together_again(ranks):
    """torch leaves DDP modules as `Join` has set them until the next one."""
    assert ranks(3, unequal_after_join, timeout=TIMEOUT) == [["", "ReplicaError"] * 2] * 3


def refused_under_join() -> list[str]:
    model, other = replicated(), nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    zclip = distnorm.GradClipper(model, {"clip": POLICIES["zclip"]})
    both = [*model.parameters(), *other.parameters()]
    said = []
    with Join([model]):
        for step in range(1 + rank()):
            backward(model, step)
            said += [
                heard(lambda: distnorm.clip_grad_norm_(both, 1.0))[1],
                heard(lambda: distnorm.get_total_norm([p.grad for p in both]))[1],
                heard(zclip.clip)[1],
            ]
    return said


def test_what_needs_the_ranks_out_of_data_is_refused(ranks):
    for refusals in ranks(2, refused_under_join, timeout=TIMEOUT):
        for parameters, tensors, histories in zip(*[iter(refusals)] * 3, strict=True):
            assert "expected under Join parameters that DDP replicates, found '4'" in parameters
            assert "expected under Join gradients or parameters that DDP replicates" in tensors
            assert "the clipper among what Join is given" in histories
