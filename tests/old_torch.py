"""What older versions of torch lack, and by which error a test that needs it ends there.

On a torch that is older than the one named, a test that ends by such an error is skipped, with the reason. On
that torch and on newer ones, or by any other error, it fails.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

VERSION = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


@dataclass(frozen=True, slots=True)
class Limit:
    """Part of an error's text, the first torch known not to raise it, and the reason for skipping."""

    words: str
    until: tuple[int, int]
    reason: str


LIMITS = [
    Limit("'Stream' object has no attribute 'record_event'", (2, 7), "FSDP2 needs a GPU"),
    Limit("No module named 'torch.distributed._local_tensor'", (2, 10), "there is no LocalTensorMode"),
    Limit("has no attribute 'float4_e2m1fn_x2'", (2, 8), "there is no float4"),
    Limit("attempting to assign a gradient with dtype", (2, 10), "a gradient has its parameter's dtype"),
    Limit("does not support uneven sharding", (2, 7), "FSDP2 over TP can't shard unevenly"),
    Limit("_functional_collectives' has no attribute", (2, 13), "the collectives to spoil have other names"),
    Limit("UnsupportedOperatorException: c10d.allreduce_", (2, 7), "fake tensors have no collectives"),
    Limit("whose pipelines divide by the number of micro-batches", (2, 7), "the trainer refuses pipelines"),
    Limit("has no attribute 'reduce_scatter_single'", (2, 13), "the collective to spoil has another name"),
    Limit("_group_tensors_by_device_and_dtype", (2, 13), "torch's clip_grad_norm_ compiles to no one graph"),
    Limit("AssertionError: 2 != 1", (2, 13), "torch's compiler can't read gradients of FSDP2's parameters"),
    Limit("a dump needs a torch whose checkpoints", (2, 9), "distnorm.dump refuses"),
    Limit("unexpected keyword argument 'no_dist'", (2, 7), "checkpoints are saved by all ranks or by none"),
]

# How torch's own functions refuse gradients on two meshes.
OLD_TWO_MESHES = "does not support cross-mesh|Sharding propagation failed"
TWO_MESHES = "must have the same mesh" if VERSION >= (2, 13) else OLD_TWO_MESHES
PIPELINES = pytest.mark.skipif(
    VERSION < (2, 13),
    reason="older pipelines don't divide by the number of micro-batches (torch 2.6), or crash on gloo (2.9)",
)


def limit_of_this_torch(error: BaseException, version: tuple[int, ...] = VERSION) -> str | None:
    """Why a test that ended by `error` can't be had on this torch; None where there is no such reason."""
    text = f"{type(error).__name__}: {error}"
    for limit in LIMITS:
        if version < limit.until and limit.words in text:
            return f"torch {'.'.join(map(str, version))}: {limit.reason}"
    return None


def let_distribute_tensor_cut() -> None:
    """Let tests pass src_data_rank=None, by which each rank cuts its own copy, to a torch that can't."""
    import torch.distributed.tensor as module

    sends = module.distribute_tensor

    @functools.wraps(sends)
    def distribute_tensor(
        tensor: Tensor, mesh: Any, placements: Any, src_data_rank: int | None = 0
    ) -> module.DTensor:
        where = mesh.get_coordinate()
        known = all(type(one) in (module.Shard, module.Replicate) for one in placements)
        if src_data_rank is not None or not known or where is None:
            return sends(tensor, mesh, placements)
        local = tensor
        for axis, placement in enumerate(placements):
            if isinstance(placement, module.Shard):
                length = local.shape[placement.dim]
                step = -(-length // mesh.size(axis))
                begin = min(where[axis] * step, length)
                local = local.narrow(placement.dim, begin, min(step, length - begin))
        return module.DTensor.from_local(
            local.clone(), mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )

    module.distribute_tensor = distribute_tensor
