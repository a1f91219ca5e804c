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
from tests.engines.rig import (
    DTYPES,
    LR,
    fractions_of_allowed,
    make_engine,
    norm_of,
    roundings,
    use_deepspeed,
)

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


def dense_pipeline(
    values: dict[str, Tensor], step: int, micros: int, data_world: int, dtype: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean gradient and the mean of its summands' magnitudes, as `rig.dense_gradients` has them.

    The tied weight has two summands of each micro-batch, one of either stage.
    """
    precision = torch.float64 if dtype == "fp32" else DTYPES[dtype]
    tied = "tied_modules.word.weight"
    total = {name: torch.zeros_like(value) for name, value in values.items()}
    magnitude = {name: torch.zeros_like(value) for name, value in values.items()}
    for data_rank in range(data_world):
        for micro in range(micros):
            v = {name: value.to(precision, copy=True).requires_grad_() for name, value in values.items()}
            last = values[tied].to(precision, copy=True).requires_grad_()
            ids, labels = words(step, micro, data_rank)
            hidden = nn.functional.embedding(ids, v[tied]) + v["bias0"]
            hidden = nn.functional.linear(hidden, v["1.weight"], v["1.bias"])
            hidden = nn.functional.linear(hidden, v["2.weight"], v["2.bias"])
            logits = torch.tanh(hidden) @ last.t() + 0 * v["bias1"]
            wide = logits if dtype == "fp32" else logits.float()
            (nn.functional.cross_entropy(wide, labels) / micros).backward()
            for name, leaf in [*v.items(), (tied, last)]:
                summand = leaf.grad.double() / data_world
                total[name] += summand
                magnitude[name] += summand.abs()
    return total, magnitude


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
        exact, magnitude = dense_pipeline(before, step, micros, data_world, dtype)
        relative, absolute = roundings(dtype, dist.get_world_size(), micros, 1.0)
        slack = {name: relative * m + absolute for name, m in magnitude.items()}
        measured = hook.clipper.last.total_norm.item()
        errors = fractions_of_allowed(
            before, after, exact, slack, dtype=dtype, measured=measured, max_norm=0.1
        )
        facts["steps"].append((measured, float(engine.get_global_grad_norm()), *errors))
    hook.remove()
    return facts


@pytest.mark.parametrize(
    ("world", "stage", "dtype"),
    [(2, 0, "fp32"), (4, 0, "fp32"), (4, 1, "fp32"), (4, 1, "bf16"), (4, 0, "bf16")],
)
def test_a_pipeline_with_tied_layers(engine_ranks, table, world, stage, dtype):
    for facts in engine_ranks(world, run_pipeline, stage, dtype, 3, timeout=180):
        for measured, reported, norm_error, update_error in facts["steps"]:
            assert reported == measured
            assert norm_error <= 1 and update_error <= 1, facts
    table.append(
        f"{world} ranks  pipeline of 2 stages, tied  ZeRO {stage}  {dtype}  {facts['wrapper']}  "
        f"error/allowed: norm {norm_error:.3f}, update {update_error:.3f}"
    )


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
    for seen in engine_ranks(4, run_broken_pipeline, stage, dtype, timeout=180):
        assert not seen[0][0] and "found nan" in seen[1][0] and not seen[2][0]
        assert math.isnan(seen[1][1]) and seen[1][2] == 0
        assert seen[2][2] == pytest.approx(0.1, rel=1e-4 if dtype == "fp32" else 0.05)


EXPERTS = "moe.deepspeed_moe.experts.deepspeed_experts"


def expert_batch(rank: int) -> Tensor:
    return torch.randn(8, 7, generator=torch.Generator().manual_seed(rank)) * 3


def dense_experts(values: dict[str, Tensor], dtype: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One process with all four experts: each row goes to the one that its gate likes best."""
    precision = torch.float64 if dtype == "fp32" else DTYPES[dtype]
    wide = torch.float64 if dtype == "fp32" else torch.float32  # of the gate
    world = dist.get_world_size()
    total = {name: torch.zeros_like(value) for name, value in values.items()}
    magnitude = {name: torch.zeros_like(value) for name, value in values.items()}
    for rank in range(world):
        v = {name: value.to(precision, copy=True).requires_grad_() for name, value in values.items()}
        x = expert_batch(rank).to(precision)
        odds = torch.softmax(x.to(wide) @ v["moe.deepspeed_moe.gate.wg.weight"].to(wide).t(), -1)
        rows = []
        for row, odd in zip(x, odds, strict=True):
            best = int(odd.argmax())
            names = (f"{EXPERTS}.{best % 2}.{part}@{best // 2}" for part in PARTS)
            up, up_bias, down, down_bias = (v[name] for name in names)
            hidden = torch.tanh(nn.functional.linear(row, up, up_bias))
            rows.append(odd[best].to(precision) * nn.functional.linear(hidden, down, down_bias))
        out = nn.functional.linear(torch.stack(rows), v["out.weight"], v["out.bias"])
        ((out if dtype == "fp32" else out.float()) ** 2).mean().backward()
        for name, leaf in v.items():
            if leaf.grad is not None:
                total[name] += leaf.grad.double() / world
                magnitude[name] += leaf.grad.double().abs() / world
    return total, magnitude


PARTS = ("0.weight", "0.bias", "2.weight", "2.bias")


def expert_model() -> nn.Module:
    from deepspeed.moe.layer import MoE

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            expert = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 7))
            self.moe = MoE(7, expert, num_experts=4, ep_size=2, k=1, use_rts=False, drop_tokens=False)
            self.out = nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.moe(x)[0])

    model = Sparse()
    for name, p in model.named_parameters():
        seed = sum(name.encode()) + (dist.get_rank() % 2) * 1000 * ("experts" in name)
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * 0.3
    return model


