"""The models that are spoilt: the reference trainer's topologies, and experts over all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import distnorm
from benchmarks.mutants_sites import FACTOR, Sites
from distnorm import DoctorReport, load_config
from distnorm.trainer import topology as trainer_topology
from distnorm.trainer.doctor import examine, make_trainer, whole_model
from distnorm.trainer.world import open_world
from distnorm.verification.doctor.tracing import Tracer


@dataclass(frozen=True)
class Model:
    """One model, and how many ranks hold it."""

    name: str
    ranks: int
    parallel: dict[str, Any] | None = None


MODELS = {
    model.name: model
    for model in (
        Model("DDP", 2, {"backend": "ddp", "dp_replicate": 2}),
        Model("FSDP2", 2, {"dp_shard": 2}),
        Model("TP", 2, {"tp": 2}),
        Model("TP + SP", 2, {"tp": 2, "sequence_parallel": True}),
        Model("FSDP2 x TP", 4, {"dp_shard": 2, "tp": 2}),
        Model("PP x FSDP2", 4, {"pp": 2, "dp_shard": 2}),
        Model("EP", 2),
    )
}
_DEGREES = {"backend": "fsdp2", "dp_replicate": 1, "dp_shard": 1, "tp": 1, "pp": 1}


def examined(
    name: str, seed: int, dtype: str, sites: Any, trace: bool = True
) -> tuple[DoctorReport, Sites, str]:
    """Examine one step of a model, with one site spoilt or none. Collective.

    Args:
        name: one of `MODELS`.
        seed: of weights and batch.
        dtype: of the model.
        sites: makes this rank's `Sites` of its groups by axis, and its stage.
        trace: whether the doctor traces.

    Returns:
        The report, this rank's sites, and a digest of its gradients.
    """
    model = MODELS[name]
    body = _experts if model.parallel is None else partial(_trainer, model.parallel)
    return body(seed, dtype, sites, trace)  # type: ignore[operator,no-any-return]


def _trainer(
    parallel: dict[str, Any], seed: int, dtype: str, make_sites: Any, trace: bool
) -> tuple[DoctorReport, Sites, str]:
    sizes = {"dim": 16, "layers": 2, "heads": 2, "context": 8, "tie_embeddings": False}
    train = {"seed": seed, "dtype": dtype, "device": "cpu", "model": sizes}
    train |= {"data": {"path": __file__, "batch_size": 8}, "parallel": _DEGREES | parallel}
    config = load_config({"clip": {"max_norm": 1.0}, "train": train})
    # Without unused parameters DDP would make one bucket of all in its first step.
    small = partial(DistributedDataParallel, bucket_cap_mb=0.01, find_unused_parameters=True)
    with open_world(config) as world:
        with (
            mock.patch.object(trainer_topology, "DistributedDataParallel", small),
            mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 4096),
        ):
            trainer = make_trainer(config, world)
        topology = trainer.job.topology
        assert topology.mesh is not None and topology.mesh.mesh_dim_names is not None
        sizes_of = dict(zip(topology.mesh.mesh_dim_names, topology.mesh.shape, strict=True))
        axes = {axis: topology.mesh.get_group(axis) for axis, size in sizes_of.items() if size > 1}
        sites: Sites = make_sites(axes, topology.index("pp"))
        compute = trainer.compute_gradient
        module = trainer.engine.module
        if isinstance(module, DistributedDataParallel):
            sites.names = {id(p): name for name, p in trainer.engine.named_parameters().items()}
            module.register_comm_hook(sites, _spoilt_bucket)

        def watched(step: int) -> Tensor:
            with _following(module, sites):
                return compute(step)

        trainer.compute_gradient = watched  # type: ignore[method-assign]
        report = examine(trainer, whole_model(config, trainer.job), trace)
        return report, sites, _digest(trainer.engine.named_parameters().values())


@contextmanager
def _following(module: nn.Module, sites: Sites) -> Iterator[None]:
    tracer = Tracer(module, sites.on_tensor)
    try:
        with sites.watching():
            yield
    finally:
        tracer.remove()


def _digest(parameters: Any) -> str:
    from distnorm.verification.pieces import digest, local_of

    return "".join(digest(local_of(p.grad)) if p.grad is not None else "-" for p in parameters)


def _spoilt_bucket(sites: Sites, bucket: Any) -> Any:
    """DDP's own reduction of a bucket, which is C++, as a communication hook that can be spoilt."""
    buffer = bucket.buffer()
    sites.parameter = ",".join(sites.names[id(parameter)] for parameter in bucket.parameters())
    how = sites.how("ddp_bucket", None, buffer.dtype)
    sites.parameter = None
    if how != "drop":
        dist.distributed_c10d.all_reduce(buffer.div_(dist.get_world_size()))
    if how == "double":
        dist.distributed_c10d.all_reduce(buffer)
    if how == "scale":
        buffer.mul_(FACTOR)
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(buffer)
    return future


