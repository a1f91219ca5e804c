"""Pipelines with tied layers, experts, tensor parallelism: each found by identity, counted once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distnorm import NonFiniteGradientError
from distnorm.hooks.deepspeed import DeepSpeedHook
from tests.engines.rig import LR, make_engine, norm_of, use_deepspeed

CLIP = {"clip": {"max_norm": 0.1}}
WORDS, DIM = 11, 5


class Word(nn.Module):
    """An embedding, or its transpose. The bias is in every copy of the tied layer, and is not tied."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(WORDS, DIM)), nn.Parameter(torch.zeros(1))

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.weight) + self.bias


def unembed(layer: Word, hidden: Tensor) -> Tensor:
    return torch.tanh(hidden) @ layer.weight.t() + 0 * layer.bias


FACTOR = [1.0]  # of this rank's loss


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), labels) * FACTOR[0]


def words(step: int, micro: int, data_rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10007 * step + 101 * micro + data_rank)
    ids = torch.randint(0, WORDS, (2, 2), generator=generator)
    return ids[0], ids[1]


def gathered(mine: dict[str, Tensor]) -> dict[str, Tensor]:
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return {name: value for theirs in everybody for name, value in theirs.items()}


def pipeline_parameters(engine: Any) -> dict[str, Tensor]:
    mine = {n: p.detach().to(torch.float64, copy=True) for n, p in engine.module.named_parameters()}
    bias = mine.pop("tied_modules.word.bias")
    return gathered({**mine, f"bias{engine.stage_id}": bias})


def dense_pipeline(values: dict[str, Tensor], step: int, micros: int, data_world: int) -> dict[str, Tensor]:
    v = {name: value.clone().requires_grad_() for name, value in values.items()}
    word = v["tied_modules.word.weight"]
    loss = 0.0
    for data_rank in range(data_world):
        for micro in range(micros):
            ids, labels = words(step, micro, data_rank)
            hidden = nn.functional.embedding(ids, word) + v["bias0"]
            hidden = hidden @ v["1.weight"].t() + v["1.bias"]
            hidden = hidden @ v["2.weight"].t() + v["2.bias"]
            logits = torch.tanh(hidden) @ word.t() + 0 * v["bias1"]
            loss = loss + nn.functional.cross_entropy(logits, labels) / (data_world * micros)
    return dict(zip(v, torch.autograd.grad(loss, list(v.values())), strict=True))


def make_pipeline(stage: int, dtype: str, micros: int) -> Any:
    use_deepspeed()
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    torch.manual_seed(0)
    layers = [
        TiedLayerSpec("word", Word),
        LayerSpec(nn.Linear, DIM, DIM),
        LayerSpec(nn.Linear, DIM, DIM),
        TiedLayerSpec("word", Word, forward_fn=unembed),
    ]
    module = PipelineModule(layers, num_stages=2, loss_fn=cross_entropy, partition_method="uniform")
    extra = {} if dtype == "fp32" or stage == 0 else {"data_types": {"grad_accum_dtype": "fp32"}}
    return make_engine(
        stage,
        dtype,
        accumulation=micros,
        model=module,
        groups=[{"params": [p for p in module.parameters() if p.requires_grad]}],
        **extra,
    )


def batches(engine: Any, step: int) -> Iterator[Any]:
    for micro in range(engine.gradient_accumulation_steps()):
        yield words(step, micro, engine.grid.get_data_parallel_rank())


def run_pipeline(stage: int, dtype: str, micros: int) -> dict[str, Any]:
    engine = make_pipeline(stage, dtype, micros)
    hook = DeepSpeedHook(engine, CLIP)
    data_world = engine.grid.get_data_parallel_world_size()
    facts: dict[str, Any] = {"wrapper": type(engine.optimizer).__name__, "steps": []}
    for step in range(2):
        before = pipeline_parameters(engine)
        engine.train_batch(batches(engine, step))
        after = pipeline_parameters(engine)
        exact = dense_pipeline(before, step, micros, data_world)
        true_norm, result = norm_of(exact), hook.clipper.last.to_dict()
        coef = min(1.0, 0.1 / (true_norm + 1e-6))
        off = max(float((after[n] - before[n] + LR * coef * exact[n]).abs().max()) for n in before)
        facts["steps"].append((result["total_norm"], true_norm, float(engine.get_global_grad_norm()), off))
    hook.remove()
    return facts


