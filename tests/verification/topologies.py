"""A small model under each kind of parallelism, verified by every rank; and what tests ask of a report."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from distnorm.verification import Check, VerifyReport, verify
from distnorm.verification.pieces import digest

Ranks = Callable[..., list[Any]]
CLIP = {"clip": {"max_norm": 0.01}}


class Block(nn.Module):
    """A pre-norm block with a replicated norm, two matrices that can be cut, and an embedding."""

    def __init__(self, dim: int = 8, hidden: int = 16, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tok = nn.Embedding(11, dim, dtype=dtype)
        self.norm = nn.LayerNorm(dim, dtype=dtype)
        self.up = nn.Linear(dim, hidden, dtype=dtype)
        self.down = nn.Linear(hidden, dim, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok(tokens)
        return x + self.down(torch.relu(self.up(self.norm(x))))


def tokens_of(seed: int = 1) -> Tensor:
    return torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(seed))


def backward(model: nn.Module, data_rank: int = 0) -> None:
    model(tokens_of(1 + data_rank)).square().mean().backward()


def bits(model_parameters: Any) -> list[Any]:
    found = []
    for parameter in model_parameters:
        gradient = parameter.grad
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        found.append(None if local is None else (digest(local), id(gradient)))
    return found


def verified(target: Any, parameters: Any, *args: Any, **kwargs: Any) -> VerifyReport:
    """Verify, and see that the gradients are the same tensors with the same bits afterwards."""
    parameters = list(parameters)
    before = bits(parameters)
    report = verify(target, *args, **kwargs)
    assert bits(parameters) == before
    return report


def same(reports: list[VerifyReport]) -> VerifyReport:
    """All ranks hold the same report."""
    assert len({str(report) for report in reports}) == 1
    return reports[0]


def check_of(report: VerifyReport, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


def failed(report: VerifyReport) -> set[str]:
    return {check.name for check in report.checks if not check.ok}


def ddp(config: Any) -> VerifyReport:
    model = DistributedDataParallel(Block())
    backward(model, dist.get_rank())
    return verified(model, model.parameters(), config)


def tensor_parallel(model: Block, mesh: Any) -> Block:
    return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def fsdp(config: Any, dim: int = 8) -> VerifyReport:
    model = Block(dim)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",)))
    backward(model, dist.get_rank())
    return verified(model, model.parameters(), config)


def hsdp(config: Any) -> VerifyReport:
    model = Block()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard")))
    backward(model, dist.get_rank())
    return verified(model, model.parameters(), config)


def tp(config: Any) -> VerifyReport:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = tensor_parallel(Block(), mesh)
    backward(model)
    return verified(model, model.parameters(), config)


class Norms(nn.Module):
    """A norm over a sequence that is cut along tp, as `SequenceParallel` runs it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return out


def sequence_parallel_model() -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = Norms()
    parallelize_module(
        model,
        mesh,
        {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(),
        },
    )
    model(torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(3))).square().mean().backward()
    return model


def sequence_parallel(config: Any) -> VerifyReport:
    model = sequence_parallel_model()
    gradient = model.norm.weight.grad
    assert isinstance(gradient, DTensor) and gradient.placements[0].is_partial()
    report = verified(model, model.parameters(), config)
    assert model.norm.weight.grad is gradient
    return report


def fsdp_tp(config: Any) -> VerifyReport:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
    model = tensor_parallel(Block(), mesh["tp"])
    fully_shard(model, mesh=mesh["dp_shard"])
    backward(model, mesh.get_local_rank("dp_shard"))
    return verified(model, model.parameters(), config)


def pipeline_tied(config: Any) -> VerifyReport:
    """Two stages with the same names for other parameters, save for an embedding that both hold."""
    stage = dist.get_rank()
    torch.manual_seed(stage)
    mine = nn.ParameterDict({"w": nn.Parameter(torch.randn(5, 3))})
    tied = nn.Parameter(torch.linspace(0, 1, 6).reshape(2, 3))
    mine["w"].grad = torch.randn(5, 3)
    tied.grad = torch.linspace(1, 2, 6).reshape(2, 3)
    pairs = [*mine.named_parameters(), ("tok.weight" if stage == 0 else "head.weight", tied)]
    pp_mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    report = verified(
        iter(pairs), [p for _, p in pairs], config, pp_mesh=pp_mesh, tied=[("tok.weight", "head.weight")]
    )
    assert report.parameters == 3 and report.elements == 36
    return report


def missing_gradients(config: Any) -> VerifyReport:
    """Gradients that some ranks of a mesh don't have count as zeros; a rank may have none at all."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    a = nn.Parameter(distribute_tensor(torch.ones(6, 2), mesh, [Shard(0)]))
    b = nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Shard(0)]))
    if dist.get_rank() == 1:
        a.grad = distribute_tensor(torch.full((6, 2), 2.0), mesh, [Shard(0)], src_data_rank=None)
    report = verified({"a": a, "b": b}, [a, b], config)
    piece = 12 // dist.get_world_size()
    p = config.get("norm", {}).get("type", 2.0)
    assert math.isclose(report.true_norm, 2 * piece ** (1 / p) if p != math.inf else 2, rel_tol=1e-15)
    return report


def replicated() -> tuple[nn.Linear, list[nn.Parameter]]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    model(torch.arange(8.0).reshape(2, 4)).square().sum().backward()
    return model, list(model.parameters())


def uneven_over_uneven() -> VerifyReport:
    """9 rows over tp=2 and then dp_shard=2: no product of the two divides them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
    model = tensor_parallel(Block(hidden=9), mesh["tp"])
    fully_shard(model, mesh=mesh["dp_shard"])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return verify(model)
