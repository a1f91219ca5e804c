"""Where the time of a step goes, part by part.

    OMP_NUM_THREADS=1 PYTHONPATH=. torchrun --nproc-per-node 4 benchmarks/step_parts.py
    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/step_parts.py --gpu

By default four ranks clip on the CPU, all at once from a barrier: gradients of FSDP2 x TP, 288 large ones, of
which two fifths are replicated over TP, and 3,000 small ones. With `--gpu` one process takes a GPU's path, up
to launches that only count (see gpu_host.py), for 288 and 3,000 gradients. Medians of rank 0, wall time and
its own CPU time; a part that is indented is within the one before. To measure takes some microseconds a part.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from inspect import isgeneratorfunction
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from gpu_host import Launches, sharded
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import distnorm
from distnorm.kernels import gpu, gpu_clip
from distnorm.measure.exchange import Exchange
from distnorm.measure.fast_path import FastPath, FoundGradients
from distnorm.measure.meter import Meter
from distnorm.measure.result_checks import ResultChecks
from distnorm.measure.unread import UnreadReduction
from distnorm.plan.collectives import Ranks
from distnorm.policies.clipping import Clipping
from distnorm.sources.inventory import Inventory, Managers
from distnorm.step import Step
from tests.counting import as_on_a_gpu

PARTS = {
    "whole step": (distnorm.GradClipper, "clip"),
    "is the target the same": (Inventory, "is_current"),
    "all but that": (Step, "take"),
    "  reading": (Meter, "read"),
    "    what FSDP2 holds back": (Managers, "refuse_unreduced"),
    "    finding gradients": (FastPath, "read"),
    "  squares": (FoundGradients, "statistic"),
    "  samples of replicas": (ResultChecks, "replica_summand"),
    "  squares and exchange, unread": (UnreadReduction, "__call__"),
    "  exchange": (Exchange, "reduce"),
    "    all-reduce, with the wait for slower ranks": (Ranks, "all_reduce_"),
    "  deciding and scaling": (Clipping, "__call__"),
    "    scaling": (FoundGradients, "scale_"),
}
STEPS = 100
Times = dict[str, list[tuple[float, float]]]


@contextmanager
def timed() -> Iterator[Times]:
    """Microseconds of wall and CPU time of each call of each part."""
    times: Times = {}
    with ExitStack() as patches:
        for part, (kind, name) in PARTS.items():
            original: Any = vars(kind)[name]
            is_property = isinstance(original, property)
            function = original.fget if is_property else original

            def spent(part: str, wall: float, own: float) -> None:
                times.setdefault(part, []).append(
                    ((time.perf_counter() - wall) * 1e6, (time.thread_time() - own) * 1e6)
                )

            def timing(*arguments: Any, part: str = part, function: Any = function, **options: Any) -> Any:
                began = time.perf_counter(), time.thread_time()
                found = function(*arguments, **options)
                spent(part, *began)
                return found

            def stopping(*arguments: Any, part: str = part, function: Any = function, **options: Any) -> Any:
                began = time.perf_counter(), time.thread_time()
                found = yield from function(*arguments, **options)
                spent(part, *began)
                return found

            if isgeneratorfunction(function):  # it stops at the all-reduce
                timing = stopping
            patches.enter_context(mock.patch.object(kind, name, property(timing) if is_property else timing))
        yield times


def show(title: str, times: Times) -> None:
    if dist.get_rank():
        return
    print(f"{title}: wall and own CPU time, us")
    for part in PARTS:
        if part in times and len(times[part]) >= STEPS:
            wall, own = (median(column) for column in zip(*times[part][-STEPS:], strict=True))
            print(f"  {part:<50}{wall:>8,.0f}{own:>8,.0f}")


def on_the_cpu(title: str, count: int, replicated: float, shape: tuple[int, int]) -> None:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    parameters = []
    for i in range(count):
        is_copy = i < count * replicated
        placements = [Shard(0), Replicate()] if is_copy else [Shard(0), Shard(1)]
        whole = torch.ones(shape[1:] if is_copy else shape)
        parameter = nn.Parameter(distribute_tensor(whole, mesh, placements))
        parameter.grad = distribute_tensor(whole, mesh, placements)
        parameters.append(parameter)
    clipper = distnorm.GradClipper(parameters, {"clip": {"max_norm": 1e-3}})
    with timed() as times:
        for _ in range(STEPS + 5):
            for parameter in parameters:
                gradient: Any = parameter.grad
                gradient._local_tensor.fill_(1.0)
            dist.barrier()
            clipper.clip()
    show(title, times)


def on_the_way_to_a_gpu(count: int) -> None:
    model, launches = sharded(count), Launches()
    clipper = distnorm.GradClipper(model, {"clip": {"max_norm": 0.5, "nonfinite": "skip"}})
    with (
        as_on_a_gpu(),
        mock.patch.object(gpu, "triton_code", lambda: launches.modules),
        mock.patch.object(gpu_clip, "triton_code", lambda: launches.modules),
        mock.patch.object(gpu_clip, "clip_code", lambda: launches.modules),
        timed() as times,
    ):
        for _ in range(STEPS + 5):
            clipper.clip()
    show(f"{count:,} DTensors, up to the launches", times)


def main() -> None:
    os.environ.setdefault("DISTNORM_NATIVE", "now")
    torch.set_num_threads(1)
    if "--gpu" in sys.argv:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        on_the_way_to_a_gpu(288)
        on_the_way_to_a_gpu(3000)
    else:
        dist.init_process_group("gloo")
        on_the_cpu("288 tensors of 512 x 256", 288, 0.4, (512, 256))
        on_the_cpu("3,000 tensors of 32 x 16", 3000, 0.0, (32, 16))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
