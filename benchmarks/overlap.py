"""What is left of a norm after backward with `clip.overlap`, beside the norm without it.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/overlap.py

Two copies of a model, in turns: a backward, a barrier, and then `GradClipper.measure()`, timed
on the slowest rank. Gradients are the same for both; their norms have to agree.
"""

from __future__ import annotations

import math
import time
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distnorm

ROUNDS = 15
SIZES = {
    "39.9 million parameters": [(1024, 1024)] * 38 + [(1024,)] * 23,
    "GPT-2's 124.5 million": [(50257, 768), (1024, 768)]
    + [(768, 2304), (768, 768), (768, 3072), (3072, 768), (2304,), (3072,), *[(768,)] * 6] * 12
    + [(768,)] * 2,
}


class Sum(nn.Module):
    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    def forward(self, factor: Tensor) -> Tensor:
        return torch.stack([(weight * factor).square().sum() for weight in self.weights]).sum()


def made(kind: str, shapes: list[tuple[int, ...]]) -> nn.Module:
    return DistributedDataParallel(Sum(shapes)) if kind == "DDP" else fully_shard(Sum(shapes))


def timed(model: nn.Module, clipper: distnorm.GradClipper) -> tuple[float, float]:
    model.zero_grad()
    model(torch.ones(())).backward()
    dist.barrier()
    began = time.perf_counter()
    result = clipper.measure()
    taken = torch.tensor(time.perf_counter() - began)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken), float(result.total_norm)


def compared(kind: str, size: str) -> str:
    models = {overlap: made(kind, SIZES[size]) for overlap in (False, True)}
    clippers = {o: distnorm.GradClipper(m, {"clip": {"overlap": o}}) for o, m in models.items()}
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(-2, ROUNDS):
        norms = []
        for overlap in (False, True) if turn % 2 else (True, False):
            taken, norm = timed(models[overlap], clippers[overlap])
            norms.append(norm)
            if turn >= 0:
                times[overlap].append(taken)
        assert math.isclose(*norms, rel_tol=1e-9), norms
    without, left = (median(times[overlap]) * 1e3 for overlap in (False, True))
    best = min(times[True]) / min(times[False])
    return (
        f"{kind}, {size}: {without:.2f} ms without overlap, {left:.2f} ms left with it: {left / without:.2f} "
        f"(of the least times {best:.2f}), median of {ROUNDS}"
    )


def main() -> None:
    dist.init_process_group("gloo")
    for size in SIZES:
        for kind in ("DDP", "FSDP2"):
            told = compared(kind, size)
            if dist.get_rank() == 0:
                print(told, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
