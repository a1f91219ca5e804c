"""Checkpoints: going on is the same as never having stopped, on any topology; and no checkpoint runs code."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, StorageMeta

from distnorm import RunError
from distnorm.trainer.checkpoint import _MetadataUnpickler
from tests.old_torch import VERSION

from .tiny import contents, rank_count, rows, shipped, trace, train

RTOL = 1e-9
EVERY_2 = "train.checkpoint.every=2"


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("four")
    train(shipped("single", folder, "train.steps=4"))
    return trace(folder)


def start(ranks: Callable[..., list[Any]], name: str, folder: Path, *overrides: str) -> list[Any]:
    config = shipped(name, folder, *overrides)
    return ranks(rank_count(config), train, config)


def test_resumed_run_has_the_bits_of_an_uninterrupted_one(four_steps: list[Any], tmp_path: Path) -> None:
    train(shipped("single", tmp_path, "train.steps=2", EVERY_2))
    _, printed = train(shipped("single", tmp_path, "train.steps=4", EVERY_2))
    assert "going on after step 2" in printed
    assert trace(tmp_path) == four_steps


@pytest.mark.parametrize("name", ["ddp4", "fsdp2_tp2", "pp2_tp2_sp", "fsdp1_hybrid2x2"])
@pytest.mark.slow
def test_resumed_run_equals_an_uninterrupted_one(
    name: str, ranks: Callable[..., list[Any]], four_steps: list[Any], tmp_path: Path
) -> None:
    start(ranks, name, tmp_path, "train.steps=2", EVERY_2)
    start(ranks, name, tmp_path, "train.steps=4", EVERY_2)
    for found, expected in zip(trace(tmp_path), four_steps, strict=True):
        assert found == pytest.approx(expected, rel=RTOL, abs=0)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("fsdp2_tp2", "pp2_tied"),
        ("pp2_tied", "single"),
        ("single", "fsdp2_tp2_sp"),
        ("ddp4", "tp2"),
        ("hsdp2x2", "pp2_fsdp2"),
        ("fsdp1_4", "fsdp2_tp2"),
        ("pp2_tied", "fsdp1_hybrid2x2"),
    ],
)
@pytest.mark.slow
def test_another_topology_goes_on(
    first: str, second: str, ranks: Callable[..., list[Any]], four_steps: list[Any], tmp_path: Path
) -> None:
    start(ranks, first, tmp_path / "a", "train.steps=2", EVERY_2)
    resume = f"train.checkpoint.resume_from={tmp_path / 'a'}"
    start(ranks, second, tmp_path / "b", "train.steps=4", resume)
    for found, expected in zip(trace(tmp_path / "b"), four_steps[2:], strict=True):
        assert found == pytest.approx(expected, rel=RTOL, abs=0)


def test_rows_after_the_checkpoint_are_written_once(four_steps: list[Any], tmp_path: Path) -> None:
    config = shipped("single", tmp_path, "train.steps=3", EVERY_2)
    train(config)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss"')  # what a killed process may leave
    train(shipped("single", tmp_path, "train.steps=4", EVERY_2))
    assert trace(tmp_path) == four_steps


def test_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    config = shipped("single", tmp_path, "train.steps=2", EVERY_2)
    train(config)
    before = contents(tmp_path)
    code, printed = train(config)
    assert (code, printed.splitlines()[-1]) == (0, str(tmp_path / "metrics.jsonl"))
    assert contents(tmp_path) == before


def test_resuming_without_a_checkpoint_starts_anew_and_keeps_the_rows(tmp_path: Path) -> None:
    config = shipped("single", tmp_path, "train.steps=2")
    train(config)
    before = trace(tmp_path)
    _, printed = train(config)
    assert f"the rows of the run that was there are kept in {tmp_path / 'earlier-1'}" in printed
    assert trace(tmp_path) == trace(tmp_path / "earlier-1") == before


@pytest.mark.parametrize(("checkpoints", "says"), [((EVERY_2,), "step-2"), ((), "it has no checkpoint")])
def test_the_same_run_again_asks_what_to_do(checkpoints: tuple[str], says: str, tmp_path: Path) -> None:
    config = shipped("single", tmp_path, "train.steps=3", *checkpoints)
    train(config, "refuse")
    before = contents(tmp_path)
    with pytest.raises(RunError, match=rf"--resume goes on from .*{says}.*--overwrite starts anew"):
        train(config, "refuse")
    assert contents(tmp_path) == before


def test_overwriting_keeps_the_rows(tmp_path: Path) -> None:
    old = shipped("single", tmp_path, "train.steps=3", EVERY_2)
    train(old, "refuse")
    before = contents(tmp_path)
    new = shipped("single", tmp_path, "train.steps=2", "train.seed=7")
    for _ in range(2):
        assert train(new, "overwrite")[0] == 0
    kept = contents(tmp_path)
    for name in ("metrics.jsonl", "config.yaml"):
        assert kept[f"earlier-1/{name}"] == before[name] != kept[name]
    assert len(rows(tmp_path / "earlier-2")) == len(rows(tmp_path)) == 2
    assert not (tmp_path / "checkpoints").exists()


def test_overwriting_that_was_killed_halfway_leaves_no_checkpoint_of_the_old_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(shipped("single", tmp_path, "train.steps=3", EVERY_2))
    monkeypatch.setattr(Path, "replace", lambda *_: 1 / 0)  # when it moves the first rows
    with pytest.raises(ZeroDivisionError):
        train(shipped("single", tmp_path, "train.steps=2"), "overwrite")
    monkeypatch.undo()
    assert not (tmp_path / "checkpoints").exists() and len(rows(tmp_path)) == 3


def test_overwriting_checkpoints_without_rows_removes_them(tmp_path: Path) -> None:
    train(shipped("single", tmp_path, "train.steps=2", EVERY_2))
    for file in tmp_path.glob("*.jsonl"):
        file.unlink()
    train(shipped("single", tmp_path, "train.steps=1"), "overwrite")
    assert not (tmp_path / "checkpoints").exists() and len(rows(tmp_path)) == 1


def test_a_run_that_ended_before_its_first_step_is_begun_again(tmp_path: Path) -> None:
    config = shipped("single", tmp_path, "train.steps=1")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    (tmp_path / "starts.jsonl").write_text('{"step": 0}\n')
    (tmp_path / "metrics.jsonl").write_text("")
    assert train(config, "refuse")[0] == 0
    assert len(rows(tmp_path)) == 1


def test_overwriting_what_is_resumed_from_is_refused(tmp_path: Path) -> None:
    train(shipped("single", tmp_path, "train.steps=2", EVERY_2))
    resume = f"train.checkpoint.resume_from={tmp_path / 'checkpoints' / 'step-2'}"
    with pytest.raises(RunError, match="--overwrite would remove"):
        train(shipped("single", tmp_path, "train.steps=4", resume), "overwrite")


def test_workers_that_torchrun_restarts_resume(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    train(shipped("single", tmp_path, "train.steps=2", EVERY_2))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    _, printed = train(shipped("single", tmp_path, "train.steps=3", EVERY_2), "overwrite")
    assert "going on after step 2" in printed


def test_unfinished_checkpoint_is_passed_over(tmp_path: Path) -> None:
    train(shipped("single", tmp_path, "train.steps=2", EVERY_2))
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(checkpoints / "step-2", checkpoints / "step-9.partial")
    shutil.copytree(checkpoints / "step-2", checkpoints / "step-8")
    (checkpoints / "step-8" / ".metadata").unlink()
    _, printed = train(shipped("single", tmp_path, "train.steps=3", EVERY_2))
    assert "going on after step 2" in printed
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_named_checkpoint_in_the_same_folder_comes_first(tmp_path: Path) -> None:
    train(shipped("single", tmp_path, "train.steps=4", EVERY_2))
    before = trace(tmp_path)
    resume = f"train.checkpoint.resume_from={tmp_path / 'checkpoints' / 'step-2'}"
    _, printed = train(shipped("single", tmp_path, "train.steps=4", resume))
    assert "going on after step 2" in printed
    assert trace(tmp_path) == before


def test_missing_checkpoint_is_refused(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    resume = f"train.checkpoint.resume_from={tmp_path / 'nowhere'}"
    failures = ranks(2, train, shipped("tp2", tmp_path / "run", resume), expect_errors=True)
    assert [failure.type_name for failure in failures] == ["RunError"] * 2
    assert all("nowhere" in failure.message for failure in failures)
    assert not (tmp_path / "run").exists()


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    train(shipped("single", tmp_path / "a", "train.steps=2", EVERY_2))
    resume = f"train.checkpoint.resume_from={tmp_path / 'a'}"
    with pytest.raises(RunError, match="expected dim 16, found 32"):
        train(shipped("single", tmp_path / "b", "train.model.dim=16", resume))
    assert not (tmp_path / "b").exists()


class Bomb:
    """Unpickled by plain pickle, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("file", [".metadata", "trainer.pt"])
