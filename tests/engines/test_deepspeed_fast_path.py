"""Engines' gradients are found by where they lie, after one careful reading."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from distnorm.hooks.deepspeed.hook import DeepSpeedHook
from distnorm.measure.flat_gradients import FlatFinder
from distnorm.measure.reading import GradientReader
from distnorm.sources.shards import FlatGradient
from tests.engines.rig import dense_gradients, make_engine, norm_of, parameters_of, run_step

ENGINES: dict[str, dict[str, Any]] = {
    "stage 0": {"stage": 0},
    "BF16_Optimizer": {
        "stage": 1,
        "dtype": "bf16",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": True, "immediate_grad_update": False},
    },
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 2, offload": {"stage": 2, "offload": True},
    "stage 3": {"stage": 3},
    "stage 3, offload": {"stage": 3, "offload": True},
}


def steps_of(name: str) -> list[tuple[float, float, int]]:
    """Of each step the norm, the true one, and how many readings were careful."""
    options = dict(ENGINES[name])
    dtype = options.get("dtype", "fp32")
    engine = make_engine(options.pop("stage"), **options)
    hook, steps = DeepSpeedHook(engine, {"clip": {"max_norm": 0.05}}), []
    with mock.patch.object(
        GradientReader, "read_with_care", autospec=True, side_effect=GradientReader.read_with_care
    ) as careful:
        for step in range(4):
            before, called = parameters_of(engine), careful.call_count
            exact, _ = dense_gradients(before, step, 1, dtype=dtype)
            run_step(engine, step, dtype=dtype)
            norm = float(hook.clipper.last.total_norm)
            steps.append((norm, norm_of(exact), careful.call_count - called))
    return steps


@pytest.mark.parametrize("name", ENGINES)
def test_after_one_careful_reading_gradients_are_found(engine_ranks, name):
    for steps in engine_ranks(2, steps_of, name, timeout=240):
        for norm, exact, _ in steps:
            assert norm == pytest.approx(exact, rel=2e-2 if name == "BF16_Optimizer" else 1e-5)
        assert [careful for *_, careful in steps] == [1, 0, 0, 0]


def test_what_is_a_copy_or_has_changed_its_form_is_not_found():
    flats = [torch.arange(10.0)]

    def finder(tensors: list[torch.Tensor]) -> FlatFinder:
        places = [FlatGradient("flat", lambda: flats[0], at) for at in (0, 4)]
        return FlatFinder(places, tensors)

    with pytest.raises(ValueError, match="copies"):
        finder([flats[0][:4].clone(), flats[0][4:]])
    with pytest.raises(ValueError, match="part"):
        finder([flats[0][:4], torch.zeros(7)])
    found = finder([flats[0][:4], flats[0][4:]])
    at = found(())
    assert at is not None and [t.tolist() for t in at.tensors()] == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9]]
    flats[0] = torch.arange(10.0) + 1  # moved
    moved = found(())
    assert moved is not None and moved.addresses.tolist() == [flats[0].data_ptr(), flats[0][4:].data_ptr()]
    for other in (torch.zeros(9), torch.zeros(10).double(), torch.zeros(20)[::2], None):
        flats[0] = other
        assert found(()) is None
