"""Ranks that come to a step with unequal gradients, parameters or arguments: an error or NaN, no number.

A rank that has cause to complain raises; ranks that read nothing back find NaN.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import distnorm
from tests.refusals import (
    TIMEOUT,
    Heard,
    clipper,
    distributed,
    heard,
    is_nan,
    parameter,
    rank,
    with_ones,
)

Step = list[Heard]


def by_step(reports: list[Step]) -> list[list[Heard]]:
    """One list a step, of what each rank said."""
    return [list(step) for step in zip(*reports, strict=True)]


def all_raise(said: list[Heard], kind: str, *words: str) -> None:
    for name, message in said:
        assert name == kind, said
        assert all(word in message for word in words), (words, message)


def raises_or_nan(said: list[Heard], kind: str, by: set[int], *words: str) -> None:
    """The ranks that know raise; the others, that read nothing, find NaN and not a wrong number."""
    all_raise([said[r] for r in by], kind, *words)
    assert all(is_nan(one) or one[0] == kind for one in said), said


# ---- sparse gradients


def sparse_gradient(who: tuple[int, ...], first: bool, nonfinite: str) -> Step:
    """A good step first, unless the sparse one is to be the first."""
    embedding, other = nn.Parameter(torch.ones(4, 3)), with_ones(parameter(2))
    with_ones(embedding)
    measuring = clipper([("tok.weight", embedding), ("other", other)], nonfinite)
    said = [] if first else [heard(measuring.clip)]
    if rank() in who:
        embedding.grad = torch.ones(4, 3).to_sparse()
    said.append(heard(measuring.clip))
    with_ones(embedding), with_ones(other)
    return [*said, heard(measuring.measure)]


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("who", [(0, 1, 2), (1,)], ids=["all ranks", "one rank"])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
def test_a_sparse_gradient_is_refused_by_name(ranks, who, first, nonfinite):
    *_, said, after = by_step(ranks(3, sparse_gradient, who, first, nonfinite, timeout=TIMEOUT))
    words = "'tok.weight'", "sparse", "expected a dense gradient"
    if nonfinite == "raise" or first:
        all_raise(said, "UnsupportedGradientError", *words)
    else:
        raises_or_nan(said, "UnsupportedGradientError", set(who), *words)
    assert after == [("", 14**0.5)] * 3  # and the next good step is measured again


# ---- replicas that do not hold the same gradient


def never_reduced(nonfinite: str) -> Heard:
    layer = nn.Linear(3, 2, bias=False)
    nn.init.ones_(layer.weight)
    layer(torch.full((1, 3), float(rank() + 1))).sum().backward()  # and nobody averages over the ranks
    return heard(clipper(layer, nonfinite).clip)


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_never_reduced_gradients_are_refused(ranks, nonfinite):
    """Left alone, each rank would clip by another norm: 1/sqrt(world) low on average (RLinf #1558)."""
    said = ranks(3, never_reduced, nonfinite, timeout=TIMEOUT)
    all_raise(
        said, "ReplicaError", "'weight'", "expected the same gradient on every replica", "rank 0", "rank 2"
    )


def on_some_replicas(who: tuple[int, ...], first: bool, nonfinite: str) -> Step:
    """HSDP 2x2: ranks 0 and 2 hold one half of the parameter, 1 and 3 the other."""
    tensor, other = distributed((2, 2), [Replicate(), Shard(0)], 4, 1), with_ones(parameter(5))
    measuring = clipper([("layer.weight", tensor), ("other", other)], nonfinite)
    said = [] if first else [heard(measuring.clip)]
    with_ones(tensor), with_ones(other)
    if rank() not in who:
        tensor.grad = None
    said.append(heard(measuring.clip))
    with_ones(tensor), with_ones(other)
    return [*said, heard(measuring.measure)]


@pytest.mark.parametrize("nonfinite", ["raise", "zero"])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("who", [(0,), (1, 2, 3), (0, 3), (1, 2), (0, 1)], ids=str)
def test_a_gradient_on_some_replicas_only_is_refused(ranks, who, first, nonfinite):
    *_, said, after = by_step(ranks(4, on_some_replicas, who, first, nonfinite, timeout=TIMEOUT))
    if nonfinite == "raise" or first:
        all_raise(said, "ReplicaError", "'layer.weight'", "expected", "no gradient", "rank")
        assert not any("'other'" in message for _, message in said)
    else:
        raises_or_nan(said, "ReplicaError", set())
    assert after == [("", 3.0)] * 4


def on_both_replicas(nonfinite: str) -> Step:
    tensor, other = distributed((2, 2), [Replicate(), Shard(0)], 4, 1), with_ones(parameter(5))
    measuring = clipper([("layer.weight", tensor), ("other", other)], nonfinite)
    said = []
    for who in [(0, 2), (), (1, 3), (0, 1, 2, 3)]:
        tensor.grad = torch.ones_like(tensor) if rank() in who else None
        said.append(heard(measuring.measure))
    return said


@pytest.mark.parametrize("nonfinite", ["raise", "zero"])
def test_a_gradient_on_both_replicas_of_one_half_is_measured(ranks, nonfinite):
    said = by_step(ranks(4, on_both_replicas, nonfinite, timeout=TIMEOUT))
    assert said == [[("", n**0.5)] * 4 for n in (7, 5, 7, 9)]


# ---- the set of parameters


def changed_set(who: tuple[int, ...], seen_gradients: bool, nonfinite: str) -> Step:
    target = [("w", with_ones(parameter(4)))]
    measuring = clipper(target, nonfinite)
    said = [heard(measuring.clip)] if seen_gradients else []
    if rank() in who:
        target.append(("v", with_ones(parameter(5))))
    with_ones(target[0][1])
    said.append(heard(measuring.clip))
    with_ones(target[0][1])
    del target[1:]
    return [*said, heard(measuring.measure)]


@pytest.mark.parametrize("seen_gradients", [True, False], ids=["later", "before the first step"])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_set_of_parameters_that_changed_on_one_rank_is_refused(ranks, nonfinite, seen_gradients):
    *_, said, _ = by_step(ranks(3, changed_set, (1,), seen_gradients, nonfinite, timeout=TIMEOUT))
    if nonfinite == "raise":
        all_raise(said, "DisagreementError", "set")
    else:
        raises_or_nan(said, "DisagreementError", {1}, "set")


@pytest.mark.parametrize("seen_gradients", [True, False], ids=["later", "before the first step"])
def test_a_set_of_parameters_may_change_on_all_ranks(ranks, seen_gradients):
    *_, said, after = by_step(ranks(3, changed_set, (0, 1, 2), seen_gradients, "raise", timeout=TIMEOUT))
    assert (said, after) == ([("", 3.0)] * 3, [("", 2.0)] * 3)


# ---- the functions, each call with its own arguments


def arguments_that_differ(argument: str, value: Any, warm: bool, raises: bool) -> Step:
    tensor = with_ones(parameter(4))
    arguments = {"max_norm": 100.0, "norm_type": 2.0, "error_if_nonfinite": raises}
    theirs = {**arguments, argument: value}
    said = [heard(lambda: distnorm.clip_grad_norm_([tensor], **arguments))]
    if warm:  # both sets of arguments have a plan by now
        said.append(heard(lambda: distnorm.clip_grad_norm_([tensor], **theirs)))
    mixed = theirs if rank() == 1 else arguments
    said.append(heard(lambda: distnorm.clip_grad_norm_([tensor], **mixed)))
    with_ones(tensor)
    return [*said, heard(lambda: distnorm.clip_grad_norm_([tensor], **arguments))]


@pytest.mark.parametrize("raises", [True, False], ids=["raises", "reads nothing"])
@pytest.mark.parametrize("warm", [True, False], ids=["planned", "new to one rank"])
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("max_norm", 99.0),
        ("norm_type", 3.0),
        ("norm_type", 20.0),
        ("norm_type", float("inf")),
    ],
)
def test_arguments_that_differ_between_ranks_are_refused(ranks, argument, value, warm, raises):
    *_, said, after = by_step(ranks(3, arguments_that_differ, argument, value, warm, raises, timeout=TIMEOUT))
    if raises:
        all_raise(said, "DisagreementError")
    else:
        raises_or_nan(said, "DisagreementError", set())
    assert after == [("", 2.0)] * 3