def test_checkpoint_that_would_run_code_is_refused_on_every_rank(
    file: str, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    start(ranks, "tp2", tmp_path / "run", "train.steps=2", EVERY_2)
    mark = tmp_path / "exploded"
    target = tmp_path / "run" / "checkpoints" / "step-2" / file
    if file == "trainer.pt":
        torch.save({"step": 2, "clipper": Bomb(mark)}, target)
    else:
        target.write_bytes(pickle.dumps(Bomb(mark)))
    before = contents(tmp_path)
    config = shipped("tp2", tmp_path / "run", "train.steps=4", EVERY_2)
    failures = ranks(2, train, config, expect_errors=True)
    assert [failure.type_name for failure in failures] == ["RunError"] * 2
    assert all("step-2" in failure.message for failure in failures)
    assert not mark.exists()
    assert contents(tmp_path) == before


class Attribute:
    """Pickled as Python up to 3.11.3 pickles a member of an enum."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner, self.name)


def test_members_of_enums_are_read_as_each_python_writes_them() -> None:
    def read(written: object) -> object:
        return _MetadataUnpickler(io.BytesIO(pickle.dumps(written))).load()

    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    assert read(member) is member
    assert read(Attribute(_MEM_FORMAT_ENCODING, member.name)) is member
    with pytest.raises(pickle.UnpicklingError, match="no part of metadata"):
        read(Attribute(StorageMeta, "__init__"))


def test_object_in_the_place_of_a_tensor_is_refused(tmp_path: Path) -> None:
    """torch loads with plain pickle what the metadata calls bytes; so it may not call anything that."""
    train(shipped("single", tmp_path, "train.steps=2", EVERY_2))
    file = tmp_path / "checkpoints" / "step-2" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    name = "model.tok.weight"
    metadata.state_dict_metadata[name] = torch.distributed.checkpoint.metadata.BytesStorageMetadata()
    file.write_bytes(pickle.dumps(metadata))
    said = "BytesStorageMetadata" if VERSION >= (2, 13) else "expected to read it, found on rank 0"
    with pytest.raises(RunError, match=said):
        train(shipped("single", tmp_path, "train.steps=4", EVERY_2))
