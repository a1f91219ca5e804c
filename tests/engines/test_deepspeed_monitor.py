"""What the monitor and a checkpoint get of an engine's steps: all of them, without the loss scale."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distnorm import NonFiniteGradientError
from distnorm.hooks.deepspeed import DeepSpeedHook
from tests.engines.rig import DTYPES, dense_gradients, make_engine, parameters_of, roundings, run_step

NAN = {"factor": math.nan, "factor_of": 1}
CELLS = [(0, "fp32"), (0, "fp16"), (1, "fp16"), (2, "bf16"), (3, "fp32"), (3, "fp16")]
Cells = Sequence[tuple[int, str]]


def rows(folder: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


def make_hook(engine: Any, folder: Path | None = None, stop_after: int | None = None, **clip: Any) -> Any:
    monitor = {} if folder is None else {"every": 1, "dir": str(folder), "stop_after": stop_after}
    return DeepSpeedHook(engine, {"clip": {"max_norm": 0.1, **clip}, "monitor": monitor})


def layer_errors(cells: Cells, folder: Path) -> list[dict[str, float]]:
    """Of two steps' layer rows against one process, as fractions of what roundings of the dtype allow."""
    return [layer_errors_of(stage, dtype, folder / f"{stage}-{dtype}") for stage, dtype in cells]


def layer_errors_of(stage: int, dtype: str, folder: Path) -> dict[str, float]:
    engine = make_engine(stage, dtype)
    hook, expected = make_hook(engine, folder), {}
    for step in range(2):
        before = parameters_of(engine)
        scale = float(engine.optimizer.loss_scale) if stage and dtype == "fp16" else 1.0
        run_step(engine, step, dtype=dtype)
        exact, magnitudes = dense_gradients(before, step, 1, dtype=dtype, loss_scale=scale)
        relative, absolute = roundings(dtype, dist.get_world_size(), 1, scale)
        for name, gradient in exact.items():
            slack = relative * magnitudes[name] + absolute
            expected[step + 1, name] = (gradient, slack + 1e-5 * gradient.abs(), before[name])
    hook.clipper.flush()
    hook.remove()
    if dist.get_rank():
        return {}
    eps, errors = torch.finfo(DTYPES[dtype]).eps, {"norm": 0.0, "max": 0.0, "ratio": 0.0}
    found = {(row["step"], row["layer"]): row for row in rows(folder, "layers.jsonl")}
    assert found.keys() == expected.keys()
    for key, row in found.items():
        gradient, slack, weight = expected[key]
        norm, allowed, of_weight = float(gradient.norm()), float(slack.norm()), float(weight.norm())
        ratio = allowed / of_weight + eps * norm / of_weight
        errors["norm"] = max(errors["norm"], abs(row["norm"] - norm) / allowed)
        errors["max"] = max(errors["max"], abs(row["max"] - float(gradient.abs().max())) / float(slack.max()))
        errors["ratio"] = max(errors["ratio"], abs(row["grad_to_weight"] - norm / of_weight) / ratio)
    return errors


def test_layer_rows_are_the_dense_oracles_whatever_the_loss_scale(engine_ranks, tmp_path):
    for cell, errors in zip(
        CELLS, engine_ranks(2, layer_errors, CELLS, tmp_path, timeout=240)[0], strict=True
    ):
        assert errors and max(errors.values()) <= 1, (cell, errors)


def stopped(cells: Cells, folder: Path, nonfinite: str) -> list[list[Any]]:
    """For each cell what each step raises, whether it moves parameters, and how many steps count."""
    found = []
    for stage, dtype in cells:
        engine = make_engine(stage, dtype)
        hook = make_hook(engine, folder / f"{stage}-{dtype}", 2, nonfinite=nonfinite)
        seen = []
        for step, how in enumerate(({}, NAN, NAN, {})):
            before, raised = parameters_of(engine), ""
            try:
                run_step(engine, step, dtype=dtype, **how)
            except NonFiniteGradientError as error:
                raised = str(error)
            moved = any(not torch.equal(value, before[name]) for name, value in parameters_of(engine).items())
            seen.append((raised, moved, hook.clipper.state_dict()["steps"], engine.skipped_steps))
        hook.clipper.flush()
        hook.remove()
        found.append(seen)
    return found