@pytest.mark.parametrize(
    ("world", "stage", "dtype"),
    [(2, 0, "fp32"), (4, 0, "fp32"), (4, 1, "fp32"), (4, 1, "bf16"), (4, 0, "bf16")],
)
def test_a_pipeline_with_tied_layers(engine_ranks, table, world, stage, dtype):
    for facts in engine_ranks(world, run_pipeline, stage, dtype, 3, timeout=90):
        for measured, exact, reported, off in facts["steps"]:
            assert reported == measured
            # bf16: forward and backward are rounded too; sqrt(2) for a weight counted twice is far off.
            assert measured == pytest.approx(exact, rel=1e-5 if dtype == "fp32" else 0.02)
            assert off < (1e-5 if dtype == "fp32" else 0.05)
    table.append(f"{world} ranks  pipeline of 2 stages, tied  ZeRO {stage}  {dtype}  {facts['wrapper']}")


def run_broken_pipeline(stage: int, dtype: str) -> list[tuple[str, float, float]]:
    engine = make_pipeline(stage, dtype, 2)
    hook = DeepSpeedHook(engine, {"clip": {"max_norm": 0.1, "nonfinite": "raise"}})
    seen = []
    for step in range(3):
        FACTOR[0] = math.nan if step == 1 and dist.get_rank() == 3 else 1.0
        before, raised = pipeline_parameters(engine), ""
        try:
            engine.train_batch(batches(engine, step))
        except NonFiniteGradientError as error:
            raised = str(error)
        after = pipeline_parameters(engine)
        update = norm_of({name: after[name] - before[name] for name in before}) / LR
        seen.append((raised, float(engine.get_global_grad_norm()), update))
    hook.remove()
    return seen


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "fp32"), (1, "bf16")])
def test_a_nan_in_a_pipeline_is_raised_on_every_stage(engine_ranks, stage, dtype):
    for seen in engine_ranks(4, run_broken_pipeline, stage, dtype, timeout=90):
        assert not seen[0][0] and "found nan" in seen[1][0] and not seen[2][0]
        assert math.isnan(seen[1][1]) and seen[1][2] == 0
        assert seen[2][2] == pytest.approx(0.1, rel=1e-4 if dtype == "fp32" else 0.05)


def run_experts(cells: list[tuple[int, str]]) -> list[tuple[float, float, float]]:
    """(measured, norm of the update as all distinct parameters made it, the norm DeepSpeed reports alone)"""
    use_deepspeed()
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            expert = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 7))
            self.moe = MoE(7, expert, num_experts=4, ep_size=2, k=1, use_rts=False, drop_tokens=False)
            self.out = nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.moe(x)[0])

    outcomes = []
    for stage, dtype in cells:
        reports = []
        for hooked in (True, False):
            torch.manual_seed(1000 * 0 + 7)
            model = Sparse()
            for name, p in model.named_parameters():
                seed = sum(name.encode()) + (dist.get_rank() % 2) * 1000 * ("experts" in name)
                p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * 0.3
            groups = split({"params": list(model.parameters()), "name": "all"})
            engine = make_engine(stage, dtype, model=model, groups=groups, gradient_clipping=0.1)
            hook = DeepSpeedHook(engine, CLIP) if hooked else None
            before = expert_parameters(engine)
            x = torch.randn(8, 7, generator=torch.Generator().manual_seed(dist.get_rank())) * 3
            precision = next(engine.module.parameters()).dtype
            loss = (engine(x.to(precision)).float() ** 2).mean()
            engine.backward(loss)
            engine.step()
            after = expert_parameters(engine)
            reports.append(
                (
                    float(engine.get_global_grad_norm() or math.nan),
                    norm_of({n: after[n] - before[n] for n in before}) / LR,
                )
            )
            if hook is not None:
                hook.remove()
        outcomes.append((*reports[0], *reports[1]))
    return outcomes


def expert_parameters(engine: Any) -> dict[str, Tensor]:
    mine = {}
    for name, p in engine.module.named_parameters():
        key = f"{name}@{dist.get_rank() % 2}" if "experts" in name else name
        mine[key] = p.detach().to(torch.float64, copy=True)
    return gathered(mine)


@pytest.mark.parametrize("world", [2, 4])
def test_experts_are_counted_once_each(engine_ranks, table, world):
    """All distinct parameters moved by the threshold together, so the norm was that of all of them."""
    cells = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (2, "bf16")]
    everybody = engine_ranks(world, run_experts, cells, timeout=90)
    for rank, outcomes in enumerate(everybody):
        for cell, (measured, update, alone, update_alone) in zip(cells, outcomes, strict=True):
            if rank == 0:
                table.append(
                    f"{world} ranks  4 experts, ep 2  ZeRO {cell[0]}  {cell[1]}  norm {measured:.6f} "
                    f"(alone {alone:.6f}), "
                    f"update/threshold {update / 0.1:.6f} (alone {update_alone / 0.1:.6f})"
                )
            assert update == pytest.approx(0.1, rel=1e-4 if cell[1] == "fp32" else 0.02), (rank, cell)
            assert measured == pytest.approx(everybody[0][0][0], rel=1e-5 if cell[1] == "fp32" else 0.02)


