"""What the host does in a step, part by part: finding gradients, and an all-reduce of few numbers.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 benchmarks/host_path.py

Finding is timed on rank 0 alone, while the others wait: 3,000 gradients of FSDP2, by compiled code and by
Python's attributes, with caches that hold them already and with caches that hold something else. The
all-reduces are timed on the slowest rank; all ranks come from a barrier.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distnorm.kernels import SpanTable, walker
from distnorm.sources import dtensor
from distnorm.sources.shards import of_grad

COUNT, ROUNDS, REDUCTIONS = 3000, 25, 200
LENGTHS = (1, 2, 3, 4, 8, 17, 64)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(32, 16) for _ in range(COUNT))

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


def finding() -> str:
    model = Listed()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    model().backward()
    if dist.get_rank():
        return ""
    holders = list(model.parameters())
    route = dtensor.shard("weight", holders[0], of_grad).route
    assert route is not None
    layouts = [route.layout_of(p.grad) for p in holders if p.grad is not None]
    locals_ = [p.grad._local_tensor for p in holders]  # type: ignore[union-attr]
    compiled = walker(SpanTable.of(locals_), layouts)
    out = np.zeros(COUNT, dtype=np.int64)
    other = torch.zeros(16_000_000)
    lines = []
    for state, before in (("warm", lambda: None), ("cold", lambda: other.add_(1))):
        by_attributes = timed(lambda: list(route.addresses(holders, layouts)), before)
        if compiled is None:
            lines.append(f"{state} caches: {by_attributes:.0f} us by attributes; no compiled code here")
        else:
            walked = timed(lambda: compiled(holders, out), before)
            assert out.tolist() == list(route.addresses(holders, layouts))
            lines.append(
                f"{state} caches: {walked:.0f} us by compiled code, {by_attributes:.0f} by attributes"
            )
    return "\n".join(f"finding {COUNT:,} gradients, {line}" for line in lines)


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
    found = finding()
    dist.barrier()
    reduced = [reducing(length) for length in LENGTHS]
    if dist.get_rank() == 0:
        print(found, *reduced, sep="\n", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
