"""torchtitan's whole Trainer with `attach_trainer`, against one process in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from distnorm import testing
from distnorm.integrations.torchtitan import attach_trainer
from tests.integrations.tiny import check_trained, same
from tests.integrations.titan_trainer import MAX_NORM, STEPS, WORLDS, built, oracle, trained

testing.preload("tests.integrations.titan_trainer")

TIMEOUT = 300.0
HISTORY = {"clip": {"policy": {"name": "zclip", "warmup": 2}, "nonfinite": "skip"}, "monitor": {"every": 2}}
Run = tuple[list[dict[str, float]], dict[str, Tensor]]


def train(kind: str, folder: str, accumulations: tuple[int, ...]) -> list[Run]:
    runs = []
    for accumulation in accumulations:
        trainer = built(kind, folder, accumulation=accumulation)
        attach_trainer(trainer)
        weights = trained(trainer)
        runs.append((trainer.metrics_processor.logger.rows, weights))
    return runs


def interrupted(kind: str, folder: str) -> dict[str, Any]:
    """A run of four steps, the second infinite, and one that goes on from its checkpoint of the second."""
    found: dict[str, Any] = {}
    for part in ("straight", "resumed"):
        trainer = built(kind, folder, steps=4, interval=2, load=-1 if part == "straight" else 2)
        trainer.bad_step = 2
        clipper = attach_trainer(trainer, HISTORY).clipper
        weights = trained(trainer)
        found[part] = (clipper.state_dict(), weights, trainer.metrics_processor.logger.rows)
        if part == "straight":
            found["kept"] = trainer.kept
    return found


def everything(kind: str, folder: str) -> dict[str, Any]:
    """All that is asked of a kind: starting ranks costs more than their steps."""
    return {
        "trained": train(kind, f"{folder}/trained", (1, 2)),
        **interrupted(kind, f"{folder}/interrupted"),
    }


@pytest.mark.parametrize("kind", WORLDS)
def test_every_topology(ranks: Any, kind: str, tmp_path: Path) -> None:
    """Norm, update and log against one process, with one micro-batch a step and with two; and skip and
    resume, bit for bit."""
    for found in ranks(WORLDS[kind], everything, kind, str(tmp_path), timeout=TIMEOUT):
        for rows, weights in found["trained"]:
            check_trained(rows, weights, oracle(), max_norm=MAX_NORM)
        before, after = found["kept"]
        assert same(before, after)
        check_resumed(found["straight"], found["resumed"])


def check_resumed(straight: Any, resumed: Any) -> None:
    state, weights, rows = straight
    assert state["steps"] == 4
    assert [row["skipped"] for row in rows] == [0, 1, 0, 0]
    assert resumed[0] == state
    assert same(weights, resumed[1])
    assert [row["grad_norm"] for row in resumed[2]] == [row["grad_norm"] for row in rows[2:]]


def test_the_oracle_is_clipped_in_some_steps() -> None:
    norms, _ = oracle()
    assert len(norms) == STEPS and max(norms) > MAX_NORM
