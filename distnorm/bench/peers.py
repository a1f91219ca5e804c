"""How other libraries' gradient norms are called. Each one is imported only if it is there."""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

TITAN = "torchtitan.distributed.utils"
DEEPSPEED = "deepspeed.runtime.utils"

Parts = Sequence[tuple[Sequence[Sequence[nn.Parameter]], dist.ProcessGroup | None]]
"""Parameters by mesh, as torch's functions can take them, and the group over which squares still add up."""


@dataclass(frozen=True, slots=True)
class Peers:
    """The modules of the libraries that are installed, else `None`."""

    deepspeed: Any = None
    torchtitan: Any = None


def find_peers(device: torch.device) -> Peers:
    """Import what is installed. Every rank calls it, in the default process group."""
    return Peers(start_deepspeed(device), _imported(TITAN))


def start_deepspeed(device: torch.device) -> Any:
    """DeepSpeed's module of norm functions, ready for the default process group; `None` if not installed.

    Collective.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
    logging.disable(logging.WARNING)  # it tells of its start on stdout
    try:
        module = _imported(DEEPSPEED)
        if module is not None:
            deepspeed = importlib.import_module("deepspeed")
            deepspeed.ops.__compatible_ops__.clear()  # or it first compiles an op that isn't used here
            deepspeed.init_distributed("gloo" if device.type == "cpu" else "nccl", verbose=False)
        return module
    finally:
        logging.disable(logging.NOTSET)


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The pieces of gradients that this rank holds, as they are."""
    return [local(parameter.grad) for parameter in parameters if parameter.grad is not None]


def by_torch(parts: Parts, max_norm: float | None) -> Tensor:
    """`torch.nn.utils`, as torchtitan calls it where there are several meshes. Collective.

    `get_total_norm` takes the gradients of one mesh, so there is a norm for each, of which squares are added.
    """
    squares = [_square_by_torch(meshes, group) for meshes, group in parts]
    total = squares[0].sqrt() if len(squares) == 1 else torch.stack(squares).sum().sqrt()
    if max_norm is not None:
        for meshes, _ in parts:
            for parameters in meshes:
                torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return total


def _square_by_torch(meshes: Sequence[Sequence[nn.Parameter]], group: dist.ProcessGroup | None) -> Tensor:
    squares = []
    for parameters in meshes:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        squares.append((norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2)
    square = squares[0] if len(squares) == 1 else torch.stack(squares).sum()
    if group is not None:
        dist.all_reduce(square, group=group)
    return square


def by_megatrons_rule(
    owned: Sequence[Tensor], held: Sequence[Tensor], reduce: bool, max_norm: float
) -> float:
    """Megatron's rule, written from its description with torch's operators. Collective where `reduce`.

    One pass of local norms over what this rank owns, one all-reduce of the sum of their squares, the norm
    on the host, and one pass of scaling over what it holds.

    Args:
        owned: local gradients that no other rank counts.
        held: all local gradients.
        reduce: whether ranks own different parts; else each owns everything.
        max_norm: the threshold.
    """
    device = held[0].device if held else torch.device("cpu")
    norms = list(torch._foreach_norm(list(owned), 2, dtype=torch.float32)) if owned else []
    square = torch.stack(norms).square().sum() if norms else torch.zeros((), device=device)
    if reduce:
        dist.all_reduce(square)
    norm = math.sqrt(float(square))
    coefficient = max_norm / (norm + 1e-6)
    if coefficient < 1.0 and held:
        torch._foreach_mul_(list(held), coefficient)
    return norm


def by_deepspeed(
    module: Any,
    gradients: list[Tensor],
    max_norm: float,
    *,
    order: float = 2.0,
    given: Iterable[Tensor] | None = None,
    over_all_ranks: bool = True,
) -> Any:
    """The pair of calls that DeepSpeed's BF16_Optimizer makes. Collective where `over_all_ranks`.

    Args:
        module: what `start_deepspeed` returned.
        gradients: plain local tensors; each element is on one rank only, or all of them are on every rank.
        max_norm: the threshold.
        order: the order p.
        given: what the norm's function is given instead of the list.
        over_all_ranks: whether all ranks are its model-parallel group; else it reduces nothing.
    """
    mpu = SimpleNamespace(get_model_parallel_group=lambda: dist.group.WORLD) if over_all_ranks else None
    norm = module.get_global_norm_of_tensors(gradients if given is None else given, order, mpu=mpu)
    return module.clip_tensors_by_global_norm(gradients, max_norm, norm, mpu=mpu)
