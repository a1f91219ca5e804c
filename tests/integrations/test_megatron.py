"""Megatron-core's own classes, against one process in fp64."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from distnorm import testing
from distnorm.testing import dense_norm

testing.preload("tests.integrations.megatron_ranks")
LR = 0.1


def of_module(size: int) -> tuple[dict[str, Any], str]:
    """What training gives, and what is said where an attribute lies; all in one run of the ranks."""
    module = importlib.import_module("tests.integrations.megatron_ranks")
    return module.train(lie=False), module.train(lie=True)["error"] if size > 1 else ""


@pytest.mark.parametrize("size", [1, 2])
def test_norm_and_update_are_those_of_one_process_and_a_lie_is_named(ranks: Any, size: int) -> None:
    for found, error in ranks(size, of_module, size):
        check(found)
        if size > 1:
            assert "'fc1.bias'" in error and "no tensor_model_parallel=True" in error


def check(found: dict[str, Any]) -> None:
    weights = {name: w.double().requires_grad_() for name, w in found["before"].items()}
    x = torch.nn.functional.layer_norm(
        found["x"].double(), (8,), weights["norm.weight"], weights["norm.bias"]
    )
    x = torch.nn.functional.gelu(x @ weights["fc1.weight"].T + weights["fc1.bias"])
    (x @ weights["fc2.weight"].T + weights["fc2.bias"]).square().sum().backward()
    gradients = {name: w.grad for name, w in weights.items()}
    norm = dense_norm(gradients)
    assert norm > 0.5 and found["norm"] == pytest.approx(norm, rel=1e-5)
    for name, weight in weights.items():
        expected = weight.detach() - LR * gradients[name] * (0.5 / (norm + 1e-6))
        torch.testing.assert_close(found["after"][name].double(), expected, rtol=1e-5, atol=1e-6)
