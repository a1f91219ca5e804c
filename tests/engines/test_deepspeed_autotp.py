"""Tensor parallelism that DeepSpeed makes by itself (AutoTP): layers are cut in `deepspeed.initialize`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distnorm.hooks.deepspeed import DeepSpeedHook
from tests.engines.rig import LR, norm_of, use_deepspeed

CUTS = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r".*up_proj\.weight$"], "partition_type": "column"},
        {"patterns": [r".*down_proj\.weight$"], "partition_type": "row"},
    ],
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up_proj, self.down_proj = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.tanh(self.up_proj(self.norm(x))))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def piece(name: str, whole: Tensor, rank: int) -> Tensor:
    if "up_proj" in name:
        return whole.chunk(2)[rank]
    return whole.chunk(2, dim=1)[rank] if "down_proj.weight" in name else whole


def dense_update(data_world: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = Stack().double()
    sum((model(data(i).double()) ** 2).mean() / data_world for i in range(data_world)).backward()
    named = dict(model.named_parameters())
    return {n: p.detach() for n, p in named.items()}, {n: p.grad for n, p in named.items()}


def data(data_rank: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(data_rank))


def run_autotp(stages: list[int]) -> list[tuple[float, float, float]]:
    deepspeed = use_deepspeed()
    outcomes = []
    for stage in stages:
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "tensor_parallel": {"autotp_size": 2, "partition_config": CUTS},
        }
        model = Stack()
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=model.parameters(),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=LR),
            config=config,
            dist_init_required=False,
        )
        hook = DeepSpeedHook(engine, {"clip": {"max_norm": 0.1}})
        engine.backward((engine(data(dist.get_rank() // 2)) ** 2).mean())
        engine.step()
        before, exact = dense_update(dist.get_world_size() // 2)
        true_norm = norm_of(exact)
        parameters = dict(engine.module.named_parameters())
        partitioned = list(parameters.values()) if stage == 3 else []
        with deepspeed.zero.GatheredParameters(partitioned):
            off = max(
                float((p.double() - piece(n, w, dist.get_rank() % 2)).abs().max())
                for n, p in parameters.items()
                for w in [before[n] - LR * 0.1 / (true_norm + 1e-6) * exact[n]]
            )
        outcomes.append((float(engine.get_global_grad_norm()), true_norm, off))
        hook.remove()
    return outcomes


@pytest.mark.parametrize("world", [2, 4])
def test_tensor_parallelism_by_autotp(engine_ranks, table, world):
    stages = [0, 1, 2, 3]
    for outcomes in engine_ranks(world, run_autotp, stages, timeout=180):
        for stage, (measured, exact, off) in zip(stages, outcomes, strict=True):
            assert measured == pytest.approx(exact, rel=1e-5), stage
            assert off < 1e-5, stage
    table += [f"{world} ranks  tensor parallel 2 by AutoTP  ZeRO {stage}" for stage in stages]