def run_experts(cells: list[tuple[int, str]]) -> list[tuple[float, float, float, float]]:
    """Errors of norm and update by what is allowed; the norm, and the one that DeepSpeed alone reports."""
    use_deepspeed()
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    outcomes = []
    for stage, dtype in cells:
        norms = []
        for hooked in (False, True):
            model = expert_model()
            groups = split({"params": list(model.parameters()), "name": "all"})
            engine = make_engine(stage, dtype, model=model, groups=groups, gradient_clipping=0.1)
            hook = DeepSpeedHook(engine, CLIP) if hooked else None
            before = expert_parameters(engine)
            x = expert_batch(dist.get_rank()).to(next(engine.module.parameters()).dtype)
            engine.backward((engine(x).float() ** 2).mean())
            engine.step()
            norms.append(float(engine.get_global_grad_norm() or math.nan))
        after = expert_parameters(engine)
        exact, magnitude = dense_experts(before, dtype)
        relative, absolute = roundings(dtype, dist.get_world_size(), 1, 1.0)
        slack = {name: relative * m + absolute for name, m in magnitude.items()}
        errors = fractions_of_allowed(
            before, after, exact, slack, dtype=dtype, measured=norms[1], max_norm=0.1
        )
        outcomes.append((*errors, norms[1], norms[0]))
        assert hook is not None
        hook.remove()
    return outcomes


def expert_parameters(engine: Any) -> dict[str, Tensor]:
    mine = {}
    for name, p in engine.module.named_parameters():
        key = f"{name}@{dist.get_rank() % 2}" if "experts" in name else name
        mine[key] = p.detach().to(torch.float64, copy=True)
    return gathered(mine)


@pytest.mark.parametrize("world", [2, 4])
def test_experts_are_counted_once_each(engine_ranks, table, world):
    cells = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (2, "bf16")]
    everybody = engine_ranks(world, run_experts, cells, timeout=180)
    for (stage, dtype), (norm_error, update_error, norm, alone) in zip(cells, everybody[0], strict=True):
        table.append(
            f"{world} ranks  4 experts, ep 2  ZeRO {stage}  {dtype}  norm {norm:.6f} (alone {alone:.6f})  "
            f"error/allowed: norm {norm_error:.3f}, update {update_error:.3f}"
        )
    for rank, outcomes in enumerate(everybody):
        for cell, (norm_error, update_error, *_) in zip(cells, outcomes, strict=True):
            assert norm_error <= 1 and update_error <= 1, (rank, cell)


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
    for outcomes in engine_ranks(world, run_mpu, cells, timeout=180):
        for cell, (measured, exact, off) in zip(cells, outcomes, strict=True):
            assert measured == pytest.approx(exact, rel=1e-5), cell
            assert off < 1e-5, cell
    table += [
        f"{world} ranks  tensor parallel 2 by an mpu  ZeRO {s}  {'offload' if o else '-'}" for s, o in cells
    ]
