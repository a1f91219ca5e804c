"""What the host does in a step on a GPU, up to the launches, measured without a GPU.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/gpu_host.py

The CPU's memory stands in for a GPU's, and the kernels' launches are replaced by functions that count. So
neither the launches themselves are in the times, nor the streams and events of CUDA, nor the all-reduce: one
process measures 288 and 3,000 DTensors of FSDP2. Beside the times it counts the kernels' launches, torch's
operators, and the calls that could wait for a device.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import distnorm
from distnorm.kernels import gpu, gpu_clip
from tests.counting import as_on_a_gpu

COUNTS, STEPS = (288, 3000), 300
KERNELS = ("partials", "totals", "scale", "zero_unless", "clip")
WAITS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")


class Launches:
    """In place of `gpu_code`: kernels that do nothing but write a result, as the first program would."""

    def __init__(self) -> None:
        self.counted: Counter[str] = Counter()
        self.modules = SimpleNamespace(
            **{name: self._kernel(name) for name in KERNELS},
            DTYPES=range(4),
            ZERO=float("-inf"),
        )

    def _kernel(self, name: str) -> Any:
        def launch(*arguments: Any) -> None:
            self.counted[name] += 1
            if name == "clip":
                values, flags = arguments[4:6]
                values.fill_(1.0)
                flags.zero_()

        return _Grid(launch)


class _Grid:
    def __init__(self, launch: Callable[..., None]) -> None:
        self._launch = launch

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch


class Operators(TorchDispatchMode):
    """Counts torch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counted[func.name()] += 1
        return func(*args, **(kwargs or {}))


def sharded(count: int) -> nn.Module:
    model = nn.Module()
    model.weights = nn.ParameterList(torch.randn(32, 16) for _ in range(count))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter).detach()
    return model


def waiting(call: Callable[[], object]) -> int:
    """How often a tensor is asked for what would wait for a device."""
    counted = 0

    def counting(original: Any) -> Any:
        def asked(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            nonlocal counted
            counted += 1
            return original(tensor, *arguments, **options)

        return asked

    patches = [mock.patch.object(Tensor, name, counting(getattr(Tensor, name))) for name in WAITS]
    for patch in patches:
        patch.start()
    call()
    for patch in patches:
        patch.stop()
    return counted


def step_times(model: nn.Module, clip: Callable[[], object], moves: bool) -> list[float]:
    """Microseconds of each step; with `moves` every gradient is a new tensor, beside the one of before."""
    times, kept = [], []
    for _ in range(STEPS if not moves else STEPS // 10):
        if moves:
            kept = [p.grad for p in model.parameters()]
            for parameter in model.parameters():  # as FSDP2 makes them: all with the same spec
                grad: Any = parameter.grad
                parameter.grad = DTensor(torch.ones_like(grad._local_tensor), grad._spec, requires_grad=False)
        began = time.perf_counter()
        clip()
        times.append((time.perf_counter() - began) * 1e6)
    del kept
    return times


def measured(count: int, nonfinite: str) -> list[str]:
    model, launches, operators = sharded(count), Launches(), Operators()
    clipper = distnorm.GradClipper(model, {"clip": {"max_norm": 0.5, "nonfinite": nonfinite}})
    with (
        as_on_a_gpu(),
        mock.patch.object(gpu, "triton_code", lambda: launches.modules),
        mock.patch.object(gpu_clip, "triton_code", lambda: launches.modules),
        mock.patch.object(gpu_clip, "clip_code", lambda: launches.modules),
    ):
        for _ in range(5):
            clipper.clip()
        times = step_times(model, clipper.clip, moves=False)
        moved = step_times(model, clipper.clip, moves=True)
        clipper.clip()
        launches.counted.clear()
        with operators:
            clipper.clip()
        launched = dict(launches.counted)
        waits = waiting(clipper.clip)
    ops = ", ".join(f"{n} {name}" for name, n in operators.counted.items())
    return [
        f"{count:,} DTensors, nonfinite: {nonfinite}: {median(times):.0f} us a step (fastest "
        f"{min(times):.0f}); {median(moved):.0f} us where all have moved",
        f"  launches {sum(launched.values())}: {launched}; calls that could wait {waits}",
        f"  operators, those of the stand-in kernels among them: {ops}",
    ]


def main() -> None:
    os.environ.setdefault("DISTNORM_NATIVE", "now")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for count in COUNTS:
        for nonfinite in ("skip", "raise"):
            print(*measured(count, nonfinite), sep="\n", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
