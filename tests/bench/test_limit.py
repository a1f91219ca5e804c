"""The arithmetic of bytes and limits, by hand-chosen numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distnorm.bench.limit import Limit, Work, work_of
from distnorm.bench.problem import describe
from distnorm.bench.rounds import Row, Table
from distnorm.trainer.world import World

LIMIT = Limit(read=100.0, write=50.0, latency=0.5)


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (Work(read=200, write=0, reduces=False), 2.0),
        (Work(read=200, write=100, reduces=True), 2.0 + 0.5 + 2.0),
        (Work(read=25, write=0, reduces=True, read_alone=50), 0.5),
        (Work(read=100, write=0, reduces=True, read_alone=400), 1.5),
    ],
)
def test_the_least_time(work: Work, seconds: float) -> None:
    assert LIMIT.seconds(work) == pytest.approx(seconds)


def world() -> World:
    return World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def works(kind: str) -> list[tuple[float, float, float | None]]:
    """A layer of 6 x 4 fp32, 96 bytes, and what the norm, a clipping and a step need of it on this rank."""
    model = nn.Linear(4, 6, bias=False)
    if kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    elif kind == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")))
    model(torch.ones(1, 4)).sum().backward()
    problem = describe(model, dict(model.named_parameters()), world())
    needed = (
        work_of(problem, clips=False),
        work_of(problem, clips=True),
        work_of(problem, clips=True, step=True),
    )
    return [(work.read, work.write, work.read_alone) for work in needed]


@pytest.mark.parametrize(
    ("kind", "size", "read", "here", "alone"),
    [("copied", 2, 48, 96, 96), ("fsdp", 2, 48, 48, None), ("hsdp", 4, 24, 48, None)],
)
@pytest.mark.slow
def test_bytes_that_are_needed(
    ranks: Any, kind: str, size: int, read: int, here: int, alone: int | None
) -> None:
    expected = [(read, 0, alone), (read, 2 * here, alone), (read, 7 * here, alone)]
    assert ranks(size, works, kind) == [expected] * size


def test_medians_and_quartiles() -> None:
    row = Row("a", (4.0, 1.0, 3.0, 2.0, 5.0), None, None, agrees=True)
    assert (row.median, row.quartiles) == (3.0, (2.0, 4.0))
    assert Row("a", (4.0,), None, None, agrees=True).quartiles == (4.0, 4.0)
    slow = Row("b", (6.0,), None, None, agrees=True)
    raising = Row("c", (), None, "raises", agrees=True)
    assert Table("w", "t", 1, 8.0, 1.0, "b", (row, slow)).reference_median == 6.0
    assert Table("w", "t", 1, 8.0, 1.0, "c", (row, raising)).reference_median is None
