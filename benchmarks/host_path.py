"""What the host does in a step, part by part: finding gradients, and an all-reduce of few numbers.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 benchmarks/host_path.py

Finding is timed on rank 0 alone, while the others wait: 288 and 3,000 gradients of FSDP2, by compiled code
and by Python's attributes, with caches that hold them already and with caches that hold something else.
Whole training steps go by both in turn. The all-reduces are timed on the slowest rank; all ranks come from a
barrier.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distnorm
from distnorm.kernels import Finder, walking

COUNTS, ROUNDS, REDUCTIONS = (288, 3000), 25, 200
LENGTHS = (1, 2, 3, 4, 8, 17, 64)
WAYS = ("compiled code", "attributes")


class Listed(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(32, 16) for _ in range(count))

    def forward(self) -> Tensor:
        return torch.stack([weight.square().sum() for weight in self.weights]).sum()


def timed(call: Callable[[], object], before: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        before()
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return median(times) * 1e6


def finding(count: int) -> str:
    model = sharded(count)
    model().backward()
    if dist.get_rank():
        return ""
    holders = list(model.parameters())
    by_attributes, by_code = (Finder([p.grad for p in holders if p.grad is not None]) for _ in range(2))
    by_attributes._asks = False
    other = torch.zeros(16_000_000)
    lines = []
    for state, before in (("warm", lambda: None), ("cold", lambda: other.add_(1))):
        first, second = by_code(holders), by_attributes(holders)
        assert first is not None and second is not None and (first.addresses == second.addresses).all()
        code, attributes = (timed(lambda f=f: f(holders), before) for f in (by_code, by_attributes))
        with_what = (
            "compiled code" if by_code._compiled is not None else "attributes too: there is no compiler"
        )
        lines.append(
            f"finding {count:,} gradients, {state} caches: {code:.0f} us by {with_what}, "
            f"{attributes:.0f} by attributes"
        )
    return "\n".join(lines)


def sharded(count: int) -> nn.Module:
    model = Listed(count)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def stepping(count: int) -> str:
    """Whole training steps, clipped by one way and the other in turn."""
    model = sharded(count)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    clippers = {way: distnorm.GradClipper(model, {"clip": {"max_norm": 1.0}}) for way in WAYS}
    whole: dict[str, list[float]] = {way: [] for way in WAYS}
    clipping: dict[str, list[float]] = {way: [] for way in WAYS}
    library = walking.library
    for round_ in range(ROUNDS + 3):
        for way in WAYS:
            walking.library = library if way == "compiled code" else lambda count: None
            dist.barrier()
            began = time.perf_counter()
            model().backward()
            before = time.perf_counter()
            clippers[way].clip()
            after = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            if round_ > 2:
                whole[way].append(time.perf_counter() - began)
                clipping[way].append(after - before)
    walking.library = library
    steps = (f"{median(whole[way]) * 1e3:.2f} ms by {way}" for way in WAYS)
    clips = (f"{median(clipping[way]) * 1e3:.2f} ms by {way}" for way in WAYS)
    return f"steps of {count:,} DTensors: {', '.join(steps)}; of it clipping: {', '.join(clips)}"


def reducing(length: int) -> str:
    vector = torch.zeros(length, dtype=torch.float64)
    mine = torch.zeros(REDUCTIONS, dtype=torch.float64)
    for i in range(REDUCTIONS):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(vector)
        mine[i] = time.perf_counter() - began
    dist.all_reduce(mine, dist.ReduceOp.MAX)
    return (
        f"all-reduce of {length} fp64 over {dist.get_world_size()} ranks: {float(mine.median()) * 1e6:.0f} us"
    )


def main() -> None:
    os.environ.setdefault("DISTNORM_NATIVE", "now")
    dist.init_process_group("gloo")
    found = []
    for count in COUNTS:
        found.append(finding(count))
        dist.barrier()
        found.append(stepping(count))
    reduced = [reducing(length) for length in LENGTHS]
    if dist.get_rank() == 0:
        print(*found, *reduced, sep="\n", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
