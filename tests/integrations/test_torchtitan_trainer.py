"""torchtitan's whole Trainer with `attach_trainer`, against one process in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distnorm import testing
from distnorm.integrations.torchtitan import attach_trainer
from tests.integrations.titan_trainer import MAX_NORM, STEPS, WORLDS, built, oracle, trained

testing.preload("tests.integrations.titan_trainer")

TIMEOUT = 120.0
SKIP = {"clip": {"nonfinite": "skip"}}
HISTORY = {"clip": {"policy": {"name": "zclip", "warmup": 2}}, "monitor": {"every": 2}}
Run = tuple[list[dict[str, float]], dict[str, Tensor]]


def train(kind: str, folder: str, accumulations: tuple[int, ...]) -> list[Run]:
    runs = []
    for accumulation in accumulations:
        trainer = built(kind, folder, accumulation=accumulation)
        attach_trainer(trainer)
        weights = trained(trainer)
        runs.append((trainer.metrics_processor.logger.rows, weights))
    return runs


@pytest.mark.parametrize("kind", WORLDS)
def test_norm_update_and_log_are_those_of_one_process(ranks: Any, kind: str, tmp_path: Path) -> None:
    """With one micro-batch a step, and with two."""
    norms, expected = oracle()
    for runs in ranks(WORLDS[kind], train, kind, str(tmp_path), (1, 2), timeout=TIMEOUT):
        for rows, weights in runs:
            for row, norm in zip(rows, norms, strict=True):
                assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)
                assert row["grad_norm_clipped"] == pytest.approx(min(norm, MAX_NORM), rel=1e-5)
                assert row["clip_coef"] == pytest.approx(min(1.0, MAX_NORM / (norm + 1e-6)), rel=1e-5)
                assert (row["clip_threshold"], row["skipped"]) == (pytest.approx(MAX_NORM), 0)
            assert weights.keys() == expected.keys()
            for name, weight in expected.items():
                torch.testing.assert_close(weights[name].double(), weight, rtol=1e-5, atol=1e-5)


def test_the_oracle_is_clipped_in_some_steps() -> None:
    norms, _ = oracle()
    assert len(norms) == STEPS and max(norms) > MAX_NORM


def skip(kind: str, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    before, after = built(kind, folder, steps=1), built(kind, folder, steps=2)
    after.bad_step = 2
    for trainer in (before, after):
        attach_trainer(trainer, SKIP)
    weights = trained(before), trained(after)
    return *weights, [row["skipped"] for row in after.metrics_processor.logger.rows]


@pytest.mark.parametrize("kind", WORLDS)
def test_skip_leaves_parameters_bit_for_bit(ranks: Any, kind: str, tmp_path: Path) -> None:
    for before, after, skipped in ranks(WORLDS[kind], skip, kind, str(tmp_path), timeout=TIMEOUT):
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert skipped == [0, 1]


def resume(kind: str, folder: str) -> list[tuple[Any, dict[str, Tensor], int]]:
    """Of a run of four steps, and of one that goes on from its checkpoint of the second."""
    found = []
    for steps, part in ((4, "straight"), (2, "parts"), (4, "parts")):
        trainer = built(kind, f"{folder}/{part}", steps=steps, interval=2)
        clipper = attach_trainer(trainer, HISTORY).clipper
        weights = trained(trainer)
        found.append((clipper.state_dict(), weights, len(trainer.metrics_processor.logger.rows)))
    return found


@pytest.mark.parametrize("kind", WORLDS)
def test_its_checkpoint_restores_histories_and_weights_bit_for_bit(
    ranks: Any, kind: str, tmp_path: Path
) -> None:
    for straight, _, resumed in ranks(WORLDS[kind], resume, kind, str(tmp_path), timeout=TIMEOUT):
        assert (straight[0]["steps"], straight[2], resumed[2]) == (4, 4, 2)
        assert resumed[0] == straight[0]
        assert all(torch.equal(straight[1][name], resumed[1][name]) for name in straight[1])