def functions_never_reduced(raises: bool) -> Step:
    tensor = parameter(4)
    tensor.grad = torch.full((4,), float(rank() + 1))
    call = {"max_norm": 1.0, "error_if_nonfinite": raises}
    return [heard(lambda: distnorm.clip_grad_norm_([("w", tensor)], **call))]


@pytest.mark.parametrize("raises", [True, False])
def test_the_function_too_refuses_gradients_that_were_never_reduced(ranks, raises):
    (said,) = by_step(ranks(2, functions_never_reduced, raises, timeout=TIMEOUT))
    all_raise(said, "ReplicaError", "'w'", "rank 0", "rank 1")


def two_models_and_a_rank_without() -> Step:
    """Rank 0 holds nothing of either model, and so can't see that another one is measured now."""
    mesh = init_device_mesh("cpu", (3,))
    first = [("w", with_ones(parameter(4)))] if rank() else []
    second = [("v", with_ones(parameter(9)))] if rank() else []
    shared = nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Shard(0)]))  # rank 2 holds none of it
    with_ones(shared)
    calls = [first, second, first, [("shared", shared)], second]
    return [heard(lambda target=target: distnorm.clip_grad_norm_(target, 100.0)) for target in calls]


def test_a_rank_with_nothing_follows_the_others_from_model_to_model(ranks):
    said = by_step(ranks(3, two_models_and_a_rank_without, timeout=TIMEOUT))
    assert said == [[("", n)] * 3 for n in (2.0, 3.0, 2.0, pytest.approx(2**0.5), 3.0)]


def lists_that_change_on_one_rank(raises: bool) -> Step:
    """Stages of a pipeline, of which one has a gradient less in the second call."""
    gradients = [(f"{rank()}.{i}", torch.ones(2)) for i in range(8)]
    kept = [8, 8 if rank() == 0 else 3, 8]
    return [
        heard(lambda n=n: distnorm.get_total_norm(gradients[:n], error_if_nonfinite=raises)) for n in kept
    ]


@pytest.mark.parametrize("raises", [True, False])
def test_a_list_of_tensors_that_changed_on_one_rank_is_refused(ranks, raises):
    before, said, after = by_step(ranks(2, lists_that_change_on_one_rank, raises, timeout=TIMEOUT))
    raises_or_nan(said, "DisagreementError", {0, 1} if raises else set())
    assert before == after == [("", pytest.approx(32**0.5))] * 2
