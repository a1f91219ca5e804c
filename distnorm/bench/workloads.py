"""The models that norms are taken of, after a real backward pass, and who is timed on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from distnorm import Config, RunError
from distnorm.bench.contenders import (
    PLAIN_SUM,
    Contender,
    clippers,
    fingerprinters,
    measurers,
    steppers,
    training_steppers,
)
from distnorm.bench.limit import work_of
from distnorm.bench.peers import Peers
from distnorm.bench.problem import Problem, describe
from distnorm.bench.rounds import Variant
from distnorm.trainer.run import build
from distnorm.trainer.torch_trainer import TorchTrainer
from distnorm.trainer.world import World, open_world

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Setting:
    """Where workloads run.

    Args:
        world: the ranks, in a process group, be it of one.
        peers: other libraries.
        scale: of the sizes; 1 but in tests.
    """

    world: World
    peers: Peers
    scale: float = 1.0

    def count(self, full: int, least: int = 2) -> int:
        """A size at this scale."""
        return max(least, round(full * self.scale))

    def mesh(self, shape: Sequence[int], names: Sequence[str]) -> DeviceMesh:
        """A mesh over all ranks. Collective."""
        return init_device_mesh(self.world.device.type, tuple(shape), mesh_dim_names=tuple(names))


class Matrices(nn.Module):
    """Parameters whose loss is their sum of squares, so that a backward pass costs little."""

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        super().__init__()
        dice = torch.Generator(device).manual_seed(len(shapes))
        for name, shape in shapes.items():
            values = torch.randn(tuple(shape), generator=dice, device=device) * 0.02
            self.register_parameter(name, nn.Parameter(values))

    def forward(self, scale: float) -> Tensor:
        return torch.stack([weight.square().sum() for weight in self.parameters(recurse=False)]).sum() * scale


class Stack(nn.Module):
    """Layers whose losses are added."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, scale: float) -> Tensor:
        return torch.stack([layer(scale) for layer in self.layers.values()]).sum()


def many(setting: Setting) -> Iterator[Variant]:
    """FSDP2 of 3,000 small matrices."""
    count = setting.count(3000)
    dice = torch.Generator().manual_seed(0)
    weights = nn.ParameterList(torch.randn(32, 16, generator=dice) for _ in range(count))
    model = _Listed(weights).to(setting.world.device)
    fully_shard(model, mesh=setting.mesh([setting.world.size], ["dp"]))
    problem = _after_backward(model, setting)
    yield _all_clipped("many", f"FSDP2, {count:,} tensors of 32 x 16, all clipped", problem, setting)


class _Listed(nn.Module):
    def __init__(self, weights: nn.ParameterList) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, scale: float) -> Tensor:
        return torch.stack([weight.square().sum() for weight in self.weights]).sum() * scale


