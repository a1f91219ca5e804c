"""What the trainer refuses: on every rank, in bounded time, with nothing overwritten."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from distnorm import Config, RunError
from distnorm.trainer import rundir

from .tiny import contents, shipped, train


def refusals(ranks: Callable[..., list[Any]], count: int, config: Config) -> list[str]:
    failures = ranks(count, train, config, expect_errors=True, timeout=30)
    assert [failure.type_name for failure in failures] == ["RunError"] * count
    return [failure.message for failure in failures]


@pytest.mark.parametrize(("name", "count"), [("fsdp2_tp2", 2), ("single", 2), ("tp2", 3)])
def test_degrees_that_do_not_fit_the_world(
    name: str, count: int, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    for message in refusals(ranks, count, shipped(name, tmp_path / "run")):
        assert f"found {count}" in message
        assert "dp_shard" in message
    assert not (tmp_path / "run").exists()


def test_degrees_without_torchrun(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"expected 4 ranks .* found 1; start it with torchrun --nproc-per-node 4"
    ):
        train(shipped("fsdp2_tp2", tmp_path / "run"))


def test_run_folder_with_another_config(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    ranks(2, train, shipped("tp2", tmp_path))
    before = contents(tmp_path)
    config = shipped("tp2", tmp_path, "clip.max_norm=0.125", "train.seed=7")
    for message in refusals(ranks, 2, config):
        assert "clip.max_norm is 0.125 here and 0.25 there" in message
        assert "train.seed is 7 here and 0 there" in message
    assert contents(tmp_path) == before


def test_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="found other files"):
        train(shipped("single", tmp_path))
    assert list(contents(tmp_path)) == ["thesis.txt"]


def test_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    file = tmp_path / "run"
    file.write_text("x")
    with pytest.raises(RunError, match="found a file"):
        train(shipped("single", file))


def test_unreadable_text(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    config = shipped("tp2", tmp_path / "run", f"train.data.path={tmp_path / 'no such text'}")
    for message in refusals(ranks, 2, config):
        assert message.startswith("train.data.path: expected a readable file or folder")
        assert "no such text" in message
    assert not (tmp_path / "run").exists()


def test_text_shorter_than_a_sequence(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("short")
    with pytest.raises(RunError, match=r"more than train.model.context = 16 bytes of text, found 5"):
        train(shipped("single", tmp_path / "run", f"train.data.path={text}"))


def train_with_a_text_of_ones_own(config: Config, texts: list[str]) -> tuple[int, str]:
    rank = dist.get_rank()
    data = config.train.data.model_copy(update={"path": texts[rank]})
    return train(config.model_copy(update={"train": config.train.model_copy(update={"data": data})}))


@pytest.mark.parametrize(
    ("content", "expected"), [(None, "rank 1: train.data.path"), ("b" * 99, "same text")]
)
def test_text_that_differs_on_one_rank(
    content: str | None, expected: str, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    texts = [str(tmp_path / "0"), str(tmp_path / "1")]
    Path(texts[0]).write_text("a" * 99)
    if content is not None:
        Path(texts[1]).write_text(content)
    config = shipped("tp2", tmp_path / "run")
    failures = ranks(2, train_with_a_text_of_ones_own, config, texts, expect_errors=True, timeout=30)
    assert all(expected in failure.message for failure in failures)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_that_can_not_be_written(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    for message in refusals(ranks, 2, shipped("tp2", tmp_path / "run")):
        assert "Permission denied" in message


def test_of_two_jobs_in_one_new_folder_one_is_refused(tmp_path: Path) -> None:
    config = shipped("single", tmp_path / "run")
    starts = [rundir._find_start(config, "refuse") for _ in range(2)]  # both find that it is new
    with rundir.claim(config, starts[0]):
        rundir.write_config(config)
        before = contents(tmp_path)
    with (
        pytest.raises(RunError, match=r"--resume goes on .* --overwrite starts anew"),
        rundir.claim(config, starts[1]),
    ):
        pass
    assert contents(tmp_path) == before


@pytest.mark.parametrize("existing", ["refuse", "resume", "overwrite"])
def test_a_folder_in_which_another_process_trains_is_refused(existing: Any, tmp_path: Path) -> None:
    config = shipped("single", tmp_path, "train.steps=1")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    before = contents(tmp_path)
    code = (
        "import fcntl, os, sys; folder = os.open(sys.argv[1], os.O_RDONLY); "
        "fcntl.flock(folder, fcntl.LOCK_EX); print(flush=True); "
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None and other.stdout is not None
        other.stdout.readline()
        with pytest.raises(RunError, match="found another that trains there now"):
            train(config, existing)
        assert contents(tmp_path) == before
        other.stdin.close()
        assert other.wait(timeout=30) == 0
    assert train(config, existing)[0] == 0, "the lock ended with the process"
