"""Gradients that are kept elsewhere than in `.grad`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate

import distnorm
from distnorm.testing import dense_norm


def model_with_main_grads(scale: float = 1.0) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).bfloat16()
    for i, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(i)
        parameter.main_grad = torch.randn(parameter.shape, generator=generator) * scale
    return model


def main_grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.main_grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("grad_of", ["main_grad", lambda parameter: parameter.main_grad])
def test_gradients_elsewhere_are_measured_and_clipped_in_every_step(grad_of):
    model = model_with_main_grads()
    clipper = distnorm.GradClipper(model, {"clip": {"max_norm": 0.5}}, grad_of=grad_of)
    for scale in (1.0, 3.0, 2.0):  # buffers that stay, or are made anew
        for p, other in zip(model.parameters(), model_with_main_grads(scale).parameters(), strict=True):
            p.main_grad = other.main_grad if scale == 3.0 else p.main_grad.copy_(other.main_grad)
        before = main_grads(model)
        assert float(clipper.clip().total_norm) == pytest.approx(dense_norm(before), rel=1e-6)
        for name, after in main_grads(model).items():
            torch.testing.assert_close(after, before[name] * (0.5 / dense_norm(before)))
    assert all(p.grad is None for p in model.parameters())


def test_the_functions_take_gradients_elsewhere():
    model = model_with_main_grads()
    expected = dense_norm(main_grads(model))
    assert float(distnorm.clip_grad_norm_(model, 2.0, grad_of="main_grad")) == pytest.approx(expected)
    assert dense_norm(main_grads(model)) == pytest.approx(2.0, rel=1e-5)
    distnorm.clip_grads_with_norm_(model, 1.0, torch.tensor(2.0), grad_of="main_grad")
    assert dense_norm(main_grads(model)) == pytest.approx(1.0, rel=1e-5)


class MainSGD(torch.optim.SGD):
    """Steps by `main_grad`, as fused optimizers with a gradient of another dtype do."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.main_grad is not None:
                    p.data.sub_(p.main_grad.to(p.dtype), alpha=group["lr"])


def test_attach_clips_and_skips_by_gradients_elsewhere():
    model = model_with_main_grads()
    optimizer = MainSGD(model.parameters(), lr=0.1)
    config = {"clip": {"max_norm": 0.5, "nonfinite": "skip"}}
    handle = distnorm.attach(model, optimizer, config, grad_of="main_grad")
    optimizer.step()
    assert dense_norm(main_grads(model)) == pytest.approx(0.5, rel=1e-5)
    before = [p.detach().clone() for p in model.parameters()]
    bad = next(model.parameters()).main_grad
    bad[0, 0] = torch.inf
    optimizer.step()
    assert handle.last is not None and bool(handle.last.skipped)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    handle.remove()
    assert next(model.parameters()).main_grad is bad


@pytest.mark.parametrize("said", [{}, {"grad_of": "main_grda"}, {"grad_of": lambda parameter: None}])
def test_a_gradient_that_is_elsewhere_is_never_taken_for_none(said):
    model = model_with_main_grads()
    clipper = distnorm.GradClipper(model, **said)
    if said:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    way_out = r'grad_of="main_grad"' if not said else r"in \.grad"
    with pytest.raises(distnorm.UnsupportedGradientError, match=rf"'0\.weight'.*{way_out}"):
        clipper.clip()


def test_what_gives_no_gradients_is_refused():
    model = model_with_main_grads()
    with pytest.raises(distnorm.ConfigError, match="grad_of"):
        distnorm.GradClipper(model, grad_of=3)  # type: ignore[arg-type]
    with pytest.raises(distnorm.UnsupportedGradientError, match="found int"):
        distnorm.GradClipper(model, grad_of=lambda parameter: 3).clip()  # type: ignore[arg-type,return-value]
    with pytest.raises(distnorm.ConfigError, match="overlap"):
        distnorm.GradClipper(model, {"clip": {"overlap": True}}, grad_of="main_grad")
    optimizer = MainSGD(model.parameters(), lr=0.1)
    with pytest.raises(distnorm.ConfigError, match="grad_of"):
        distnorm.attach(model, optimizer, {"clip": {"nonfinite": "skip"}}, grad_of=lambda p: p.main_grad)


def test_a_function_that_gives_copies_is_refused_as_clipping_would_change_nothing():
    model = model_with_main_grads()
    clipper = distnorm.GradClipper(model, {"clip": {"max_norm": 0.5}}, grad_of=lambda p: p.main_grad.clone())
    with pytest.raises(distnorm.UnsupportedGradientError, match=r"'0\.weight'.*found a copy"):
        clipper.clip()


def test_a_loss_scale_is_not_left_in_gradients_elsewhere():
    model = model_with_main_grads()
    optimizer = MainSGD(model.parameters(), lr=0.1)
    handle = distnorm.attach(model, optimizer, {"clip": {"max_norm": 0.5}}, grad_of="main_grad")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(distnorm.UnsupportedGradientError, match=r"GradScaler.*\.main_grad"):
        scaler.step(optimizer)
    handle.remove()


def raising_on_one_rank() -> None:
    parameter = nn.Parameter(torch.ones(3))
    if dist.get_rank() == 0:
        parameter.main_grad = torch.ones(3)
    distnorm.GradClipper([parameter], grad_of=lambda p: p.main_grad).clip()


def test_what_a_function_raises_on_one_rank_all_ranks_raise(ranks):
    for failure in ranks(2, raising_on_one_rank, expect_errors=True):
        assert failure.type_name == "UnsupportedGradientError", failure
        assert "rank 1" in failure.message and "no attribute 'main_grad'" in failure.message


def partial_main_grad(by_name: bool) -> float:
    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Replicate()]))
    parameter.main_grad = DTensor.from_local(torch.full((3,), 1.0 + dist.get_rank()), mesh, [Partial()])
    grad_of = "main_grad" if by_name else (lambda p: p.main_grad)
    clipper = distnorm.GradClipper([parameter], grad_of=grad_of)
    norm = float(clipper.clip().total_norm)
    assert parameter.main_grad.placements == (Replicate(),)
    return norm


def test_a_partial_gradient_elsewhere_is_reduced_where_it_can_be_stored(ranks):
    assert ranks(2, partial_main_grad, True) == [pytest.approx(27**0.5)] * 2
    for failure in ranks(2, partial_main_grad, False, expect_errors=True):
        assert failure.type_name == "UnsupportedGradientError" and "grad_of" in failure.message
