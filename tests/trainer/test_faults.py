"""Faults that benchmarks/faults.py showed to be passed over, or to be told badly."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distnorm import RunError
from distnorm.trainer.run import _check_stops
from distnorm.trainer.rundir import write_config
from distnorm.trainer.world import World

from .tiny import contents, rows, shipped, train


def train_with_own_seed(folder: Path) -> None:
    train(shipped("tp2", folder, f"train.seed={7 * dist.get_rank()}"))


def test_another_seed_on_a_rank_is_refused_by_all(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    failures = ranks(2, train_with_own_seed, tmp_path / "run", expect_errors=True)
    said = "train.seed: expected the same on every rank, found 0 on rank 0; 7 on rank 1"
    assert [(failure.type_name, failure.message) for failure in failures] == [("RunError", said)] * 2
    assert not (tmp_path / "run").exists()


def test_where_files_are_may_differ(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    ranks(2, train_into_own_folder, tmp_path)
    assert len(rows(tmp_path / "0")) == 1 and not (tmp_path / "1").exists()


def train_into_own_folder(folder: Path) -> None:
    train(shipped("tp2", folder / str(dist.get_rank()), "train.steps=1"))


def test_a_checkpoint_that_has_no_room_says_so_and_leaves_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunError, match=r"No space left on device.*; [\d,]+ bytes are free there"):
        train(shipped("single", tmp_path, "train.steps=2", "train.checkpoint.every=1"))
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_process_killed_as_it_writes_the_config_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = shipped("single", tmp_path / "run", "train.steps=1")
    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_config(config)
    assert list(contents(tmp_path / "run")) == ["config.yaml.partial"]
    assert train(config)[0] == 0  # what is there is no reason to refuse the folder
    before = contents(tmp_path / "run")["config.yaml"]
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_config(shipped("single", tmp_path / "run", "train.steps=2"))
    assert contents(tmp_path / "run")["config.yaml"] == before


def test_a_row_that_met_another_reduction_is_no_signal_to_stop() -> None:
    world = World(0, 3, torch.device("cpu"))
    for stops in (0.0, 1.0, 3.0):
        _check_stops(stops, world, 4)
    for stops in (0.37, 4.0, -1.0, float("nan")):
        with pytest.raises(RunError, match=r"step 4's row: .* left out clip\(\), or called it twice"):
            _check_stops(stops, world, 4)
