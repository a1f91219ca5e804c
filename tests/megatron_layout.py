"""A model laid out as Megatron-core does it, by hand: modules with its attributes, and its optimizers' steps.

A small GPT with routed experts: tensor parallel, in interleaved pipeline stages, with expert parallelism
within data parallelism, tied embeddings, and a distributed optimizer. Values and gradients are `whole`'s.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

VOCABULARY, HIDDEN, FFN, EXPERTS, LAYERS = 8, 4, 6, 4, 4
LR = 0.1


@cache
def shapes() -> dict[str, tuple[int, ...]]:
    """Of all parameters of the whole model; the output layer is the embedding."""
    found: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        layer = f"decoder.layers.{i}"
        found |= {
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.self_attention.linear_qkv.weight": (3 * HIDDEN, HIDDEN),
            f"{layer}.self_attention.linear_qkv.bias": (3 * HIDDEN,),
            f"{layer}.self_attention.linear_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.self_attention.linear_proj.bias": (HIDDEN,),
            f"{layer}.mlp.router.weight": (EXPERTS, HIDDEN),
        }
        for e in range(EXPERTS):
            expert = f"{layer}.mlp.experts.local_experts.{e}"
            found |= {
                f"{expert}.linear_fc1.weight": (FFN, HIDDEN),
                f"{expert}.linear_fc2.weight": (HIDDEN, FFN),
            }
    return found | {"decoder.final_layernorm.weight": (HIDDEN,)}


def whole(name: str, what: str) -> Tensor:
    """The values or the gradient of a whole parameter, exact in bf16."""
    name = name.replace("output_layer", "embedding.word_embeddings")
    shape = shapes()[name]
    if what == "value" and name.endswith("layernorm.weight"):
        return torch.ones(shape)
    if what == "value" and name.endswith("bias"):
        return torch.zeros(shape)
    if what == "value" and "linear_fc2" in name:  # upcycled: copies of one another
        name = re.sub(r"local_experts\.\d+", "local_experts", name)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {what}".encode()))
    return torch.randn(shape, generator=generator).bfloat16().float()


def dense_gradients() -> dict[str, Tensor]:
    return {name: whole(name, "gradient") for name in shapes()}


@dataclass
class World:
    """Where this rank is; ranks count along tp first, then dp (ep first), then pp.

    Where `folded`, experts are not tensor parallel, and ep counts along tp too.

    Attributes:
        groups: as a `ProcessGroupCollection` has them.
    """

    tp: int
    pp: int
    dp: int
    ep: int
    folded: bool = False

    def __post_init__(self) -> None:
        rank = dist.get_rank()
        self.at_tp, rest = rank % self.tp, rank // self.tp
        self.at_dp, self.at_pp = rest % self.dp, rest // self.dp
        along = rank % (self.tp * self.dp) if self.folded else self.at_dp
        self.at_ep, self.at_edp = along % self.ep, along // self.ep
        self.edp = self.dp * (self.tp if self.folded else 1) // self.ep
        groups = {axis: self._group(axis) for axis in ("tp", "pp", "ep", "expt_tp")}
        self.groups = SimpleNamespace(**groups)

    def _group(self, axis: str) -> Any:
        mine = None
        for members in self._members(axis):
            group = dist.new_group(members)
            mine = group if dist.get_rank() in members else mine
        return mine

    def _members(self, axis: str) -> list[list[int]]:
        groups: dict[Any, list[int]] = {}
        for rank in range(self.tp * self.dp * self.pp):
            tp, dp, pp = rank % self.tp, rank // self.tp % self.dp, rank // self.tp // self.dp
            key = {"tp": (dp, pp), "pp": (tp, dp), "ep": (tp, dp // self.ep, pp), "expt_tp": (dp, pp)}[axis]
            if self.folded and axis in ("ep", "expt_tp"):
                key = (rank // self.ep,) if axis == "ep" else (rank,)
            groups.setdefault(key, []).append(rank)
        return list(groups.values())

    def cut(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(self.tp, dim)[self.at_tp].contiguous()


def parameter(world: World, name: str, dim: int | None = None, **attributes: Any) -> nn.Parameter:
    """This rank's piece, with Megatron's attributes and its gradient in `main_grad`."""
    value, gradient = whole(name, "value"), whole(name, "gradient")
    is_whole = world.folded and ".experts." in name
    if dim is not None and not is_whole:
        value, gradient = world.cut(value, dim), world.cut(gradient, dim)
    if dim is not None:
        attributes |= {"tensor_model_parallel": True, "partition_dim": dim, "partition_stride": 1}
    made = nn.Parameter(value.bfloat16() if ".mlp." in name else value)
    attributes |= {"true_name": name, "true_dim": None if is_whole else dim}
    vars(made).update(attributes, main_grad=gradient.clone())
    return made


def module(**members: Any) -> nn.Module:
    """A module with these parameters, modules and attributes."""
    made = nn.Module()
    for name, member in members.items():
        setattr(made, name, member)
    return made


def linear(world: World, name: str, dim: int, *, bias: bool = False, **attributes: Any) -> nn.Module:
    """A ColumnParallelLinear (dim 0) or RowParallelLinear (dim 1)."""
    rows, columns = shapes()[f"{name}.weight"]
    made = module(
        input_size=columns, output_size=rows, weight=parameter(world, f"{name}.weight", dim, **attributes)
    )
    if bias and dim == 0:
        made.bias = parameter(world, f"{name}.bias", 0, **attributes)
    elif bias:
        made.bias = parameter(world, f"{name}.bias", sequence_parallel=True, **attributes)
    return made


def layer(world: World, i: int) -> nn.Module:
    name = f"decoder.layers.{i}"
    norm = parameter(world, f"{name}.input_layernorm.weight", sequence_parallel=True)
    local = EXPERTS // world.ep
    allreduce = {"allreduce": world.ep == 1}
    experts = []
    for e in range(world.at_ep * local, (world.at_ep + 1) * local):
        expert = f"{name}.mlp.experts.local_experts.{e}"
        fc1 = linear(world, f"{expert}.linear_fc1", 0, **allreduce)
        experts.append(
            module(linear_fc1=fc1, linear_fc2=linear(world, f"{expert}.linear_fc2", 1, **allreduce))
        )
    router = module(weight=parameter(world, f"{name}.mlp.router.weight", sequence_parallel=True))
    return module(
        layer_number=i + 1,
        input_layernorm=module(weight=norm),
        self_attention=module(
            linear_qkv=linear(world, f"{name}.self_attention.linear_qkv", 0, bias=True),
            linear_proj=linear(world, f"{name}.self_attention.linear_proj", 1, bias=True),
        ),
        mlp=module(router=router, experts=module(local_experts=nn.ModuleList(experts))),
    )


def chunks(world: World) -> list[nn.Module]:
    """This rank's interleaved stages, each in two wrappers."""
    made = []
    parts = 2 if world.pp > 1 else 1
    for part in range(parts):
        stage = part * world.pp + world.at_pp
        size = LAYERS // (world.pp * parts)
        layers = nn.ModuleList(layer(world, i) for i in range(stage * size, (stage + 1) * size))
        chunk = module(decoder=module(layers=layers))
        if stage == 0:
            weight = parameter(world, "embedding.word_embeddings.weight", 0, shared_embedding=True)
            words = module(num_embeddings=VOCABULARY, embedding_dim=HIDDEN, weight=weight)
            chunk.embedding = module(word_embeddings=words)
        if stage == world.pp * parts - 1:
            chunk.decoder.final_layernorm = module(
                weight=parameter(world, "decoder.final_layernorm.weight", sequence_parallel=True)
            )
            if world.pp > 1:
                weight = parameter(world, "output_layer.weight", 0, shared=True, shared_embedding=True)
                chunk.output_layer = module(input_size=HIDDEN, output_size=VOCABULARY, weight=weight)
        made.append(module(module=module(module=chunk)))
    return made


