"""The models whose gradients are attacked, on every topology."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from benchmarks.attack_changes import Scene, fill, made
from benchmarks.attack_oracle import Piece

BACKWARD = "backward"
SHAPES = ((4, 3), (7,), (), (0, 2), (5, 5), (4, 3), (33,), (5, 5), (2, 3, 4))
DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Bag(nn.Module):
    """Parameters of all shapes and dtypes."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__()
        mixed, is_complex = dice.random() < 0.6, dice.random() < 0.15
        for i, shape in enumerate(SHAPES):
            dtype = dice.choice(DTYPES) if mixed else torch.float32
            dtype = torch.complex64 if is_complex and i in (0, 5) else dtype
            self.register_parameter(f"{'even' if i % 2 == 0 else 'odd'}{i}", _parameter(shape, dtype))

    def forward(self, seed: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        generator = np.random.default_rng(seed)
        for p in self.parameters():
            weight = torch.from_numpy(np.array(generator.standard_normal(tuple(p.shape))))
            real = p.real if p.is_complex() else p
            total = total + (real.double() * weight).sum()
        return total


class Net(nn.Module):
    """Layers of equal shapes, and some too small to give every rank a piece."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 3, bias=False)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.tanh(self.a(torch.tanh(self.first(x)))))
        return self.out(self.norm(x)) * self.gain


def _parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype))


@dataclass(eq=False)
class Model:
    """A module, its parameters as a list that lives, and what this rank holds of them."""

    module: nn.Module
    inner: nn.Module
    named: list[tuple[str, nn.Parameter]]
    scene: Scene
    pattern: str
    group_rank: int

    def by_hand(self, how: str, dice: random.Random) -> None:
        """Give gradients to all, or to those that backward gave none."""
        scene = self.scene
        flat: dict[torch.dtype, Tensor] = {}
        gap = dice.choice((0, 0, 3))
        for i, piece in enumerate(scene.pieces):
            own = random.Random(dice.random())
            holder, values, dtype = piece.local_holder, scene.values(i, own), piece.local_holder.dtype
            if how == BACKWARD and piece.holder.grad is not None:
                continue
            if how == "in place" and scene.is_tidy(i) and not _is_shared(scene, i):
                local = scene.local(i)
                assert local is not None
                fill(local.detach(), values)
                continue
            if how == "flat":
                base = flat.setdefault(dtype, torch.full((1000,), 77, dtype=dtype))
                view = base[gap : gap + holder.numel()].view(holder.shape)
                flat[dtype] = base[gap + holder.numel() :]
                fill(view, values)
            else:
                view = made(values, holder.shape, dtype, own.randrange(4))
            piece.holder.grad = None
            scene.put(i, view, own)

    def change_set(self, dice: random.Random) -> None:
        """Add a parameter, take it out, or put another in its place."""
        scene, had = self.scene, self.scene.has_extra
        if had:
            scene.pieces.pop()
            self.named.pop()
            del self.inner._parameters["extra"]
        scene.has_extra = not had or dice.random() < 0.5
        if scene.has_extra:
            extra = _parameter(dice.choice(((4, 3), (9,))), torch.float32)
            self.inner.register_parameter("extra", extra)
            self.named.append(("extra", extra))
            scene.pieces.append(Piece("extra", extra, np.arange(extra.numel()), extra.numel()))
            scene.pieces[-1].everywhere = [scene.pieces[-1].index] * scene.world
            at = len(scene.pieces) - 1
            scene.put(at, made(scene.values(at, dice), extra.shape, torch.float32), dice)


def _is_shared(scene: Scene, i: int) -> bool:
    local = scene.local(i)
    assert local is not None
    starts = [
        other.data_ptr()
        for k in range(len(scene.pieces))
        if (other := scene.local(k)) is not None and scene.is_tidy(k)
    ]
    return starts.count(local.data_ptr()) > 1


def build(topology: str, dice: random.Random) -> Model:
    """A model on the topology. Collective."""
    torch.manual_seed(0)
    rank, world = dist.get_rank(), dist.get_world_size()
    inner: nn.Module = Bag(dice) if topology == "plain" else Net()
    if topology != "plain" and dice.random() < 0.25:
        inner.to(dice.choice((torch.bfloat16, torch.float64)))
    numels = {name: p.numel() for name, p in inner.named_parameters()}
    with torch.no_grad():
        for p in inner.parameters():
            p.copy_(torch.arange(p.numel()).view(p.shape))
    module, group_rank = _distributed(topology, inner, dice)
    pieces, named = [], []
    for name, p in inner.named_parameters():
        local = p._local_tensor if isinstance(p, DTensor) else p
        index = local.detach().real.reshape(-1).long().numpy().copy()
        pieces.append(Piece(name, p, index, numels[name]))
        named.append((name, p))
        wave = np.sin(index * 1.7 + zlib.crc32(name.encode())) * 0.3
        fill(local.detach(), wave)
    mine = [piece.index for piece in pieces]
    every: list[Any] = [None] * world
    dist.all_gather_object(every, mine)
    for i, piece in enumerate(pieces):
        piece.everywhere = [indices[i] for indices in every]
    pattern = "odd*" if topology == "plain" else "*weight"
    model = Model(module, inner, named, Scene(pieces, rank, world), pattern, group_rank)
    model.scene.change_set = model.change_set
    return model


def _distributed(topology: str, net: nn.Module, dice: random.Random) -> tuple[nn.Module, int]:
    """The module as its framework holds it, and this rank's number among those with other data."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if topology == "plain":
        return net, 0
    if topology == "ddp":
        return DistributedDataParallel(net, gradient_as_bucket_view=dice.random() < 0.5), rank
    mesh, data_rank = init_device_mesh("cpu", (world,)), rank
    if topology == "fsdp2 x tp":
        shape = (2, 2) if world == 4 else dice.choice(((1, 2), (2, 1)))
        both = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        parallelize_module(net, both["tp"], {"a": ColwiseParallel(), "b": RowwiseParallel()})
        mesh, data_rank = both["dp"], both.get_local_rank("dp")
    if dice.random() < 0.7:
        fully_shard(net.a, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net, data_rank


def run_backward(model: Model, dice: random.Random) -> None:
    """A forward and a backward pass, of which none may meet what was done to the last gradients."""
    seed, zeroes = dice.getrandbits(30), dice.random() < 0.3
    scene = model.scene
    for i, piece in enumerate(scene.pieces):
        local = scene.local(i)
        if zeroes and isinstance(model.module, Bag) and local is not None and scene.is_tidy(i):
            local.detach().zero_()  # accumulates in the same memory
        else:
            piece.holder.grad = None
    if isinstance(model.module, Bag):
        (model.module(seed) * scene.scale).backward()
        return
    dtype = model.named[0][1].dtype
    torch.manual_seed(seed + model.group_rank)
    for _ in range(dice.choice((1, 1, 2))):
        out = model.module(torch.randn(4, 6).to(dtype))
        (out.square().sum() * scene.scale).backward()
