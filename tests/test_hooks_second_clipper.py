"""Another clip by torch's own functions, while something is attached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad, clip_grad_norm_, clip_grad_value_  # before anything is attached

import distnorm

ORIGINALS = (clip_grad_norm_, clip_grad_value_, torch.nn.utils.clip_grads_with_norm_)


def found_in_torch() -> tuple[Any, ...]:
    utils = torch.nn.utils
    assert clip_grad.clip_grad_norm_ is utils.clip_grad_norm_
    return utils.clip_grad_norm_, utils.clip_grad_value_, utils.clip_grads_with_norm_


def attached(clip: dict[str, Any] | None = None) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = distnorm.attach(model, optimizer, {"clip": clip or {"max_norm": 1.0}})
    backward(model)
    return model, optimizer, handle


def backward(model: nn.Module) -> None:
    model(torch.ones(2, 3)).square().sum().backward()


CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "clip_grad_norm_": lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1),
    "clip_grad_value_": lambda model: torch.nn.utils.clip_grad_value_(model.weight, clip_value=0.1),
    "clip_grads_with_norm_": lambda model: torch.nn.utils.clip_grads_with_norm_(
        list(model.parameters()), max_norm=0.1, total_norm=torch.tensor(5.0)
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_clip_by_torch_before_the_step_is_named_and_undone_at_remove(name):
    model, optimizer, handle = attached()
    CALLS[name](model)
    weight, clipped = model.weight.detach().clone(), model.weight.grad.clone()
    with pytest.raises(distnorm.ConfigError, match=rf"torch\.nn\.utils\.{name}.*true norm is lost"):
        optimizer.step()
    assert handle.last is None
    assert torch.equal(model.weight, weight) and torch.equal(model.weight.grad, clipped)
    optimizer.zero_grad()
    backward(model)
    optimizer.step()  # the refused call is over
    assert handle.last is not None
    handle.remove()
    assert found_in_torch() == ORIGINALS


def test_a_name_that_was_imported_before_is_seen_by_what_it_calls():
    model, optimizer, handle = attached()
    assert float(clip_grad_norm_(model.parameters(), 0.1)) > 0.1
    with pytest.raises(distnorm.ConfigError, match="clip_grads_with_norm_"):
        optimizer.step()
    handle.remove()


def test_other_parameters_a_measurement_and_a_paused_step_are_no_second_clip():
    model, optimizer, handle = attached()
    other = nn.Linear(3, 3)
    backward(other)
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert float(torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)) > 0.1
    assert torch.equal(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")), expected)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.zero_grad()
    backward(model)  # other gradients than those that were clipped
    with handle.paused():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
    optimizer.step()
    assert float(handle.last.total_norm) == pytest.approx(float(expected), rel=1e-5)
    handle.remove()


def test_anothers_wrapper_stays_and_two_handles_share_ours():
    _, _, first = attached()
    model, optimizer, second = attached()
    ours = torch.nn.utils.clip_grad_value_
    torch.nn.utils.clip_grad_value_ = theirs = lambda *args: ours(*args)
    try:
        first.remove()
        torch.nn.utils.clip_grad_norm_((p for p in model.parameters()), 0.1)
        with pytest.raises(distnorm.ConfigError, match="clip_grad_norm_"):
            optimizer.step()
        second.remove()
        assert torch.nn.utils.clip_grad_value_ is theirs
        assert torch.nn.utils.clip_grad_norm_ is ORIGINALS[0]
        torch.nn.utils.clip_grad_value_(model.weight, 1e-3)
        assert float(model.weight.grad.abs().max()) == pytest.approx(1e-3)
    finally:
        torch.nn.utils.clip_grad_value_ = ORIGINALS[1]


def one_rank_clips() -> None:
    torch.manual_seed(0)
    model, optimizer, _ = attached()
    if dist.get_rank() == 1:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def test_what_one_rank_clips_all_ranks_refuse(ranks):
    for failure in ranks(2, one_rank_clips, expect_errors=True):
        assert failure.type_name == "ConfigError" and "clip_grad_norm_" in failure.message


def test_a_compiled_clip_of_another_model_stays_one_graph():
    _, _, handle = attached()
    other = nn.Linear(3, 3)
    backward(other)

    def clip(parameters: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, 0.1)

    torch.compile(clip, backend="eager", fullgraph=True)(list(other.parameters()))
    assert other.weight.grad.norm() < 0.11
    handle.remove()
