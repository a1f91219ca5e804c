"""Which libraries get the gradient norm right, and where: every case, every contender, as a markdown table.

    python benchmarks/peers.py [part of a case's title]

Each pair runs in gloo processes of its own on the CPU: a backward pass, then the contender's own clipping.
The true norm is that of the same model in one process, in fp64. Right: off by 1e-6 at most (relative) on
every rank, with the gradients then scaled by it. A peer that isn't installed is left out.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, parallel

import distnorm
from distnorm.bench.peers import DEEPSPEED, TITAN, by_deepspeed, local_gradients, start_deepspeed
from distnorm.testing import RankPool, preload

LIMIT = 0.05
RIGHT, HANGS_AFTER = 1e-6, 30.0  # relative error, seconds


@dataclass
class Problem:
    """What one rank holds, with its gradients, and the true norm of the whole model's gradient."""

    parameters: list[nn.Parameter]
    truth: float
    root: Any = None  # FSDP1's clipping is a method of it
    redo: Callable[[float], Any] = float  # another backward pass, of a scaled loss
    pp_mesh: DeviceMesh | None = None
    named: Callable[[Any], Any] = iter  # pipeline stages need the parameters' names
    tied: tuple[tuple[str, str], ...] = ()


@dataclass
class Case:
    """How many ranks build what."""

    title: str
    ranks: int
    build: Callable[[], Problem]
    fsdp1: Callable[[], Problem] | None = None  # the same in FSDP1's wrapper, where that can express it
    on_one_rank: bool = False  # every element is, so that a sum over plain local tensors is the answer
    order: float = 2.0
    generator: bool = False
    scales: tuple[float, ...] = (1.0,)  # of the loss, step by step; the last step's norm is judged


def norm_of(gradients: Iterable[Tensor], order: float = 2.0) -> float:
    flat = [torch.zeros(1, dtype=torch.float64), *(gradient.double().flatten() for gradient in gradients)]
    return float(torch.linalg.vector_norm(torch.cat(flat), order))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def cpu_mesh(*axes: str) -> DeviceMesh:
    return init_device_mesh("cpu", (2,) * len(axes), mesh_dim_names=axes)


def new_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))


def trained(model: nn.Module, part: int | None = None, parts: int | None = None, dim: int = 0) -> Problem:
    """Train on this rank's part of the batch; the truth is a single process's, on all of it."""
    part, parts = part if part is not None else dist.get_rank(), parts or dist.get_world_size()
    batch = random(8, 4, 8)
    mean_over = batch.numel() // (parts if dim == 0 else 1)  # data parallel averages over ranks, TP adds up
    (model(batch.chunk(parts, dim)[part]).square().sum() / mean_over).backward()
    alone = new_model().double()
    alone(batch.double()).square().mean().backward()
    return Problem(list(model.parameters()), norm_of(p.grad for p in alone.parameters()), root=model)


