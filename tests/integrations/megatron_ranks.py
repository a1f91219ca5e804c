"""Megatron-core's own layers and `ChainedOptimizer`, tensor parallel, on gloo."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

import distnorm
from distnorm.integrations.megatron import attach_optimizer

HIDDEN, FFN, LR = 8, 16, 0.1


class Model(nn.Module):
    """A column-parallel and a row-parallel layer behind a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        config = TransformerConfig(
            num_layers=1, hidden_size=HIDDEN, num_attention_heads=2, use_cpu_initialization=True
        )
        self.norm = nn.LayerNorm(HIDDEN)
        more = {"config": config, "init_method": nn.init.normal_, "bias": True, "skip_bias_add": False}
        torch.manual_seed(0)
        self.fc1 = ColumnParallelLinear(HIDDEN, FFN, gather_output=False, **more)
        self.fc2 = RowParallelLinear(FFN, HIDDEN, input_is_parallel=True, **more)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.fc1(self.norm(x))
        out, _ = self.fc2(torch.nn.functional.gelu(hidden))
        return out


class OnCpu(FP32Optimizer):
    """The optimizer without its constructor, which asks for a GPU."""

    def __init__(self, parameters: list[nn.Parameter], config: Any) -> None:
        MegatronOptimizer.__init__(self, torch.optim.SGD(parameters, lr=LR), config)
        self.is_stub_optimizer = False


def whole(parameter: Tensor, tensor: Tensor) -> Tensor:
    """All ranks' pieces together."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return tensor.clone()
    pieces = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(pieces, tensor.contiguous())
    return torch.cat(pieces, dim=parameter.partition_dim)


def train(lie: bool) -> dict[str, Any]:
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    model = Model()
    if lie:
        del model.fc1.bias.tensor_model_parallel
    config = OptimizerConfig(optimizer="sgd", clip_grad=0.5)
    optimizer = ChainedOptimizer([OnCpu(list(model.parameters()), config)])
    try:
        clipping = attach_optimizer(optimizer, model)
        before = {name: whole(p, p.detach()) for name, p in model.named_parameters()}
        x = torch.randn(5, 2, HIDDEN, generator=torch.Generator().manual_seed(1))
        model(x).square().sum().backward()
        for p in model.parameters():
            p.main_grad, p.grad = p.grad, None
        done, norm, _ = optimizer.step()
    except distnorm.DistnormError as error:
        return {"error": str(error)}
    assert done and norm == float(clipping.last.total_norm)
    after = {name: whole(p, p.detach()) for name, p in model.named_parameters()}
    clipping.remove()
    assert optimizer.config.clip_grad == 0.5
    return {"norm": norm, "before": before, "after": after, "x": x}