def moe(setting: Setting) -> Iterator[Variant]:
    """Dense layers over all ranks; experts, each on the ranks of one expert-parallel index, over these.

    As many layers and experts as OLMoE-1B-7B has, and narrow matrices, those of experts as in `many`.
    """
    world, layers, experts = setting.world, setting.count(16), setting.count(64, least=4) // 2 * 2
    ep = 2 if world.size % 2 == 0 else 1
    whole = setting.mesh([world.size], ["dp"])
    apart = setting.mesh([ep, world.size // ep], ["ep", "dp_of_expert"])
    first = apart.get_local_rank("ep") * (experts // ep)
    attention = {name: (64, 64) for name in ("wq", "wk", "wv", "wo")}
    expert = {"w1": (32, 16), "w2": (16, 32), "w3": (32, 16)}
    model, of_experts = Stack(), list[nn.Parameter]()
    for layer in range(layers):
        dense = Matrices(attention | {"norm": (64,)}, world.device)
        mine = range(first, first + experts // ep)
        group = Stack(**{str(index): Matrices(expert, world.device) for index in mine})
        fully_shard(group, mesh=apart["dp_of_expert"])
        fully_shard(dense, mesh=whole)
        model.layers[f"dense{layer}"], model.layers[f"experts{layer}"] = dense, group
        of_experts += group.parameters()
    fully_shard(model, mesh=whole)
    known = {id(parameter) for parameter in of_experts}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
    parts = [(rest, None), (of_experts, apart.get_group("ep"))]
    problem = _after_backward(model, setting, parts)
    title = f"FSDP2 on two meshes, {layers} layers of {experts} experts over ep {ep}, all clipped"
    yield _all_clipped("moe", title, problem, setting)


def ddp(setting: Setting) -> Iterator[Variant]:
    """A transformer's matrices, 40 million elements, whole on every rank."""
    problem, millions = _replicated(setting)
    for title, share in (("nothing clipped", 2.0), ("all clipped", 0.5)):
        yield _clipped("ddp", f"DDP, {millions}, {title}", problem, setting, share)


def fsdp(setting: Setting) -> Iterator[Variant]:
    """A transformer's 288 tensors, sharded by FSDP2 and then by FSDP1."""
    layers, width = setting.count(32), setting.count(256, least=16)
    shapes = {name: (width, width) for name in ("wq", "wk", "wv", "wo")} | {
        "w1": (3 * width, width),
        "w2": (width, 3 * width),
        "w3": (3 * width, width),
        "norm1": (width,),
        "norm2": (width,),
    }
    title = f"{layers} layers, {9 * layers} tensors, all clipped"

    def new_model() -> Stack:
        return Stack(**{str(index): Matrices(shapes, setting.world.device) for index in range(layers)})

    model, mesh = new_model(), setting.mesh([setting.world.size], ["dp"])
    for module in [*model.layers.values(), model]:
        fully_shard(module, mesh=mesh)
    yield _all_clipped("fsdp", f"FSDP2, {title}", _after_backward(model, setting), setting)
    if setting.world.size > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of FSDP1 as a whole
            wrapped = FullyShardedDataParallel(
                new_model(),
                auto_wrap_policy=ModuleWrapPolicy({Matrices}),
                use_orig_params=True,
                device_id=setting.world.device,
            )
        yield _all_clipped("fsdp", f"FSDP1, {title}", _after_backward(wrapped, setting), setting)


def large(setting: Setting) -> Iterator[Variant]:
    """One tensor in one process, statistic only."""
    if setting.world.size > 1:
        raise RunError(f"large: expected one process, found {setting.world.size} ranks")
    count = setting.count(10**8)
    dice = torch.Generator(setting.world.device).manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        parameter = nn.Parameter(torch.zeros(count, dtype=dtype, device=setting.world.device))
        parameter.grad = torch.randn(count, generator=dice, device=setting.world.device).to(dtype)
        problem = describe([("weight", parameter)], {"weight": parameter}, setting.world)
        title = f"one tensor of {count:.3g} elements, {str(dtype).removeprefix('torch.')}, norm only"
        contenders = measurers(problem, setting.peers)
        yield replace(_variant("large", title, problem, contenders), limit_is=PLAIN_SUM)


def clip_step(setting: Setting) -> Iterator[Variant]:
    """Norm, clipping and fused AdamW's step; and the same within a whole training step."""
    problem, millions = _replicated(setting)

    def backward(model: nn.Module) -> None:
        model(1.0 + setting.world.rank).backward()

    for title, contenders in (
        ("AdamW's step", steppers(problem, problem.norm / 2)),
        ("forward, backward and AdamW's step", training_steppers(problem, backward, problem.norm / 2)),
    ):
        yield _variant("clip-step", f"DDP, {millions}, all clipped, {title}", problem, contenders, step=True)
        for contender in contenders:
            contender.close()


def fingerprints(setting: Setting) -> Iterator[Variant]:
    """The norm with fingerprints of every gradient, beside the norm alone; each rank has its own."""
    count, world = setting.count(10**6), setting.world
    dice = torch.Generator(world.device).manual_seed(world.rank)
    for dtype in (torch.float32, torch.bfloat16):
        held = {}
        for index in range(setting.count(64)):
            name = f"rank{world.rank}.weight{index}"
            held[name] = nn.Parameter(torch.zeros(count, dtype=dtype, device=world.device))
            held[name].grad = torch.randn(count, generator=dice, device=world.device).to(dtype)
        problem = describe(list(held.items()), held, world)
        title = f"{len(held)} tensors of {count:.3g} elements, {str(dtype).removeprefix('torch.')}"
        yield _variant("fingerprints", title, problem, fingerprinters(problem))


def own(config: Config, setting: Setting) -> Iterator[Variant]:
    """The topology of the user's configuration."""
    if config.train.parallel.backend == "deepspeed":
        raise RunError("train.parallel.backend: expected ddp, fsdp2 or fsdp1, found deepspeed")
    with open_world(config) as world:
        trainer = build(config, world)
        assert isinstance(trainer, TorchTrainer)
        trainer.compute_gradient(1)
        engine = trainer.engine
        named = engine.named_parameters()
        parts = None
        if engine.pipelined:
            parts = [(list(named.values()), engine.topology.axis("pp").get_group())]
        problem = describe([engine.module], named, world, parts=parts, tied=engine.tied)
        parallel = config.train.parallel
        degrees = {axis: getattr(parallel, axis) for axis in ("dp_replicate", "dp_shard", "tp", "pp")}
        layout = " x ".join(f"{axis} {degree}" for axis, degree in degrees.items() if degree > 1)
        title = f"{parallel.backend}, {layout or 'one process'}, {config.train.dtype}, all clipped"
        yield _all_clipped("config", title, problem, setting)


def _replicated(setting: Setting) -> tuple[Problem, str]:
    width, blocks = setting.count(512, least=8), setting.count(10)
    shapes = {
        "qkv": (3 * width, width),
        "out": (width, width),
        "up": (4 * width, width),
        "down": (width, 4 * width),
        "norm1": (width,),
        "norm2": (width,),
    }
    layers = {str(index): Matrices(shapes, setting.world.device) for index in range(blocks)}
    words = Matrices({"words": (setting.count(16384), width)}, setting.world.device)
    problem = _after_backward(DistributedDataParallel(Stack(words=words, **layers)), setting)
    elements = sum(each.saved.numel() for each in problem.held)
    return problem, f"{elements / 1e6:.3g} million parameters"


def _after_backward(
    model: nn.Module,
    setting: Setting,
    parts: Sequence[tuple[Sequence[nn.Parameter], dist.ProcessGroup | None]] | None = None,
) -> Problem:
    model(1.0 + setting.world.rank).backward()
    return describe(model, dict(model.named_parameters()), setting.world, parts=parts)


def _all_clipped(workload: str, title: str, problem: Problem, setting: Setting) -> Variant:
    return _clipped(workload, title, problem, setting, 0.5)


def _clipped(workload: str, title: str, problem: Problem, setting: Setting, share: float) -> Variant:
    """A variant whose threshold is a share of the norm."""
    max_norm = share * problem.norm
    contenders = clippers(problem, max_norm, setting.peers)
    return _variant(workload, title, problem, contenders, max_norm=max_norm)


def _variant(
    workload: str,
    title: str,
    problem: Problem,
    contenders: Sequence[Contender],
    *,
    max_norm: float | None = None,
    step: bool = False,
) -> Variant:
    work = work_of(problem, clips=max_norm is not None and max_norm < problem.norm, step=step)
    return Variant(workload, title, problem, contenders, work, max_norm)


BY_NAME: dict[str, Callable[[Setting], Iterator[Variant]]] = {
    "many": many,
    "moe": moe,
    "ddp": ddp,
    "fsdp": fsdp,
    "large": large,
    "clip-step": clip_step,
    "fingerprints": fingerprints,
}
"""Every workload by its name."""