# DDP reads the annotations, and knows no strings in them.
_spoilt_bucket.__annotations__ = {}

# ---- experts


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        out = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, gradient.contiguous())
        return out


def _expert(dim: int, dtype: torch.dtype) -> nn.Module:
    up, down = nn.Linear(dim, 2 * dim, dtype=dtype), nn.Linear(2 * dim, dim, dtype=dtype)
    return nn.Sequential(up, nn.GELU(), down)


class Experts(nn.Module):
    """One expert a rank; a token goes to the expert that its number says, weighed by a gate.

    Args:
        mine: the experts that are here; all of them in one process.
        count: how many there are.
    """

    def __init__(self, dim: int, mine: list[int], count: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.count = count
        self.gate = nn.Linear(dim, count, dtype=dtype)
        self.experts = nn.ModuleDict({str(number): _expert(dim, dtype) for number in mine})

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        flat, weight = x.flatten(0, 1), self.gate(x).softmax(-1).flatten(0, 1)
        mask = nn.functional.one_hot(tokens.flatten() % self.count, self.count).to(x.dtype)
        if len(self.experts) == self.count:
            each = torch.stack([expert(flat) for expert in self.experts.values()], 1)
        else:
            sent = _AllToAll.apply(flat.unsqueeze(0) * mask.t().unsqueeze(-1))
            (expert,) = self.experts.values()
            back = _AllToAll.apply(expert(sent))
            each = back.transpose(0, 1)
        return x + (each * (mask * weight).unsqueeze(-1)).sum(1).view_as(x)


class ExpertModel(nn.Module):
    """An embedding, two layers of experts, and a head."""

    def __init__(self, mine: list[int], count: int, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        dim = 8
        self.tok = nn.Embedding(32, dim, dtype=dtype)
        self.norm = nn.LayerNorm(dim, dtype=dtype)
        self.moe = nn.ModuleList(Experts(dim, mine, count, dtype) for _ in range(2))
        self.head = nn.Linear(dim, 32, dtype=dtype)
        for name, parameter in self.named_parameters():
            dice = torch.Generator().manual_seed(sum(map(ord, name)) * 31 + seed)
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=dice) * 0.3)
                if name == "norm.weight":
                    parameter.add_(1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.tok(tokens))
        for layer in self.moe:
            x = layer(x, tokens)
        return self.head(x)  # type: ignore[no-any-return]


def _experts(seed: int, dtype: str, make_sites: Any, trace: bool) -> tuple[DoctorReport, Sites, str]:
    kind, rank, world = getattr(torch, dtype), dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    model = ExpertModel([rank], world, seed, kind)
    sites: Sites = make_sites({"ep": mesh.get_group("ep")}, 0)
    dice = torch.Generator().manual_seed(seed + 1)
    tokens = torch.randint(32, (8, 7), generator=dice)
    whole = ExpertModel(list(range(world)), world, seed, kind)

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1).float(), rows[:, 1:].flatten())

    def reference(part: int = 0, parts: int = 1) -> nn.Module:
        (loss(whole, tokens.chunk(parts)[part]) / parts).backward()
        return whole

    doctor = distnorm.doctor(model, reference=reference, mesh=mesh, parts=world, trace=trace)
    with doctor as examination, _following(model, sites):
        loss(model, tokens.chunk(world)[rank]).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                if ".experts." not in name:
                    sites.parameter = name
                    dist.all_reduce(parameter.grad)
                    sites.parameter = None
                parameter.grad /= world
    assert examination.report is not None
    return examination.report, sites, _digest(model.parameters())
