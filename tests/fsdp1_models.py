"""A model under FSDP1 with every strategy, and the same model in one process in fp64."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy

from tests import oracle

STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2")
PER_RANK = 3  # rows of the batch


class Net(nn.Module):
    """Sizes that no number of ranks divides. `gain` is two elements: most ranks hold none of it.

    (Of a unit of one element, FSDP1 can't tell the shard's gradient from the whole: it accumulates wrongly.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(7, 11)
        self.block = nn.Sequential(nn.Linear(11, 5), nn.Tanh(), nn.Linear(5, 11, bias=False))
        self.gain = nn.Sequential(nn.Linear(1, 2, bias=False))
        self.down = nn.Linear(11, 3)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.up(rows))
        hidden = hidden + self.block(hidden)
        return self.down(hidden) * self.gain(hidden[:, :1]).sum(-1, keepdim=True)


def make(kind: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(7)
    return kind()


def rows(rank: int, step: int = 0, width: int = 7) -> torch.Tensor:
    return torch.randn(PER_RANK, width, generator=torch.Generator().manual_seed(100 * step + rank)) * 3


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def dense_gradients(
    ranks: Iterable[int], steps: Iterable[int] = (0,), kind: Callable[[], nn.Module] = Net
) -> dict[str, torch.Tensor]:
    """Gradients, in fp64, of the ranks' mean loss, added up over the steps."""
    model, ranks = make(kind).double(), list(ranks)
    for step in steps:
        for rank in ranks:
            (loss(model, rows(rank, step).double()) / len(ranks)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def dense_norm(gradients: dict[str, torch.Tensor], order: float = 2.0) -> float:
    return oracle.dense_of(gradients.values(), order)


@functools.cache
def pairs_of_ranks() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size() // 2, 2))


def fsdp(module: nn.Module, strategy: str = "FULL_SHARD", orig: bool = True, **options: Any) -> FSDP:
    """Wrap a module; hybrid strategies shard over two ranks and replicate over the others."""
    if strategy.lstrip("_").startswith("HYBRID") and "device_mesh" not in options:
        options["device_mesh"] = pairs_of_ranks()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # NO_SHARD is deprecated
        return FSDP(
            module,
            sharding_strategy=ShardingStrategy[strategy],
            use_orig_params=orig,
            device_id=torch.device("cpu"),
            **options,
        )


def wrapped(strategy: str, orig: bool, **options: Any) -> FSDP:
    """The net as three units, two of them inside the root's."""
    net = make()
    net.block = fsdp(net.block, strategy, orig, **options)
    net.gain = fsdp(net.gain, strategy, orig, **options)
    return fsdp(net, strategy, orig, **options)


def backward(model: nn.Module, step: int = 0, rank: int | None = None) -> None:
    loss(model, rows(dist.get_rank() if rank is None else rank, step)).backward()


def whole(model: nn.Module, *, gradients: bool = False) -> dict[str, torch.Tensor]:
    """All parameters (or their gradients) as FSDP1 itself puts them together, in fp64."""
    summoned: AbstractContextManager[None] = FSDP.summon_full_params(
        model, writeback=False, with_grads=gradients
    )
    with summoned:
        return {
            name.replace("_fsdp_wrapped_module.", ""): (p.grad if gradients else p).detach().double().clone()
            for name, p in model.named_parameters()
            if not gradients or p.grad is not None
        }


def units_on_other_ranks(kind: str) -> FSDP:
    """On four ranks, a unit that lies on other ranks than the root it is in."""
    net, pair = make(), dist.get_rank() // 2
    if kind == "copied":
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        net.block = fsdp(net.block, process_group=pairs[pair])
        return fsdp(net)
    net.block = fsdp(net.block)
    return fsdp(net, "HYBRID_SHARD")


class Experts(nn.Module):
    """One of two experts at work, and a layer that FSDP1 is told to ignore."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 5)
        self.experts = nn.ModuleDict({"e0": nn.Linear(5, 5), "e1": nn.Linear(5, 5)})
        self.alone = nn.LayerNorm(5)
        self.chosen = "e0"

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.alone(self.inner(batch)) + self.experts[self.chosen](self.inner(batch))


def experts_on_pairs(orig: bool) -> FSDP:
    """Each pair of four ranks holds one expert, under its name in the whole model."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    net, pair = make(Experts), dist.get_rank() // 2
    net.chosen = f"e{pair}"
    expert = fsdp(net.experts[net.chosen], orig=orig, process_group=groups[pair])
    net.experts = nn.ModuleDict({net.chosen: expert})
    return fsdp(net, orig=orig, ignored_modules=[net.alone])


def dense_experts() -> dict[str, torch.Tensor]:
    """Gradients of the mean over four ranks, and for an expert over the two that hold it."""
    net = make(Experts).double()
    for rank in range(4):
        net.chosen = f"e{rank // 2}"
        (loss(net, rows(rank).double()) / 4).backward()
    scale = {name: 2 if name.startswith("experts") else 1 for name, _ in net.named_parameters()}
    return {name: parameter.grad * scale[name] for name, parameter in net.named_parameters()}


class Tied(nn.Module):
    """One parameter under two names, a frozen layer, and a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 7), nn.Linear(7, 7)
        self.second.weight = self.first.weight
        self.frozen, self.unused = nn.Linear(7, 7).requires_grad_(False), nn.Linear(3, 3)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.second(self.frozen(torch.tanh(self.first(batch))))


def each(body: Callable[..., Any], cells: list[tuple[Any, ...]]) -> list[Any]:
    """What a rank finds in one cell after the other: one run of ranks for all of them."""
    return [body(*cell) for cell in cells]


def same_on_all(reports: list[Any]) -> Any:
    assert all(repr(report) == repr(reports[0]) for report in reports), reports
    return reports[0]
