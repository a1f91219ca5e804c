"""What ranks do together: fail alike, reduce on one device type, forget alike; and keep no weak reference."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distnorm
from distnorm.errors import ConfigError, CoverageError, DistnormError
from distnorm.plan.collectives import Ranks
from tests.refusals import TIMEOUT, Heard, clipper, heard, rank, with_gradient, with_ones

# ---- Ranks.together


def fails_together(kind: str, who: tuple[int, ...]) -> tuple[Heard, str]:
    """What a rank raises, and the class of what its error comes from."""
    error = {"ours": ConfigError("x: expected y"), "another's": KeyError("x")}[kind]
    ranks = Ranks()
    try:
        with ranks.together():
            if rank() in who:
                raise error
        return ("", ranks.any(False)), ""
    except DistnormError as caught:
        cause = caught.__cause__
        inner = cause.__cause__ if isinstance(cause, DistnormError) else None
        return (type(caught).__name__, str(caught)), type(inner or cause).__name__


def test_what_fails_on_no_rank_goes_on(ranks):
    assert ranks(3, fails_together, "ours", (), timeout=TIMEOUT) == [(("", [False]), "")] * 3


@pytest.mark.parametrize("who", [(1,), (0, 2), (0, 1, 2)], ids=str)
def test_what_fails_on_some_ranks_is_raised_on_all_with_their_numbers(ranks, who):
    for r, ((name, message), cause) in enumerate(ranks(3, fails_together, "ours", who, timeout=TIMEOUT)):
        assert name == "ConfigError" and "x: expected y" in message
        named = {(1,): "on rank 1: ", (0, 2): "on ranks [0, 2]: "}.get(who, "")
        assert message.startswith(named) and ("rank" in message) == bool(named)
        assert cause == ("ConfigError" if r in who else "NoneType")


def test_another_s_error_becomes_ours_on_all_ranks_and_is_chained(ranks):
    for r, ((name, message), cause) in enumerate(
        ranks(2, fails_together, "another's", (1,), timeout=TIMEOUT)
    ):
        assert (name, message) == ("DistnormError", "on rank 1: KeyError: 'x'")
        assert cause == ("KeyError" if r == 1 else "NoneType")


def unlike_errors() -> Heard:
    def body() -> None:
        with Ranks().together():
            raise [CoverageError("first"), ConfigError("second")][rank()]

    return heard(body)


def test_unlike_errors_are_all_named_and_the_kind_is_the_lowest_ranks(ranks):
    expected = ("CoverageError", "on rank 0: first; on rank 1: second")
    assert ranks(2, unlike_errors, timeout=TIMEOUT) == [expected] * 2


def test_alone_an_error_is_itself():
    error = ConfigError("x")
    with pytest.raises(ConfigError) as caught, Ranks().together():
        raise error
    assert caught.value is error


# ---- groups that are none


def outside_and_gone() -> list[Heard]:
    group, theirs = dist.new_group([0]), dist.new_group([0, 1])
    said = [heard(lambda: Ranks(group))] if rank() == 1 else []
    dist.destroy_process_group(theirs)
    said.append(heard(lambda: Ranks(theirs)))
    dist.destroy_process_group()
    said.append(heard(lambda: Ranks(theirs)))  # nor is it this process alone
    return said


def test_a_rank_outside_a_group_and_a_group_that_is_gone_are_told_apart(ranks):
    inside, outside = ranks(2, outside_and_gone, timeout=TIMEOUT)
    assert outside[0][0] == "DistnormError" and "member" in outside[0][1]
    for name, message in [*inside, *outside[1:]]:
        assert name == "DistnormError" and "destroyed" in message


# ---- the device of a step's vector


def device_types(steps: list[tuple[str, ...]]) -> list[str]:
    """Where vectors are reduced after each plan under "cpu:gloo,cuda:nccl", by what rank 0 has gradients on;
    rank 1 has none, or some in the CPU's memory."""
    types = mock.patch.object(Ranks, "_supported_device_types", lambda self: ("cpu", "cuda"))
    index = mock.patch.object(torch.accelerator, "current_device_index", lambda: 0)
    with types, index:
        group, found = Ranks(), []
        for kinds in steps:
            mine = kinds if rank() == 0 else kinds[1:]
            group.agree_on_device([torch.device(kind) for kind in mine])
            for preferred in ("cpu", "cuda"):
                found.append(group.reduce_device(torch.device(preferred, 0)).type)
    return found


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([("cuda",)], ["cuda"] * 2),
        ([("cuda", "cpu")], ["cuda"] * 2),
        ([()], ["cpu"] * 2),
        ([("cpu",), ("cuda",)], ["cpu"] * 2 + ["cuda"] * 2),
    ],
    ids=str,
)
def test_a_rank_without_gradients_reduces_where_the_others_do(ranks, steps, expected):
    assert ranks(2, device_types, steps, timeout=TIMEOUT) == [expected] * 2


