"""A tiny model, its data, and what one process in fp64 makes of them: the oracle of all adapters' tests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distnorm.testing import dense_norm

BATCH, STEPS, RATE, MOMENTUM, MAX_NORM = 8, 3, 0.5, 0.9, 0.05


class Net(nn.Module):
    """The same weights in every process. Under tensor parallel `norm` stays a plain tensor on each rank."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(x))))


def samples(steps: int = STEPS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    count = BATCH * steps
    return (
        torch.randn(64, 8, generator=generator)[:count],
        torch.randn(64, 4, generator=generator)[:count],
    )


@functools.cache
def oracle(loss_scale: float = 1.0) -> tuple[list[float], dict[str, Tensor]]:
    """The norms before clipping, and the weights at the end."""
    net, norms = Net().double(), []
    velocity = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    x, y = samples()
    for k in range(STEPS):
        net.zero_grad()
        batch = slice(k * BATCH, (k + 1) * BATCH)
        loss = (net(x[batch].double()) - y[batch].double()).square().mean()
        (loss * loss_scale).backward()
        norms.append(dense_norm({name: p.grad for name, p in net.named_parameters() if p.grad is not None}))
        with torch.no_grad():
            for name, p in net.named_parameters():
                assert p.grad is not None
                velocity[name].mul_(MOMENTUM).add_(min(1.0, MAX_NORM / (norms[-1] + 1e-6)) * p.grad)
                p -= RATE * velocity[name]
    return norms, {name: p.detach() for name, p in net.named_parameters()}


def on_its_ranks(
    ranks: Callable[..., list[Any]],
    worlds: Mapping[str, int],
    body: Callable[..., Any],
    kind: str,
    *args: Any,
) -> list[Any]:
    """What `body(kind, *args)` returns on every rank; of kind `one` in this process, without a group."""
    return [body(kind, *args)] if kind == "one" else ranks(worlds[kind], body, kind, *args, timeout=300)


Oracle = tuple[list[float], dict[str, Tensor]]


def check_trained(
    rows: list[dict[str, float]],
    weights: dict[str, Tensor],
    expected: Oracle,
    tolerance: float = 1e-5,
    max_norm: float = MAX_NORM,
) -> None:
    """What was logged in each step, and the weights at the end, are the oracle's."""
    for row, norm in zip(rows, expected[0], strict=True):
        assert row["grad_norm"] == pytest.approx(norm, rel=tolerance)
        assert row["grad_norm_clipped"] == pytest.approx(min(norm, max_norm), rel=tolerance)
        assert row["clip_coef"] == pytest.approx(min(1.0, max_norm / (norm + 1e-6)), rel=tolerance)
        assert row["clip_threshold"] == pytest.approx(max_norm)
        assert row["skipped"] == 0
    check_weights(weights, expected, tolerance)


def check_weights(weights: dict[str, Tensor], expected: Oracle, tolerance: float = 1e-5) -> None:
    """The weights are those of the oracle at the end."""
    assert weights.keys() == expected[1].keys()
    for name, weight in expected[1].items():
        torch.testing.assert_close(weights[name].double(), weight, rtol=tolerance, atol=tolerance)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two models' tensors are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