class Grid:
    """An `mpu`: pairs of neighbours share tensors, the others data."""

    def __init__(self) -> None:
        world = dist.get_world_size()
        tensor = [dist.new_group([i, i + 1]) for i in range(0, world, 2)]
        data = [dist.new_group(list(range(i, world, 2))) for i in range(2)]
        self.tensor, self.data = tensor[dist.get_rank() // 2], data[dist.get_rank() % 2]

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank() % 2

    def get_model_parallel_world_size(self) -> int:
        return 2

    def get_model_parallel_group(self) -> Any:
        return self.tensor

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank() // 2

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size() // 2

    def get_data_parallel_group(self) -> Any:
        return self.data


class SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class Cut(nn.Module):
    """LayerNorm on every tensor rank, then a column- and a row-parallel matrix."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        torch.manual_seed(3)
        column, row = torch.randn(6, 7) * 0.3, torch.randn(3, 6) * 0.3
        mine = slice(3 * grid.get_model_parallel_rank(), 3 * grid.get_model_parallel_rank() + 3)
        self.norm = nn.LayerNorm(7)
        self.column, self.row = nn.Parameter(column[mine].clone()), nn.Parameter(row[:, mine].clone())
        self.column.model_parallel = self.row.model_parallel = True
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = SumBackward.apply(self.norm(x), self.grid.tensor)
        return (
            SumForward.apply(torch.tanh(hidden @ self.column.t()) @ self.row.t(), self.grid.tensor)
            + self.bias
        )


def run_mpu(cells: list[tuple[int, bool]]) -> list[tuple[float, float, float]]:
    outcomes = []
    for stage, offload in cells:
        deepspeed = use_deepspeed()
        grid = Grid()
        model = Cut(grid)
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": stage}
            | ({"offload_optimizer": {"device": "cpu"}} if offload else {}),
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, mpu=grid, dist_init_required=False
        )
        hook = DeepSpeedHook(engine, CLIP)
        values = tensor_parameters(engine)
        data = [
            torch.randn(4, 7, generator=torch.Generator().manual_seed(i))
            for i in range(dist.get_world_size())
        ]
        engine.backward((engine(data[grid.get_data_parallel_rank()]) ** 2).mean())
        engine.step()
        after = tensor_parameters(engine)
        v = {name: value.clone().requires_grad_() for name, value in values.items()}
        column = torch.cat([v["column@0"], v["column@1"]])
        row = torch.cat([v["row@0"], v["row@1"]], dim=1)
        loss = 0.0
        for x in data[: grid.get_data_parallel_world_size()]:
            hidden = nn.functional.layer_norm(x.double(), (7,), v["norm.weight"], v["norm.bias"])
            out = torch.tanh(hidden @ column.t()) @ row.t() + v["bias"]
            loss = loss + (out**2).mean() / grid.get_data_parallel_world_size()
        exact = dict(zip(v, torch.autograd.grad(loss, list(v.values())), strict=True))
        coef = min(1.0, 0.1 / (norm_of(exact) + 1e-6))
        off = max(float((after[n] - values[n] + LR * coef * exact[n]).abs().max()) for n in values)
        outcomes.append((float(engine.get_global_grad_norm()), norm_of(exact), off))
        hook.remove()
    return outcomes


def tensor_parameters(engine: Any) -> dict[str, Tensor]:
    import deepspeed

    parameters = dict(engine.module.named_parameters())
    partitioned = list(parameters.values()) if engine.zero_optimization_stage() == 3 else []
    with deepspeed.zero.GatheredParameters(partitioned):
        rank = dist.get_rank() % 2
        mine = {
            f"{name}@{rank}" if name in ("column", "row") else name: p.detach().to(torch.float64, copy=True)
            for name, p in parameters.items()
        }
    return gathered(mine)


@pytest.mark.parametrize("world", [2, 4])
def test_tensor_parallelism_by_an_mpu(engine_ranks, table, world):
    cells = [(0, False), (1, False), (2, False), (2, True), (3, False)]
    for outcomes in engine_ranks(world, run_mpu, cells, timeout=90):
        for cell, (measured, exact, off) in zip(cells, outcomes, strict=True):
            assert measured == pytest.approx(exact, rel=1e-5), cell
            assert off < 1e-5, cell
    table += [
        f"{world} ranks  tensor parallel 2 by an mpu  ZeRO {s}  {'offload' if o else '-'}" for s, o in cells
    ]
