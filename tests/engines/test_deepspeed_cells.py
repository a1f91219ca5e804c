"""Every cell of stage x dtype x offload: the norm and the update are the dense oracle's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from distnorm.hooks.deepspeed import DeepSpeedHook
from tests.engines.rig import (
    dense_gradients,
    fractions_of_allowed,
    make_engine,
    norm_of,
    parameters_of,
    roundings,
    run_step,
)

MAX_NORM = 0.1
DOC = (Path(__file__).parents[2] / "docs" / "deepspeed.md").read_text(encoding="utf-8")
FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}


Cell = tuple[str, bool, int, dict[str, Any]]
ACCUMULATION = {2: 1, 4: 3}
"""How many micro-batches a step has, by the number of ranks."""


def cells_of(stage: int, world: int) -> list[Cell]:
    """(dtype, offload, accumulation, what else is set); stage 0 offloads nothing, whatever is asked of it."""
    count = ACCUMULATION[world]
    cells: list[Cell] = [(d, off, count, {}) for d in ("fp32", "bf16", "fp16") for off in (False, True)]
    if stage == 0:
        others = ({"fused": True}, FP32_ACCUMULATION)
        more: list[Cell] = [(dtype, False, count, other) for dtype in ("bf16", "fp16") for other in others]
        return [cell for cell in cells if not cell[1]] + more
    more = [("bf16", offload, count, FP32_ACCUMULATION) for offload in (False, True)]
    if stage == 1:
        late = FP32_ACCUMULATION | {"bf16": {"enabled": True, "immediate_grad_update": False}}
        more.append(("bf16", False, count, late))
    return cells + more


def run_cell(
    stage: int, dtype: str, offload: bool, accumulation: int, others: dict[str, Any]
) -> dict[str, Any]:
    """Two steps; the errors as fractions of what is allowed, or why DeepSpeed forbids the cell."""
    try:
        engine = make_engine(stage, dtype, offload=offload, accumulation=accumulation, **others)
    except (ValueError, AssertionError, NotImplementedError, RuntimeError) as error:
        return {"forbidden": str(error).splitlines()[0]}
    hook = DeepSpeedHook(engine, {"clip": {"max_norm": MAX_NORM}})
    norm_error = update_error = 0.0
    for step in range(2):
        before = parameters_of(engine)
        # At stage 0 the engine's backward doesn't scale the loss, whatever the wrapper's scale is.
        scale = float(engine.optimizer.loss_scale) if stage and dtype == "fp16" else 1.0
        run_step(engine, step, dtype=dtype)
        exact, magnitude = dense_gradients(before, step, accumulation, dtype=dtype, loss_scale=scale)
        relative, absolute = roundings(dtype, dist.get_world_size(), accumulation, scale)
        result = hook.clipper.last.to_dict()
        assert float(engine.get_global_grad_norm()) == result["total_norm"]
        true_norm = norm_of(exact)
        coef = min(1.0, MAX_NORM / (true_norm + 1e-6))
        assert result["was_clipped"] and abs(result["clip_coef"] / coef - 1) < 0.05
        slack = {name: relative * m + absolute for name, m in magnitude.items()}
        after, measured = parameters_of(engine), result["total_norm"]
        errors = fractions_of_allowed(
            before, after, exact, slack, dtype=dtype, measured=measured, max_norm=MAX_NORM
        )
        norm_error, update_error = max(norm_error, errors[0]), max(update_error, errors[1])
    hook.remove()
    return {"wrapper": type(engine.optimizer).__name__, "norm": norm_error, "update": update_error}


def run_cells(stage: int) -> list[dict[str, Any]]:
    return [run_cell(stage, *cell) for cell in cells_of(stage, dist.get_world_size())]


def documented() -> dict[tuple[int, str, str, bool], str]:
    """What docs/deepspeed.md says of (stage, dtype, gradient's dtype, offload)."""
    table = DOC.split("<!-- cells:", 1)[1].split("\n\n", 2)[1]
    rows = [re.split(r" *\| *", line.strip("| ")) for line in table.splitlines()[2:]]
    return {
        (int(stage), dtype, gradient, offload): cell
        for stage, dtype, gradient, *pair in rows
        for offload, cell in zip((False, True), pair, strict=True)
    }


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_norm_and_update_are_the_dense_oracles(engine_ranks, table, world, stage):
    everybody = engine_ranks(world, run_cells, stage, timeout=240)
    found, cells = everybody[0], cells_of(stage, world)
    for (dtype, offload, accumulation, _), outcome in zip(cells, found, strict=True):
        cell = f"{world} ranks  stage {stage}  {dtype}  {'offload' if offload else '-':7}  x{accumulation}"
        if "forbidden" in outcome:
            table.append(f"{cell}  forbidden by DeepSpeed: {outcome['forbidden'][:90]}")
        else:
            table.append(
                f"{cell}  {outcome['wrapper']:29}  error/allowed: norm {outcome['norm']:.3f}, "
                f"update {outcome['update']:.3f}"
            )
    said: dict[tuple[int, str, str, bool], set[str]] = {}
    for (dtype, offload, _, others), outcome in zip(cells, found, strict=True):
        key = (stage, dtype, others.get("data_types", {}).get("grad_accum_dtype", dtype), offload)
        said.setdefault(key, set()).add("forbidden" if "forbidden" in outcome else outcome["wrapper"])
    for key, cell in documented().items():
        if key[0] == stage and cell != "-":
            names = {"SGD"} if cell == "the torch optimizer itself" else set(cell.split(", "))
            assert said.pop(key) == names, key
    assert not said
    for rank, outcomes in enumerate(everybody):
        for cell, outcome in zip(cells, outcomes, strict=True):
            assert outcome.get("norm", 0) <= 1 and outcome.get("update", 0) <= 1, (rank, stage, cell, outcome)