def trained(stages: list[nn.Module]) -> Iterator[nn.Parameter]:
    for stage in stages:
        yield from stage.parameters()


class HandMade:
    """Steps as Megatron's FP32Optimizer does."""

    is_stub_optimizer = False

    def __init__(self, parameters: list[nn.Parameter], config: Any) -> None:
        self.config, self.parameters = config, parameters
        self.optimizer = torch.optim.SGD(self.hold(), lr=LR)

    def hold(self) -> list[Tensor]:
        return list(self.parameters)

    def get_parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def prepare_grads(self) -> bool:
        for p in self.parameters:
            p.grad = p.main_grad.to(p.dtype)
        return False

    def get_grad_norm(self) -> float:
        raise AssertionError("distnorm measures")

    def clip_grad_norm(self, clip_grad: float) -> float:
        raise AssertionError("distnorm clips")

    def step_with_ready_grads(self) -> bool:
        self.optimizer.step()
        return True

    def step(self) -> tuple[bool, float | None, int | None]:
        if self.prepare_grads():
            return False, None, None
        norm = self.clip_grad_norm(self.config.clip_grad) if self.config.clip_grad > 0 else None
        return self.step_with_ready_grads(), norm, None


class HandMadeDistributed(HandMade):
    """Steps as the distributed optimizer does: each rank has a run of all gradients, the last first."""

    def __init__(self, parameters: list[nn.Parameter], config: Any, at: int, size: int) -> None:
        self._at, self._size = at, size
        super().__init__(parameters, config)

    def hold(self) -> list[Tensor]:
        length = -(-sum(p.numel() for p in self.parameters) // self._size)
        first, offset = self._at * length, 0
        self._ranges: dict[int, Any] = {}
        half: list[Tensor] = []
        full: list[Tensor] = []
        self.shard_fp32_from_float16_groups: list[list[Tensor]] = [[]]
        self.shard_fp32_groups: list[list[Tensor]] = [[]]
        for p in reversed(self.parameters):
            start, end = max(first, offset) - offset, min(first + length, offset + p.numel()) - offset
            offset += p.numel()
            if start >= end:
                continue
            self._ranges[id(p)] = {"param": SimpleNamespace(start=start, end=end, size=end - start)}
            held = p.detach().view(-1)[start:end]
            if p.dtype == torch.bfloat16:
                half.append(p)
                self.shard_fp32_from_float16_groups[0].append(held.clone().float())
            else:
                full.append(p)
                self.shard_fp32_groups[0].append(held)
        self.model_float16_groups, self.model_fp32_groups = [half], [full]
        return [*self.shard_fp32_groups[0], *self.shard_fp32_from_float16_groups[0]]

    def _get_model_param_range_map(self, p: Tensor) -> Any:
        return self._ranges[id(p)]

    def pairs(self) -> Iterator[tuple[Any, Tensor]]:
        yield from zip(self.model_float16_groups[0], self.shard_fp32_from_float16_groups[0], strict=True)
        yield from zip(self.model_fp32_groups[0], self.shard_fp32_groups[0], strict=True)

    def prepare_grads(self) -> bool:
        for p, shard in self.pairs():
            held = self._ranges[id(p)]["param"]
            shard.grad = p.main_grad.view(-1)[held.start : held.end].float()
        return False


class HandMadeChain(HandMade):
    """Steps as `ChainedOptimizer` does."""

    def __init__(self, inner: list[HandMade]) -> None:
        self.chained_optimizers, self.config = inner, inner[0].config

    def prepare_grads(self) -> bool:
        return any([each.prepare_grads() for each in self.chained_optimizers])

    def step_with_ready_grads(self) -> bool:
        return all([each.step_with_ready_grads() for each in self.chained_optimizers])

    def step(self) -> tuple[bool, float | None, int | None]:
        if self.prepare_grads():
            return False, None, None
        norm = self.get_grad_norm()
        assert not any(each.config.clip_grad > 0 for each in self.chained_optimizers), "would clip again"
        return self.step_with_ready_grads(), norm, None


def optimizer_of(world: World, stages: list[nn.Module], kind: str, clip_grad: float = 1.0) -> Any:
    """The optimizer of this rank's parameters: ``distributed`` (two, chained) or ``whole``."""
    config = SimpleNamespace(clip_grad=clip_grad)
    every = list(trained(stages))
    if kind == "whole":
        return HandMade(every, config)
    dense = [p for p in every if getattr(p, "allreduce", True)]
    experts = [p for p in every if not getattr(p, "allreduce", True)]
    inner: list[HandMade] = [HandMadeDistributed(dense, config, world.at_dp, world.dp)]
    if experts:
        inner.append(HandMadeDistributed(experts, config, world.at_edp, world.edp))
    return HandMadeChain(inner)


def expected_piece(world: World, p: Any, what: str) -> Tensor:
    """What one process that held everything would have of a parameter's piece."""
    found = whole(p.true_name, what)
    return found if p.true_dim is None else world.cut(found, p.true_dim)
