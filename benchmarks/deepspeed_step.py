"""What a ZeRO-2 optimizer step costs: DeepSpeed's own clipping beside distnorm's under `attach`, as a table.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/deepspeed_step.py [fp32] [bf16]

Two engines of one process take turns, and which of them is first changes from pair to pair. Timed is
`engine.step()` at the boundary, from a barrier to the end of the slowest rank. A ratio is of the two times in
one pair, so that a slow spell of the machine hits both; below 1, distnorm's step is the faster one.
"""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import os
import platform
import sys
import time
import warnings
from statistics import median, quantiles
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distnorm

PAIRS, WARM_UP = 20, 3
WORDS, WIDTH, BLOCKS = 16384, 512, 14
# Title -> DeepSpeed's `gradient_clipping` and distnorm's `clip.max_norm`.
VARIANTS = {"clipped": (1e-3, 1e-3), "below the threshold": (1e9, 1e9), "measured only": (0.0, None)}


class Block(nn.Module):
    """A transformer block's parameters, without its attention, which has none."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norms[0](x)).chunk(3, -1)
        x = x + self.out(query * key.sigmoid() + value)
        return x + self.down(torch.relu(self.up(self.norms[1](x))))


def new_engine(dtype: str, gradient_clipping: float) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(WORDS, WIDTH), *(Block() for _ in range(BLOCKS)), nn.LayerNorm(WIDTH))
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": gradient_clipping,
        "zero_optimization": {"stage": 2},
    }
    if dtype != "fp32":
        settings[dtype] = {"enabled": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def seconds(engine: Any, words: Tensor) -> float:
    engine.backward(engine(words).float().square().mean())
    dist.barrier()
    start = time.perf_counter()
    engine.step()
    taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def pairs_of_times(dtype: str, gradient_clipping: float, max_norm: float | None) -> list[tuple[float, float]]:
    """(DeepSpeed's own, distnorm's) for each pair of steps; each pair is on the same batch."""
    own, attached = new_engine(dtype, gradient_clipping), new_engine(dtype, gradient_clipping)
    handle = distnorm.attach(attached, config={"clip": {"max_norm": max_norm}})
    generator = torch.Generator().manual_seed(dist.get_rank())
    times = []
    for pair in range(WARM_UP + PAIRS):
        words = torch.randint(0, WORDS, (2, 8), generator=generator)
        engines = (own, attached) if pair % 2 else (attached, own)
        taken = {engine: seconds(engine, words) for engine in engines}
        times.append((taken[own], taken[attached]))
        norms = [float(engine.get_global_grad_norm()) for engine in (own, attached)]
        assert abs(norms[0] / norms[1] - 1) < 1e-2, norms
        assert handle.last is not None and bool(handle.last.was_clipped) == (max_norm == 1e-3)
    handle.remove()
    return times[WARM_UP:]


def cell(times: list[float]) -> str:
    low, middle, high = quantiles(times, n=4)
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def row(title: str, dtype: str, times: list[tuple[float, float]]) -> str:
    own, ours = ([1e3 * pair[side] for pair in times] for side in (0, 1))
    low, middle, high = quantiles([b / a for a, b in zip(own, ours, strict=True)], n=4)
    ratio = f"{middle:.3f} ({low:.3f} to {high:.3f})"
    return f"| {dtype}, {title} | {cell(own)} | {cell(ours)} | {median(ours) / median(own):.3f} | {ratio} |"


def main() -> None:
    logging.disable(logging.WARNING)  # of DeepSpeed's start, and that its clipping is put out of work
    warnings.filterwarnings("ignore", category=FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo alone; this has to be compiled
    deepspeed.init_distributed("gloo", verbose=False)
    leads = dist.get_rank() == 0
    if leads:
        names = ("torch", "deepspeed")
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
        parameters = sum(p.numel() for p in Block().parameters()) * BLOCKS + (WORDS + 2) * WIDTH
        print(f"python {platform.python_version()}, {versions}, distnorm {distnorm.__version__}")
        print(f"{dist.get_world_size()} ranks, {parameters:,} parameters, {PAIRS} pairs of steps")
        print("Milliseconds: median (quartiles)\n")
        print("| step | DeepSpeed | distnorm | ratio of medians | ratio in a pair |\n|---|---|---|---|---|")
    for dtype in sys.argv[1:] or ["fp32", "bf16"]:
        for title, thresholds in VARIANTS.items():
            times = pairs_of_times(dtype, *thresholds)
            gc.collect()
            if leads:
                print(row(title, dtype, times), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
