"""Each trap first in DeepSpeed alone, so that the test can fail, and then under distnorm."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from distnorm import NonFiniteGradientError
from distnorm.hooks.deepspeed import DeepSpeedHook
from tests.engines.rig import (
    LR,
    WIDTH,
    counted_all_reduces,
    dense_gradients,
    make_engine,
    norm_of,
    parameters_of,
    run_step,
)

SKIP = {"clip": {"max_norm": 0.1, "nonfinite": "skip"}}
RAISE = {"clip": {"max_norm": 0.1, "nonfinite": "raise"}}
MEASURE = {"clip": {"nonfinite": "skip"}}


@dataclass
class Seen:
    """One step: what the engine reports, the truth, and how far the parameters went."""

    reported: float | None
    true_norm: float
    moved: dict[str, float]
    is_nan: bool
    scale: float
    raised: str = ""
    skipped: int = 0

    @property
    def update(self) -> float:
        """Norm of the update by the learning rate: that of the gradient as it was applied."""
        return math.sqrt(sum(m**2 for m in self.moved.values())) / LR


@dataclass
class Play:
    """An engine, a config or `None` for DeepSpeed alone, and steps as arguments of `run_step`."""

    stage: int
    dtype: str = "fp32"
    hook: dict[str, Any] | None = None
    steps: Sequence[dict[str, Any]] = ({},)
    engine: dict[str, Any] = field(default_factory=dict)


SPIKES = {"name": "skip_spikes", "above": 50.0}


def spikes_are_skipped(stage: int) -> list[Any]:
    engine = make_engine(stage)
    hook = DeepSpeedHook(engine, {"clip": {"max_norm": 0.1, "policy": SPIKES}})
    found = []
    for step, factor in enumerate((1.0, 1e4, 1.0)):
        before = parameters_of(engine)
        run_step(engine, step, factor=factor)
        assert hook.clipper.last is not None
        moved = any(not torch.equal(value, before[name]) for name, value in parameters_of(engine).items())
        found.append((bool(hook.clipper.last.skipped), moved, bool(hook.clipper.last.is_finite)))
    return found


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_spike_is_no_step(engine_ranks, stage):
    expected = [(False, True, True), (True, False, True), (False, True, True)]
    assert engine_ranks(2, spikes_are_skipped, stage, timeout=240) == [expected] * 2


def perform(plays: Sequence[Play]) -> list[list[Seen]]:
    return [perform_one(play) for play in plays]


def perform_one(play: Play) -> list[Seen]:
    engine = make_engine(play.stage, play.dtype, **play.engine)
    hook = None if play.hook is None else DeepSpeedHook(engine, play.hook)
    seen = []
    for step, how in enumerate(play.steps):
        before = parameters_of(engine)
        raised = ""
        try:
            run_step(engine, step, dtype=play.dtype, **how)
        except NonFiniteGradientError as error:
            raised = f"NonFiniteGradientError: {error}"
        except Exception as error:  # DeepSpeed alone
            raised = f"{type(error).__name__}: {error}"
        uses = how.get("uses_extra", (True,))
        exact, _ = dense_gradients(before, step, engine.gradient_accumulation_steps(), uses_extra=uses)
        after = parameters_of(engine)
        reported = engine.get_global_grad_norm()
        moved = {name: float((after[name] - old).norm()) for name, old in before.items()}
        seen.append(
            Seen(
                None if reported is None else float(reported),
                norm_of(exact) * how.get("factor", 1.0),
                moved,
                any(bool(p.isnan().any()) for p in after.values()),
                float(getattr(engine.optimizer, "loss_scale", None) or 1.0),
                raised,
                engine.skipped_steps,
            )
        )
    if hook is not None:
        hook.remove()
    return seen


def played(engine_ranks: Any, plays: Sequence[Play], world: int = 2) -> list[list[Seen]]:
    """What rank 0 saw; all ranks report the same bits."""
    everybody = engine_ranks(world, perform, list(plays), timeout=240)
    for others in everybody[1:]:
        for mine, theirs in zip(everybody[0], others, strict=True):
            assert [repr(s.reported) for s in mine] == [repr(s.reported) for s in theirs]
    return everybody[0]


def test_an_omitted_gradient_clipping_means_one(engine_ranks):
    steps = [{"factor": 20.0}]
    alone, measured, clipped, own_key = played(
        engine_ranks,
        [
            Play(2, steps=steps),
            Play(2, hook=MEASURE, steps=steps),
            Play(2, hook=SKIP, steps=steps),
            Play(2, hook=SKIP, steps=steps, engine={"gradient_clipping": 0.01}),
        ],
    )
    true_norm = alone[0].true_norm
    assert true_norm > 10
    assert alone[0].update == pytest.approx(1.0, rel=1e-4)  # nobody asked for clipping
    assert measured[0].update == pytest.approx(true_norm, rel=1e-4)
    assert clipped[0].update == pytest.approx(0.1, rel=1e-4)
    assert own_key[0].update == pytest.approx(0.1, rel=1e-4)


def test_stage_0_fp32_reports_none(engine_ranks):
    alone, hooked = played(engine_ranks, [Play(0), Play(0, hook=SKIP)])
    assert alone[0].reported is None
    assert hooked[0].reported == pytest.approx(hooked[0].true_norm, rel=1e-5)


def test_fp16_at_stage_0_divides_by_a_scale_that_backward_never_applied(engine_ranks):
    alone, hooked, measured = played(
        engine_ranks, [Play(0, "fp16"), Play(0, "fp16", hook=SKIP), Play(0, "fp16", hook=MEASURE)]
    )
    assert alone[0].update == pytest.approx(alone[0].true_norm / 256, rel=0.05)
    assert hooked[0].reported == pytest.approx(hooked[0].true_norm, rel=0.01)
    assert hooked[0].update == pytest.approx(0.1, rel=0.01)
    assert measured[0].update == pytest.approx(measured[0].true_norm, rel=0.01)


STALE = [{"uses_extra": (True,)}, {"uses_extra": (False,)}]
STALE_CELLS = [(3, False), (1, True), (2, True), (3, True)]


def test_a_stale_gradient_of_an_unused_parameter_counts_nothing_and_moves_nothing(engine_ranks):
    plays = [
        Play(stage, hook=hook, steps=STALE, engine={"offload": offload})
        for stage, offload in STALE_CELLS
        for hook in (None, SKIP)
    ]
    found = played(engine_ranks, plays)
    for cell, alone, hooked in zip(STALE_CELLS, found[::2], found[1::2], strict=True):
        assert alone[1].moved["extra.weight"] > 0, cell
        if cell == (3, False):  # with offload the norm is right, and what it is applied to is not
            assert abs(alone[1].reported / alone[1].true_norm - 1) > 0.01, cell
        assert hooked[1].reported == pytest.approx(hooked[1].true_norm, rel=1e-5), cell
        assert hooked[1].moved["extra.weight"] == 0, cell
        assert hooked[1].update == pytest.approx(0.1, rel=1e-4), cell


def test_a_parameter_used_late_in_a_window_does_not_add_to_its_stale_gradient(engine_ranks):
    steps = [{"uses_extra": (True, True)}, {"uses_extra": (False, True)}]
    plays = [
        Play(stage, hook=hook, steps=steps, engine={"offload": offload, "accumulation": 2})
        for stage, offload in STALE_CELLS
        for hook in (None, SKIP)
    ]
    found = played(engine_ranks, plays)
    wrong_alone = []
    for cell, alone, hooked in zip(STALE_CELLS, found[::2], found[1::2], strict=True):
        if abs(alone[1].reported / alone[1].true_norm - 1) > 1e-3:
            wrong_alone.append(cell)
        assert hooked[1].reported == pytest.approx(hooked[1].true_norm, rel=1e-5), cell
    assert wrong_alone == [(3, False), (2, True), (3, True)]


def test_the_loss_scale_is_that_of_backward_where_it_grows_in_the_step(engine_ranks):
    settings = {"fp16": {"loss_scale_window": 1}}
    plays = [
        Play(stage, "fp16", hook=hook, steps=[{"factor": 0.05}] * 3, engine=settings)
        for stage in (1, 2, 3)
        for hook in (None, MEASURE)
    ]
    found = played(engine_ranks, plays)
    for stage, alone, hooked in zip((1, 2, 3), found[::2], found[1::2], strict=True):
        assert hooked[1].scale == alone[1].scale == 512
        wrong = 0.5 * alone[1].true_norm
        assert alone[1].update == pytest.approx(wrong, rel=0.02), (stage, alone[1])
        assert stage < 3 or alone[1].reported == pytest.approx(wrong, rel=0.02)
        assert hooked[1].reported == pytest.approx(hooked[1].true_norm, rel=0.01)
        assert hooked[1].update == pytest.approx(hooked[1].true_norm, rel=0.02)


BROKEN = [{}, {"factor": math.nan, "factor_of": 1}, {}]
ALL = [(stage, dtype) for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16", "fp16")]


@pytest.mark.parametrize("offload", [False, True])
def test_a_nan_on_one_rank_is_seen_by_all_and_the_step_is_skipped(engine_ranks, offload):
    cells = [cell for cell in ALL if cell[0] or not offload]
    engine = {"offload": offload}
    plays = [Play(*cell, hook=hook, steps=BROKEN, engine=engine) for cell in cells for hook in (None, SKIP)]
    found = played(engine_ranks, plays)
    into_parameters = []
    for cell, alone, hooked in zip(cells, found[::2], found[1::2], strict=True):
        if alone[1].is_nan:
            into_parameters.append(cell)
        broken, after = hooked[1], hooked[2]
        assert not math.isfinite(broken.reported), cell
        assert not broken.raised and broken.skipped == 1 and not any(broken.moved.values()), cell
        assert after.reported == pytest.approx(after.true_norm, rel=0.02), cell
        assert after.update == pytest.approx(0.1, rel=0.02), cell
        if cell[1] == "fp16":
            assert (hooked[0].scale, broken.scale, after.scale) == (256, 128, 128), cell
    # Where DeepSpeed checks nothing, its parameters are lost.
    assert into_parameters == [cell for cell in cells if cell == (0, "fp32")]


def test_a_nan_that_deepspeed_is_told_not_to_look_for_is_seen(engine_ranks):
    engine = {"bf16": {"enabled": True, "check_grad_overflow": False}}
    plays = [Play(stage, "bf16", hook, BROKEN, engine) for stage in (1, 2) for hook in (None, SKIP)]
    found = played(engine_ranks, plays)
    for alone, hooked in zip(found[::2], found[1::2], strict=True):
        assert alone[1].is_nan
        assert not math.isfinite(hooked[1].reported) and not any(hooked[1].moved.values())
        assert hooked[2].update == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_raise_leaves_parameters_and_the_engine_goes_on(engine_ranks, value):
    steps = [{}, {"factor": value, "factor_of": 1}, {}]
    for cell, seen in zip(
        ALL, played(engine_ranks, [Play(*cell, hook=RAISE, steps=steps) for cell in ALL]), strict=True
    ):
        broken, after = seen[1], seen[2]
        assert broken.raised.startswith("NonFiniteGradientError"), (cell, broken)
        assert not any(broken.moved.values()) and not math.isfinite(broken.reported), cell
        assert after.update == pytest.approx(0.1, rel=0.02) and not after.raised, (cell, after)


def test_a_zero_gradient_is_a_plain_zero(engine_ranks):
    cells = [*ALL, (1, "BF16_Optimizer")]
    for cell, (seen,) in zip(cells, played(engine_ranks, [zero_play(*cell) for cell in cells]), strict=True):
        assert seen.reported == 0 and not seen.raised and not seen.skipped, (cell, seen)
        assert not any(seen.moved.values()), cell


def zero_play(stage: int, dtype: str) -> Play:
    engine = {"data_types": {"grad_accum_dtype": "fp32"}} if dtype == "BF16_Optimizer" else {}
    return Play(stage, dtype if dtype in ("fp32", "fp16") else "bf16", RAISE, [{"factor": 0.0}], engine)


def count_collectives(stage: int, dtype: str, hooked: bool) -> int:
    engine = make_engine(stage, dtype)
    if hooked:
        DeepSpeedHook(engine, SKIP)
    run_step(engine, 0, dtype=dtype)  # the first step of all may plan
    before = engine.step
    counts = []

    def counted_step() -> None:
        with counted_all_reduces() as found:
            before()
        counts.append(len(found))

    engine.step = counted_step
    run_step(engine, 1, dtype=dtype)
    return counts[0]


def count_all(cells: Sequence[tuple[int, str]]) -> list[tuple[int, int]]:
    return [(count_collectives(*cell, False), count_collectives(*cell, True)) for cell in cells]


def test_one_all_reduce_for_the_norm_of_three_groups(engine_ranks, table):
    cells = [(stage, dtype) for stage in (1, 2, 3) for dtype in ("fp32", "fp16")]
    for cell, (alone, hooked) in zip(cells, engine_ranks(2, count_all, cells, timeout=240)[0], strict=True):
        table.append(
            f"stage {cell[0]}  {cell[1]}  all-reduces in a step of three groups: {alone} -> {hooked}"
        )
        assert alone >= 3 and hooked == 1, cell


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def attributes(engine: Any) -> list[dict[str, Any]]:
    held = [engine, engine.optimizer, getattr(engine.optimizer, "overflow_checker", engine.optimizer)]
    return [dict(vars(one)) for one in held]


def remove_and_compare(cells: Sequence[tuple[int, str]]) -> list[Any]:
    outcomes = []
    for stage, dtype in cells:
        engine = make_engine(stage, dtype, gradient_clipping=0.5)
        lines = Lines()
        logging.getLogger("distnorm").addHandler(lines)
        before = attributes(engine)
        hook = DeepSpeedHook(engine, SKIP)
        during = attributes(engine)
        hook.remove()
        after = attributes(engine)
        hook.remove()
        logging.getLogger("distnorm").removeHandler(lines)
        same = [
            list(b) == list(a) and all(a[key] is b[key] or key == "_is_full" for key in b)
            for b, a in zip(before, after, strict=True)
        ]
        start = parameters_of(engine)
        run_step(engine, 0, dtype=dtype, factor=20.0)
        now = parameters_of(engine)
        moved = norm_of({name: now[name] - start[name] for name in now}) / LR
        outcomes.append((all(same), during != before, lines.lines, moved))
    return outcomes


def test_remove_restores_every_attribute_and_the_notice_names_the_key(engine_ranks):
    everybody = engine_ranks(2, remove_and_compare, ALL, timeout=240)
    for cell, (same, differed, lines, moved) in zip(ALL, everybody[0], strict=True):
        assert same and differed, cell
        assert len(lines) == 1 and "gradient_clipping = 0.5" in lines[0], (cell, lines)
        if cell != (0, "fp16"):
            assert moved == pytest.approx(0.5, rel=0.02), cell  # DeepSpeed's own clipping is back


def test_every_mode_of_a_finite_step_leaves_an_unclipped_gradient_alone(engine_ranks):
    modes = ("raise", "skip", "zero", "propagate")
    plays = [
        Play(stage, hook={"clip": {"max_norm": 1e3, "nonfinite": m}}) for stage in range(4) for m in modes
    ]
    for (seen,) in played(engine_ranks, plays):
        assert seen.update == pytest.approx(seen.true_norm, rel=1e-4)


def test_zero_and_propagate_do_as_they_say_where_no_loss_scale_asks_for_a_skip(engine_ranks):
    cells = [(stage, dtype) for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16")]
    plays = [
        Play(*cell, hook={"clip": {"max_norm": 0.1, "nonfinite": mode}}, steps=BROKEN[1:2])
        for cell in cells
        for mode in ("zero", "propagate")
    ]
    found = played(engine_ranks, plays)
    for cell, zeroed, propagated in zip(cells, found[::2], found[1::2], strict=True):
        assert not any(zeroed[0].moved.values()) and zeroed[0].skipped == 0, cell
        assert propagated[0].is_nan and propagated[0].skipped == 0, cell


def norms_under_a_default_device(stage: int) -> list[float]:
    engine = make_engine(stage)
    with torch.device("meta"):
        hook = DeepSpeedHook(engine, SKIP)
    run_step(engine, 0)
    assert hook.clipper.last is not None
    plain = make_engine(stage)
    plain_hook = DeepSpeedHook(plain, SKIP)
    run_step(plain, 0)
    assert plain_hook.clipper.last is not None
    return [float(each.clipper.last.total_norm) for each in (hook, plain_hook)]


@pytest.mark.parametrize("stage", [0, 3])
def test_a_default_device_does_not_reach_the_hooks_own_tensors(engine_ranks, stage):
    (under, without), _ = engine_ranks(2, norms_under_a_default_device, stage)
    assert under == without > 0


def update_of_shared_memory() -> tuple[float, float]:
    """How far two parameters go whose gradients are one tensor, by the learning rate; and what is right."""
    engine = make_engine(0)
    hook = DeepSpeedHook(engine, SKIP)
    engine.backward(engine(torch.ones(2, WIDTH)).square().sum())
    net = engine.module
    net.extra.bias.grad = net.outer.bias.grad
    gradient, before = net.outer.bias.grad.clone(), net.outer.bias.detach().clone()
    engine.step()
    assert hook.clipper.last is not None and hook.clipper.last.was_clipped
    moved = float((before - net.outer.bias.detach()).norm()) / LR
    return moved, float(hook.clipper.last.clip_coef * gradient.norm())


def test_gradients_that_share_memory_are_clipped_once(engine_ranks):
    for moved, right in engine_ranks(2, update_of_shared_memory):
        assert moved == pytest.approx(right, rel=1e-4)
