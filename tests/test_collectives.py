"""One collective and no host read a step, counted by torch's profiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import distnorm
from tests.counting import as_on_an_accelerator, collectives_and_reads
from tests.refusals import TIMEOUT, clipper, distributed


class Block(nn.Module):
    """As in a transformer that is tensor parallel: the LayerNorm is not distributed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def fsdp_over_tp(mesh: DeviceMesh, shard_all: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    for block in model:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block if shard_all else block.up, mesh=mesh["dp"])
    return model


def count_on_fsdp_over_tp(call: str, options: dict[str, Any]) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = fsdp_over_tp(mesh, shard_all=call != "module")
    x = torch.ones(2, 8)
    model(x).square().sum().backward()
    try:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch_raised = ""
    except RuntimeError as error:
        torch_raised = str(error)
    if call == "clip_grad_norm_":
        parameters = list(model.named_parameters())
        step = lambda: distnorm.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=False)  # noqa: E731
    else:
        clipping = distnorm.GradClipper(model, options)
        step = clipping.clip if call != "measure" else clipping.measure
    with as_on_an_accelerator():
        step()
        counted = [collectives_and_reads(step)]
        for some in list(model.parameters())[::2]:  # a changed set of gradients costs no exchange
            some.grad = None
        counted.append(collectives_and_reads(step))
    return {"torch": torch_raised, "counted": counted, "on the CPU": collectives_and_reads(step)}


@pytest.mark.parametrize(
    ("call", "options"),
    [
        ("clip", {"clip": {"max_norm": 1.0, "nonfinite": "skip"}}),
        ("module", {"clip": {"max_norm": 1.0, "nonfinite": "zero"}}),
        ("clip", {"norm": {"type": "inf"}, "clip": {"max_norm": 1.0, "nonfinite": "propagate"}}),
        ("clip", {"norm": {"type": 20}, "clip": {"max_norm": 1.0, "nonfinite": "skip"}}),
        ("measure", {"clip": {"nonfinite": "skip"}}),
        ("clip_grad_norm_", {}),
    ],
    ids=["skip", "plain beside DTensor", "inf", "p=20", "measure", "function"],
)
@pytest.mark.slow
def test_one_collective_and_no_host_read_where_torch_raises(ranks, call, options):
    for seen in ranks(4, count_on_fsdp_over_tp, call, options, timeout=TIMEOUT):
        assert "mesh" in seen["torch"] or "mixed torch.Tensor and DTensor" in seen["torch"]
        assert seen["counted"] == [({"c10d::allreduce_": 1}, {})] * 2
        assert seen["on the CPU"][0] == {"c10d::allreduce_": 1}  # to read the result waits for no device


def raising_reads_once() -> Any:
    tensor = distributed((2,), [Replicate()], 4)
    clipping = clipper([("w", tensor)])
    clipping.clip()
    return collectives_and_reads(clipping.clip)


def test_nonfinite_raise_reads_back_and_adds_no_collective(ranks):
    for collectives, reads in ranks(2, raising_reads_once, timeout=TIMEOUT):
        assert collectives == {"c10d::allreduce_": 1}
        assert reads
