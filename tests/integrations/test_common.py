"""State that arrives before its clipper, and what a framework's logger gets."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch import nn

import distnorm
from distnorm.integrations.common import LateState, log_values
from tests.oracle import coefficient, dense_of, relative_error

CONFIG = {"clip": {"max_norm": 0.5, "policy": {"name": "percentile", "window": 8}}}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def take_steps(clipper: distnorm.GradClipper, parts: nn.Sequential, count: int) -> None:
    for step in range(count):
        parts.zero_grad()
        parts(torch.full((2, 4), step + 1.0)).square().sum().backward()
        clipper.clip()


def test_state_that_arrives_early_is_kept_and_loaded_late():
    parts = model()
    first = distnorm.GradClipper(parts, CONFIG)
    take_steps(first, parts, 4)
    saved = first.state_dict()
    assert saved["steps"] == 4

    state = LateState()
    assert state.state_dict() == {}
    state.load_state_dict(saved)
    assert state.state_dict() == saved, "a checkpoint saved before the clipper exists loses nothing"
    second = distnorm.GradClipper(parts, CONFIG)
    state.bind(second)
    assert second.state_dict() == saved == state.state_dict()
    state.load_state_dict({})
    assert second.state_dict() == saved

    take_steps(second, parts, 1)
    state.bind(None)
    third = distnorm.GradClipper(parts, CONFIG)
    state.bind(third)
    assert third.state_dict() == second.state_dict() != saved


def test_state_that_the_clipper_refuses_is_kept():
    state = LateState()
    state.load_state_dict({"version": 99})
    with pytest.raises(distnorm.DistnormError, match="version"):
        state.bind(distnorm.GradClipper(model()))
    assert state.state_dict() == {"version": 99} and state.clipper is None


def test_what_is_logged_is_what_was_measured_and_stays_on_the_device():
    parts = model()
    clipper = distnorm.GradClipper(parts, {"clip": {"max_norm": 0.5}})
    assert log_values(clipper) == {}
    parts(torch.ones(2, 4)).square().sum().backward()
    exact = dense_of([p.grad for p in parts.parameters()])
    clipper.clip()
    values = log_values(clipper)
    assert set(values) == {"grad_norm", "grad_norm_clipped", "clip_coef", "clip_threshold", "skipped"}
    assert all(isinstance(value, torch.Tensor) and value.dim() == 0 for value in values.values())
    assert relative_error(float(values["grad_norm"]), exact) < 1e-6
    assert relative_error(float(values["clip_coef"]), coefficient(exact, 0.5)) < 1e-6
    after = dense_of([p.grad for p in parts.parameters()])
    assert relative_error(float(values["grad_norm_clipped"]), after) < 1e-6
    assert float(values["clip_threshold"]) == 0.5 and float(values["skipped"]) == 0


def test_layer_norms_of_a_monitored_step_are_logged_once():
    parts = model()
    optimizer = torch.optim.SGD(parts.parameters(), lr=1e-3)
    handle = distnorm.attach(
        parts,
        optimizer,
        {"monitor": {"every": 2}},
    )
    handle.clipper.monitor.on_alert(lambda alert: None)
    exact = []
    for step in range(4):
        parts.zero_grad()
        parts(torch.full((2, 4), step + 1.0)).square().sum().backward()
        exact.append(dense_of([parts[1].bias.grad]))
        optimizer.step()
        layers = {key: value for key, value in log_values(handle.clipper).items() if "/" in key}
        assert set(layers) == (
            set() if step % 2 == 0 else {f"grad_norm/{name}" for name, _ in parts.named_parameters()}
        )
        if layers:
            assert relative_error(layers["grad_norm/1.bias"], exact[step]) < 1e-6
            assert not any("/" in key for key in log_values(handle.clipper)), "logged once"
    handle.remove()


@pytest.mark.parametrize("framework", ["transformers", "lightning", "torchtitan"])
def test_the_error_of_a_missing_framework_names_the_cure(framework, monkeypatch):
    adapter = f"distnorm.integrations.{framework}"
    monkeypatch.delitem(sys.modules, adapter, raising=False)
    for name in [framework, *(name for name in sys.modules if name.startswith(f"{framework}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=f"^expected {framework} ") as raised:
        importlib.import_module(adapter)
    assert str(raised.value).endswith(f"pip install 'distnorm[{framework}]'")
