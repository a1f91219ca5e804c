"""Where all is right, verify says so, and leaves the gradients as they were."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distnorm.testing import dense_norm
from distnorm.verification import VerifyReport, verify
from tests.verification.topologies import (
    CLIP,
    Block,
    Ranks,
    backward,
    check_of,
    ddp,
    fsdp,
    fsdp_tp,
    hsdp,
    missing_gradients,
    pipeline_tied,
    same,
    sequence_parallel,
    tokens_of,
    tp,
    uneven_over_uneven,
    verified,
)


def _dense_reference(data_ranks: int) -> float:
    """The norm of the same gradient in a single process."""
    model = Block()
    for rank in range(data_ranks):
        (model(tokens_of(1 + rank)).square().mean() / data_ranks).backward()
    return dense_norm({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


# body, world size, ranks that see data of their own (None: not the model that _dense_reference holds)
PASSING = [
    (ddp, 2, 2),
    (fsdp, 2, 2),
    (hsdp, 4, 4),
    (tp, 2, 1),
    (sequence_parallel, 2, None),
    (fsdp_tp, 4, 2),
    (pipeline_tied, 2, None),
    (missing_gradients, 2, None),
]


@pytest.mark.parametrize(("body", "world", "data_ranks"), PASSING, ids=[row[0].__name__ for row in PASSING])
def test_passes_where_all_is_right(
    ranks: Ranks, body: Callable[..., VerifyReport], world: int, data_ranks: int | None
) -> None:
    report = same(ranks(world, body, CLIP))
    assert report.ok, str(report)
    assert report.ranks == world
    assert report.true_norm > 0.01
    assert "verify's own" not in check_of(report, "scaling").detail
    if data_ranks is not None:
        # apart by the rounding of two different fp32 backward passes, and so no tighter than some ulps
        assert math.isclose(report.true_norm, _dense_reference(data_ranks), rel_tol=1e-6)
        assert report.elements == sum(p.numel() for p in Block().parameters())


@pytest.mark.parametrize("p", [1.0, 3.5, math.inf])
def test_passes_for_other_orders(ranks: Ranks, p: float) -> None:
    report = same(ranks(2, tp, {"norm": {"type": p}}))
    assert report.ok, str(report)
    assert "verify's own" in check_of(report, "scaling").detail


def under_a_default_device() -> VerifyReport:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    model = Block()
    fully_shard(model, mesh=mesh)
    backward(model, dist.get_rank())
    with torch.device("meta"):
        return verify(model, CLIP)


def test_passes_where_a_default_device_is_set(ranks: Ranks) -> None:
    """The indices of a shard, and what verify gathers, are in the host's memory whatever is set."""
    report = same(ranks(2, under_a_default_device))
    assert report.ok, str(report)


def test_passes_for_uneven_and_empty_shards(ranks: Ranks) -> None:
    """With 3 rows on 4 ranks one of them holds none."""
    report = same(ranks(4, fsdp, CLIP, 3))
    assert report.ok, str(report)


def test_alone_without_a_process_group() -> None:
    assert not dist.is_initialized()
    model = Block()
    backward(model)
    report = verified(model, model.parameters(), {"clip": {"max_norm": 1e6}})
    assert report.ok and report.ranks == 1
    assert math.isclose(report.true_norm, _dense_reference(1), rel_tol=1e-14)
    assert "the configured one would not clip" in check_of(report, "scaling").detail
    assert str(report).startswith("gradient norm verified on 1 rank ")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    model = Block(dtype=dtype)
    backward(model)
    report = verified(model, model.parameters(), CLIP)
    assert report.ok, str(report)


def test_complex_gradients() -> None:
    parameter = nn.Parameter(torch.randn(5, dtype=torch.complex64))
    parameter.grad = torch.full((5,), 3 + 4j, dtype=torch.complex64)
    report = verified(parameter, [parameter])
    assert report.ok and math.isclose(report.true_norm, 5 * math.sqrt(5))


def test_zero_gradients_leave_nothing_to_scale() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.zeros(3)
    report = verify([parameter], CLIP)
    assert report.ok and "nothing to scale" in check_of(report, "scaling").detail


def test_does_not_import_dtensor() -> None:
    code = (
        "import sys, torch, distnorm\n"
        "p = torch.nn.Parameter(torch.ones(2)); p.grad = torch.ones(2)\n"
        "assert distnorm.verify(p).ok\n"
        "assert 'torch.distributed.tensor' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


def test_passes_for_uneven_strided_shards(ranks: Ranks) -> None:
    report = same(ranks(4, uneven_over_uneven))
    assert report.ok, str(report)
    assert math.isclose(report.true_norm, math.sqrt(report.elements))
