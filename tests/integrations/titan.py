"""torchtitan's own `Trainer.train_step` around the tiny model: its constructor alone asks for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.components.optimizer.optimizer import ParamGroupConfig
from torchtitan.trainer import Trainer

from tests.integrations.tiny import BATCH, MAX_NORM, MOMENTUM, RATE, STEPS, Net, samples

PP_STAGES = (("norm", "up"), ("down",))


class Stage(nn.Module):
    """A pipeline part, which keeps the whole model's names."""

    def __init__(self, net: Net, names: tuple[str, ...]) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, getattr(net, name))


class Sgd(OptimizersContainer):  # Adam's steps would tell little of a gradient's size
    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Any:
        return torch.optim.SGD


class Recorder:
    def __init__(self, freq: int) -> None:
        self.freq, self.rows = freq, []

    def should_log(self, step: int) -> bool:
        return step % self.freq == 0

    def log(self, step: int, average: float, largest: float, grad_norm: float, extra_metrics: Any) -> None:
        self.rows.append({"grad_norm": grad_norm, **extra_metrics})


class Tiny(Trainer):
    """Builds what `train_step` needs; `bad_step` is the step whose loss is infinite on the first rank."""

    def __init__(
        self, kind: str, accumulation: int = 1, max_norm: float = MAX_NORM, freq: int = 1, bad_step: int = -1
    ) -> None:
        self.net, self.bad_step, self.step, self.device = Net(), bad_step, 0, torch.device("cpu")
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.dp, self.tp = {"tp": (1, 2), "fsdp2xtp": (2, 2), "pp": (1, 1)}.get(kind, (world, 1))
        self.pp_mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",)) if kind == "pp" else None
        parts: list[nn.Module] = [self.net]
        if self.pp_mesh is not None:
            parts = [Stage(self.net, PP_STAGES[dist.get_rank()])]
        elif kind != "one":
            mesh = init_device_mesh("cpu", (self.dp, self.tp), mesh_dim_names=("dp", "tp"))
            if self.tp > 1:
                plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(self.net, mesh["tp"], plan)
            if self.dp > 1:
                fully_shard(self.net, mesh=mesh["dp"])
        self.model_parts = parts
        settings = {"lr": RATE, "momentum": MOMENTUM}
        groups = [ParamGroupConfig(pattern=".*", optimizer_name="SGD", optimizer_kwargs=settings)]
        of_sgd = OptimizersContainer.Config(param_groups=groups, implementation="for-loop")
        self.optimizers = Sgd(of_sgd, model_parts=parts)
        self.lr_schedulers = SimpleNamespace(get_metrics=dict, step=lambda: None)
        self.metrics_processor = Recorder(freq)
        self.checkpointer = SimpleNamespace(states={}, maybe_wait_for_staging=lambda: None)
        self.config = SimpleNamespace(training=SimpleNamespace(max_norm=max_norm, disable_cuda_graphs=True))
        self.parallel_dims = SimpleNamespace(
            pp_enabled=False, dp_enabled=False, dp_cp_enabled=False, ep_enabled=False
        )
        self.parallel_dims.get_optional_mesh = lambda name: self.pp_mesh
        self.gradient_accumulation_steps, self.num_pipeline_parallel_microbatches = accumulation, 1
        self.ntokens_seen = 0

    def forward_backward_step(self, *, input_dict: Any, labels: Tensor, **_: Any) -> Tensor:
        loss: Tensor = (self.net(input_dict["x"]) - labels).square().mean() / self.gradient_accumulation_steps
        first = not dist.is_initialized() or dist.get_rank() == 0
        if self.step == self.bad_step:
            loss = loss * (torch.inf if first else 1.0)
        loss.backward()
        # The trainer stops where the logged loss is not finite, whatever becomes of the step.
        return loss.detach().nan_to_num(0.0, 0.0, 0.0)

    def batches(self, steps: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        rank = (dist.get_rank() if dist.is_initialized() else 0) // self.tp % self.dp
        x, y = (each[rank :: self.dp] for each in samples(steps))
        size = BATCH // self.dp // self.gradient_accumulation_steps
        for begin in range(0, len(x), size):
            yield {"x": x[begin : begin + size]}, y[begin : begin + size]

    def trained(self, steps: int = STEPS) -> dict[str, Tensor]:
        """As `train` does, without its device's utilities. The whole weights afterwards; collective."""
        batches = self.batches(steps)
        for _ in range(steps):
            self.step += 1
            self.train_step(batches)
        named = [pair for part in self.model_parts for pair in part.named_parameters()]
        return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in named}
