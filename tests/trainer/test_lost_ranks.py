"""A rank that does not come: the others say which, where and after how long, within the timeout."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distnorm import Config
from distnorm.trainer.checkpoint import FileSystemWriter
from distnorm.trainer.topology import AXES, make_topology
from distnorm.trainer.torch_trainer import TorchTrainer
from distnorm.trainer.world import World

from .tiny import contents, rows, shipped, train

TIMEOUT = 8  # seconds; a busy machine may need some for a step


def train_but(fault: str, config: Config) -> Any:
    """Rank 1 has a fault before step 2."""
    step_of = TorchTrainer.step

    def faulty(self: TorchTrainer, step: int) -> Any:
        if dist.get_rank() == 1 and step == 2:
            if fault == "stops":
                time.sleep(3 * TIMEOUT)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        return step_of(self, step)

    TorchTrainer.step = faulty  # type: ignore[method-assign]
    return train(config)


@pytest.mark.parametrize("fault", ["stops", "is killed"])
@pytest.mark.slow
def test_who_did_not_come_is_named_in_time(fault: str, ranks: Callable[..., Any], tmp_path: Path) -> None:
    config = shipped("tp2", tmp_path, "train.steps=5", f"train.timeout={TIMEOUT}")
    one, _ = ranks(2, train_but, fault, config, expect_errors=True, collective_timeout=TIMEOUT, timeout=180)
    assert one.type_name == "LostRankError", one
    assert "rank 1 did not come to step 2's gradient: it was last at step 1's row" in one.message
    waited = re.search(rf"waited (\d+) s, train.timeout is {TIMEOUT} s", one.message)
    assert waited and int(waited[1]) < TIMEOUT + 10
    assert [row["step"] for row in rows(tmp_path)] == [1]


def train_unless_second(config: Config) -> Any:
    if dist.get_rank() == 1:
        os._exit(7)
    return train(config)


def test_who_did_not_come_to_the_start_is_named(ranks: Callable[..., Any], tmp_path: Path) -> None:
    config = shipped("tp2", tmp_path, f"train.timeout={TIMEOUT}")
    one, _ = ranks(2, train_unless_second, config, expect_errors=True)
    assert one.type_name == "LostRankError", one
    assert "rank 1 did not come to the start: it was never seen" in one.message


def timeouts(configs: list[Config]) -> list[float]:
    """The seconds that each group of a topology waits; of pipelines also that of the first and last stage."""
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    found = []
    for config in configs:
        topology = make_topology(config, world)
        groups = [topology.axis(axis).get_group() for axis in AXES]
        if topology.degree("pp") > 1:
            groups.append(topology.end_stages_group())
        backends = [group._get_backend(torch.device("cpu")) for group in groups]
        found += [backend.options._timeout.total_seconds() for backend in backends]
    return found


def test_every_group_of_a_topology_has_the_timeout(ranks: Callable[..., Any], tmp_path: Path) -> None:
    names = ("fsdp2_tp2", "hsdp2x2", "ddp4", "pp2_tp2", "pp2_fsdp2")
    configs = [shipped(name, tmp_path, f"train.timeout={TIMEOUT}") for name in names]
    found = ranks(4, timeouts, configs, collective_timeout=TIMEOUT)
    assert found == [[TIMEOUT] * (3 * len(AXES) + 2 * (len(AXES) + 1))] * 4


def train_killed_in_a_save(config: Config, part: str) -> Any:
    """The process ends in its second save: before any file, or when all are there but the name."""
    calls = []

    def kill(call: Callable[..., Any]) -> Callable[..., Any]:
        def killed(*args: Any, **kwargs: Any) -> Any:
            calls.append(None)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return killed

    if part == "data":
        FileSystemWriter.write_data = kill(FileSystemWriter.write_data)  # type: ignore[method-assign]
    elif part == "metadata":
        FileSystemWriter.finish = kill(FileSystemWriter.finish)  # type: ignore[method-assign]
    else:
        Path.replace = kill(Path.replace)  # type: ignore[method-assign,assignment]
    return train(config)


@pytest.mark.parametrize("part", ["data", "metadata", "name"])
def test_a_process_killed_in_a_save_leaves_the_last_checkpoint(
    part: str, ranks: Callable[..., Any], tmp_path: Path
) -> None:
    config = shipped("single", tmp_path, "train.steps=6", "train.checkpoint.every=2")
    ranks(1, train_killed_in_a_save, config, part, expect_errors=True)
    whole = [name for name in contents(tmp_path / "checkpoints") if ".partial" not in name]
    assert whole and all(name.startswith("step-2/") for name in whole)
    _, printed = train(config)
    assert "going on after step 2" in printed
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