# ---- plans that are kept


def plans_after_calls_of_its_own() -> list[Heard]:
    alone = [dist.new_group([r]) for r in range(2)]
    parameters = [with_gradient(3.0, 4.0), with_gradient(12.0)]

    def both() -> list[Heard]:
        gradients = [p.grad.clone() for p in parameters]
        return [
            heard(lambda: distnorm.get_total_norm(gradients)),
            heard(lambda: distnorm.clip_grad_norm_(parameters, math.inf)),
        ]

    said = both()
    if rank() == 0:
        for n in range(40):
            distnorm.get_total_norm([torch.ones(n + 1)], group=alone[0])
    said += both()
    for n in range(40):  # and plans of the common group are forgotten by both
        distnorm.get_total_norm([torch.ones(n + 1)])
    return said + both()


def test_calls_that_one_rank_makes_by_itself_cost_no_other_group_its_plans(ranks):
    assert ranks(2, plans_after_calls_of_its_own, timeout=TIMEOUT) == [[("", 13.0)] * 6] * 2


# ---- no weak reference to a tensor, which would forbid torch.utils.swap_tensors


def entry_points() -> dict[str, Callable[[nn.Module], Any]]:
    def clip(model: nn.Module) -> Any:
        made = clipper(model)
        return made, made.clip(), made.measure()

    def functions(model: nn.Module) -> Any:
        gradients = [p.grad for p in model.parameters()]
        total = distnorm.get_total_norm(gradients)
        distnorm.clip_grads_with_norm_(list(model.parameters()), 1.0, total)
        distnorm.clip_grad_norm_(list(model.parameters()), 1.0)
        return distnorm.clip_grad_norm_(model, 1.0)

    def overlap(model: nn.Module) -> Any:
        made = distnorm.GradClipper(model, {"clip": {"max_norm": 1.0, "overlap": True}})
        for _ in range(2):
            model.zero_grad()
            model(torch.ones(1, 3)).sum().backward()
            made.clip()
        made.close()
        return made

    def monitored(model: nn.Module) -> Any:
        made = distnorm.GradClipper(model, {"clip": {"max_norm": 1.0}, "monitor": {"every": 1}})
        return made, made.clip(), made.clip()

    def attach(model: nn.Module) -> Any:
        optimizer = torch.optim.AdamW(model.parameters())
        handle = distnorm.attach(model, optimizer, {"clip": {"max_norm": 1.0}})
        optimizer.step()
        optimizer.state.clear()
        return handle, optimizer

    return {f.__name__: f for f in (clip, functions, overlap, monitored, attach)}


@pytest.mark.parametrize("entry", entry_points().values(), ids=entry_points().keys())
def test_parameters_and_gradients_can_be_swapped_afterwards(entry):
    model = nn.Linear(3, 2)
    for _ in range(2):
        for p in model.parameters():
            with_ones(p)
        kept = entry(model)
    for p in model.parameters():
        gradient, p.grad = p.grad, None
        torch.utils.swap_tensors(gradient, torch.zeros_like(gradient))
        torch.utils.swap_tensors(p, copy.deepcopy(p))
    assert kept is not None