def wrap_fsdp2(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    for module in [*(m for m in model.modules() if isinstance(m, nn.Linear)), model]:
        fully_shard(module, mesh=mesh)
    return model


def wrap_fsdp1(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    strategy = ShardingStrategy.HYBRID_SHARD if mesh else ShardingStrategy.FULL_SHARD
    fsdp = partial(FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=True)
    return fsdp(model, device_mesh=mesh, sharding_strategy=strategy)


def fsdp2_tp() -> Problem:
    model, mesh = new_model(), cpu_mesh("dp_shard", "tp")
    up, down = parallel.ColwiseParallel(), parallel.RowwiseParallel()
    parallel.parallelize_module(model, mesh["tp"], {"1": up, "3": down})
    return trained(wrap_fsdp2(model, mesh["dp_shard"]), mesh.get_local_rank("dp_shard"), 2)


def tp_sequence_parallel() -> Problem:
    model, norm = new_model(), parallel.SequenceParallel(use_local_output=True)
    up = parallel.ColwiseParallel(input_layouts=Shard(1))
    down = parallel.RowwiseParallel(output_layouts=Shard(1))
    parallel.parallelize_module(model, cpu_mesh("tp"), {"0": norm, "1": up, "3": down})
    return trained(model, dim=1)


def plain_beside_dtensors() -> Problem:
    model = new_model()
    for module in (model[1], model[3]):
        fully_shard(module)
    problem = trained(model)
    for parameter in model[0].parameters():  # nobody else averages these
        dist.all_reduce(parameter.grad)
        parameter.grad /= 2
    return problem


def pipeline(tied: bool) -> Problem:
    shapes = {"tok.weight": (50, 8), "0.weight": (8, 8), "1.weight": (9, 8), "head.weight": (50, 8)}
    whole = {name: random(*shape) for name, shape in shapes.items()}
    names = list(whole)[2 * dist.get_rank() :][:2]
    parameters = [nn.Parameter(torch.ones_like(whole[name])) for name in names]
    for name, parameter in zip(names, parameters, strict=True):
        parameter.grad = whole[name].clone()  # of a tied tensor both stages hold the sum of its two gradients
    truth = norm_of(g for name, g in whole.items() if not (tied and name == "head.weight"))
    links = (("tok.weight", "head.weight"),) * tied
    return Problem(parameters, truth, pp_mesh=cpu_mesh("pp"), named=partial(zip, names), tied=links)


def experts() -> Problem:
    weights = random(4, 8, 8)
    parameter = nn.Parameter(distribute_tensor(weights, cpu_mesh("ep"), [Shard(0)]))
    if dist.get_rank() == 0:  # no token was routed to rank 1's experts
        parameter.to_local().square().sum().backward()
    return Problem([parameter], norm_of([2 * weights[:2]]))


class Elements(nn.Module):
    def __init__(self, wanted: Tensor, frozen: int) -> None:
        super().__init__()
        self.wanted, self.weight = wanted, nn.Parameter(torch.zeros_like(wanted))
        self.frozen = nn.Parameter(torch.zeros(frozen), requires_grad=False) if frozen else None

    def forward(self, scale: float) -> Tensor:
        return (self.weight * self.wanted).sum() * scale


def elements(make: Callable[[], Tensor], wrap: Any, order: float = 2.0, frozen: int = 0) -> Problem:
    gradient = make()
    model = wrap(Elements(gradient, frozen))

    problem = Problem(list(model.parameters()), norm_of([gradient], order), root=model)
    problem.redo = lambda scale: (model.zero_grad(), model(scale).backward())
    return problem


def filled(title: str, make: Callable[[], Tensor], ranks: int = 2, **options: Any) -> Case:
    fsdp2, fsdp1 = (partial(elements, make, w, options.get("order", 2.0)) for w in (wrap_fsdp2, wrap_fsdp1))
    return Case(title, ranks, fsdp2, fsdp1, on_one_rank=True, **options)


hybrid = partial(cpu_mesh, "replicate", "shard")
frozen_half = partial(elements, lambda: torch.ones(4), wrap_fsdp1, frozen=4)  # it is rank 1's
CASES = [
    Case("FSDP over 4 ranks", 4,
         lambda: trained(wrap_fsdp2(new_model())), lambda: trained(wrap_fsdp1(new_model()))),
    Case("HSDP 2 x 2", 4,
         lambda: trained(wrap_fsdp2(new_model(), hybrid())),
         lambda: trained(wrap_fsdp1(new_model(), hybrid()))),
    Case("FSDP2 x TP, LayerNorm not distributed over TP", 4, fsdp2_tp),
    Case("TP + SequenceParallel (partial LayerNorm gradients)", 2, tp_sequence_parallel),
    Case("plain tensors beside DTensors", 2, plain_beside_dtensors),
    Case("2 pipeline stages", 2, partial(pipeline, tied=False), on_one_rank=True),
    Case("2 pipeline stages, tied embedding on both", 2, partial(pipeline, tied=True)),
    Case("a rank with no gradients", 2, experts, frozen_half, on_one_rank=True),
    filled("a generator, not a list", lambda: torch.ones(1000), generator=True),
    filled("fp16, 1e6 elements of 100", lambda: torch.full((10**6,), 100.0, dtype=torch.float16)),
    filled("bf16, 1e6 random elements", lambda: random(10**6).bfloat16()),
    filled("fp32, 1e7 random elements", lambda: random(10**7)),
    filled("fp32, 1e7 elements of 0.1", lambda: torch.full((10**7,), 0.1)),
    filled("fp32, 1000 elements of 1e20", lambda: torch.full((1000,), 1e20)),
    filled("fp32, 1000 elements of 1e-25", lambda: torch.full((1000,), 1e-25)),
    filled("NaN in one rank's shard", lambda: torch.cat([torch.ones(999), torch.tensor([math.nan])])),
    filled("inf-norm, 2 elements on 4 ranks, after steps of 100 and 1", lambda: torch.full((2,), 100.0), 4,
           order=math.inf, scales=(1.0, 0.01, 0.0001)),
]  # fmt: skip


def deepspeed(lib: Any, case: Case, problem: Problem, parameters: Any) -> Any:
    gradients = local_gradients(problem.parameters)
    given = (g for g in gradients) if case.generator else gradients
    return by_deepspeed(lib, gradients, LIMIT, order=case.order, given=given)


# Column -> (module that has to be importable, how it is called)
CONTENDERS: dict[str, tuple[str, Callable[[Any, Case, Problem, Any], Any]]] = {
    "torch": ("torch.nn.utils", lambda m, c, p, xs: m.clip_grad_norm_(xs, LIMIT, c.order)),
    "torchtitan": (TITAN, lambda m, c, p, xs: m.clip_grad_norm_(xs, LIMIT, c.order, pp_mesh=p.pp_mesh)),
    "FSDP1": ("torch", lambda m, c, p, xs: p.root.clip_grad_norm_(LIMIT, c.order)),
    "DeepSpeed": (DEEPSPEED, deepspeed),
    "distnorm": ("distnorm", lambda m, c, p, xs: m.clip_grad_norm_(p.named(xs), LIMIT, c.order, tied=p.tied)),
}


def measure(index: int, column: str) -> str:
    """On one rank: what the contender says of the last step, and whether it then scaled the gradients."""
    case, (module, clip) = CASES[index], CONTENDERS[column]
    lib = importlib.import_module(module)
    if column == "DeepSpeed":
        start_deepspeed(torch.device("cpu"))
    problem = (case.fsdp1 if column == "FSDP1" else case.build)()  # type: ignore[misc]
    complete = [p for p in problem.parameters if "Partial" not in str(getattr(p.grad, "placements", ""))]

    def call(given: Any) -> float:
        norm = clip(lib, case, problem, given)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    for scale in case.scales:
        problem.redo(scale)
        before = [gradient.double().clone() for gradient in local_gradients(complete)]
        given = (p for p in problem.parameters) if case.generator else problem.parameters
        dist.barrier()  # so that no rank's time runs while another still builds
        try:
            norm = concurrent.futures.ThreadPoolExecutor(1).submit(call, given).result(HANGS_AFTER)
        except concurrent.futures.TimeoutError:
            return "hangs"
        except Exception as error:
            return f"raises {type(error).__name__}: {str(error).partition(chr(10))[0][:60]}"
    truth = problem.truth * scale
    if math.isnan(truth) and math.isnan(norm):
        return "right (nan)"
    error = abs(norm / truth - 1)
    if not error <= RIGHT:
        return f"wrong: {norm:.6g}, not {truth:.6g} (x {norm / truth:.6g})"
    coef = min(1.0, LIMIT / (norm + 1e-6))
    missed = norm_of(a - b * coef for a, b in zip(local_gradients(complete), before, strict=True))
    return f"right ({error:.0e})" if missed <= 0.01 * coef * norm else "right, but gradients not scaled by it"


def cell(pool: RankPool, index: int, column: str) -> str:
    case = CASES[index]  # FSDP1's method is given no parameters, so no generator either
    if not {"FSDP1": case.fsdp1 and not case.generator, "DeepSpeed": case.on_one_rank}.get(column, True):
        return "-"
    by_text: dict[str, list[str]] = {}
    for rank, text in enumerate(pool.run(case.ranks, measure, index, column, timeout=300.0)):
        by_text.setdefault(text, []).append(str(rank))
    parts = [f"rank {', '.join(ranks)}: {text}" for text, ranks in by_text.items()]
    return text if len(parts) == 1 else "; ".join(parts)


def main() -> None:
    columns = []
    for column, (module, _) in CONTENDERS.items():
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
            columns.append(column)
    peers = ("torch", "torchtitan", "deepspeed")
    versions = [f"{d.name} {d.version}" for d in importlib.metadata.distributions() if d.name in peers]
    print(f"python {platform.python_version()}, distnorm {distnorm.__version__},", ", ".join(versions))
    print("\n|", " | ".join(["case", *columns]), "|\n" + "|---" * (len(columns) + 1) + "|")
    pool = RankPool(4)
    slow = ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"]
    preload(*slow, *(CONTENDERS[column][0] for column in columns))
    for index, case in enumerate(CASES):
        if " ".join(sys.argv[1:]) in case.title:
            cells = [cell(pool, index, column) for column in columns]
            print("|", " | ".join([case.title, *cells]), "|", flush=True)


if __name__ == "__main__":
    os.environ.update(DS_ACCELERATOR="cpu", DS_BUILD_OPS="0", PYTHONWARNINGS="ignore")
    main()