def test_stop_after_raises_when_the_engine_has_put_the_step_behind_it(engine_ranks, tmp_path):
    everybody = engine_ranks(2, stopped, CELLS, tmp_path, "skip", timeout=240)
    assert everybody[0] == everybody[1]
    for (stage, dtype), seen in zip(CELLS, everybody[0], strict=True):
        assert [(moved, count, skipped) for _, moved, count, skipped in seen] == [
            (True, 1, 0),
            (False, 2, 1),
            (False, 3, 2),
            (True, 4, 2),
        ], (stage, dtype)
        assert [raised[:18] for raised, *_ in seen] == ["", "", "monitor.stop_after", ""], (stage, dtype)
        written = rows(tmp_path / f"{stage}-{dtype}")
        assert [(row["step"], row["finite"]) for row in written] == [
            (1, True),
            (2, False),
            (3, False),
            (4, True),
        ], (stage, dtype)
        alerts = rows(tmp_path / f"{stage}-{dtype}", "alerts.jsonl")
        assert [alert["step"] for alert in alerts if alert["kind"] == "non_finite"] == [2], (stage, dtype)


def test_a_step_that_raises_is_an_alert_that_names_a_parameter_and_the_next_step_has_its_row(
    engine_ranks, tmp_path
):
    everybody = engine_ranks(2, stopped, CELLS, tmp_path, "raise", timeout=240)
    for (stage, dtype), seen in zip(CELLS, everybody[0], strict=True):
        assert [(moved, count, skipped) for _, moved, count, skipped in seen] == [
            (True, 1, 0),
            (False, 2, 1),
            (False, 3, 2),
            (True, 4, 2),
        ], (stage, dtype)
        assert [raised[:22] for raised, *_ in seen] == ["", *["expected a finite tota"] * 2, ""]
        written = rows(tmp_path / f"{stage}-{dtype}")
        assert [(row["step"], row["finite"]) for row in written] == [(1, True), (4, True)], (stage, dtype)
        (alert,) = rows(tmp_path / f"{stage}-{dtype}", "alerts.jsonl")
        assert (alert["step"], alert["kind"]) == (2, "non_finite") and "inner" in alert["message"]


POLICIES: Sequence[dict[str, Any]] = (
    {"policy": {"name": "percentile", "p": 50.0, "window": 4}, "max_norm": None},
    {"policy": {"name": "zclip", "warmup": 2}},
    {"policy": {"name": "skip_spikes", "on": "loss", "after": 2, "window": 4}},
)


def results(engine: Any, hook: Any, steps: Sequence[int], dtype: str) -> list[dict[str, Any]]:
    found = []
    for step in steps:
        hook.clipper.note(loss=1.0 / (1 + step))
        run_step(engine, step, dtype=dtype, factor=math.nan if step == 2 else 1.0)
        found.append(hook.clipper.last.to_dict())
    return found


def resumed(cells: Cells) -> list[bool]:
    """Whether an engine's steps are the same where another hook goes on from the first one's state."""
    same = []
    for stage, dtype in cells:
        for clip in POLICIES:
            through, cut = (make_engine(stage, dtype) for _ in range(2))
            whole = results(through, make_hook(through, nonfinite="skip", **clip), range(6), dtype)
            hook = make_hook(cut, nonfinite="skip", **clip)
            parts = results(cut, hook, range(4), dtype)
            state = json.loads(json.dumps(hook.clipper.state_dict()))
            hook.remove()
            hook = make_hook(cut, nonfinite="skip", **clip)
            hook.clipper.load_state_dict(state)
            parts += results(cut, hook, range(4, 6), dtype)
            same.append(repr(parts) == repr(whole) and hook.clipper.state_dict()["steps"] == 6)
    return same


def test_a_hook_goes_on_from_the_state_of_another(engine_ranks):
    cells = [(0, "fp32"), (2, "fp16"), (3, "bf16")]
    assert engine_ranks(2, resumed, cells, timeout=180) == [[True] * 9] * 2


def raised_with_a_loss(stage: int) -> list[Any]:
    engine = make_engine(stage)
    hook = make_hook(engine, policy={"name": "skip_spikes", "on": "loss", "after": 2, "above": 5.0})
    found = []
    for step, loss in enumerate((1.0, 1.0, 1.0, 9.0, 1.0)):
        hook.clipper.note(loss=loss)
        try:
            run_step(engine, step, **(NAN if step == 1 else {}))
        except NonFiniteGradientError:
            found.append("raised")
            continue
        found.append(bool(hook.clipper.last.skipped))
    return found


@pytest.mark.parametrize("stage", [0, 2])
def test_a_loss_is_of_its_own_step_where_that_raises(engine_ranks, stage):
    assert engine_ranks(2, raised_with_a_loss, stage) == [[False, "raised", False, True, False]] * 2
